"""Load a base: a pre-trained language model or encoder with its tokenizer, checked before use.

It is a causal language model, or an encoder-decoder of the T5 family. Weights are safetensors only
and remote code is never run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metier.errors import ModelError
from metier.model import encoder, quantised
from metier.model.device import choose_device, compute_dtype
from metier.progress import no_weight_bar
from metier.runs import file_hash, fingerprint
from metier.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What is fetched from the Hub: data only, never code or pickles.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Encoder-decoders that are read as `seq2seq` reads them.
_SEQ2SEQ = ("t5", "mt5")


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base.

    Attributes:
        model: the language model, or an encoder without any head, in evaluation mode.
        tokenizer: its tokenizer.
        name: what the user called it.
        path: the directory it was read from.
        hash: SHA-256 over the hashes of its config and weight files.
        parameters: number of weights.

    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    path: Path
    hash: str
    parameters: int


def starter_path() -> Path:
    """Directory of the small base that ships with metier.

    Raises:
        ModelError: this copy of metier carries no weights.

    """
    path = Path(__file__).parent / "starter"
    if not (path / "config.json").is_file():
        raise ModelError(
            "base 'starter'",
            "its weights are not part of this copy of metier",
            "install a released metier, or set base: to a path or a Hub name",
        )
    return path


def load_base(
    name: str, dtype: torch.dtype | None = None, device: str = "auto", *, four_bit: bool = False
) -> Base:
    """Load a base by name.

    Args:
        name: ``starter``, a directory, or a Hub name such as ``org/model``.
        dtype: number format of the weights; by default what the device computes in.
        device: where to put it: auto, cuda, mps or cpu.
        four_bit: hold the linear layers in four bits (see `quantised`).

    Raises:
        ModelError: it is missing, damaged, unsafe or of an unknown kind.
        ConfigError: it cannot be held in four bits here.

    """
    if four_bit:
        quantised.check_four_bit()
    path = locate(name)
    files = _weight_files(path)
    config = _config(path)
    tokenizer = load_tokenizer(path)
    target = choose_device(device)
    dtype = dtype or compute_dtype(target)
    model = _model(path, config, dtype, quantised.arguments(dtype, target) if four_bit else {})
    if encoder.is_encoder(config):
        encoder.check_padding(model, str(path))
    _check_vocabulary(model, tokenizer, path)
    return Base(
        model=model.to(target).eval(),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        name=name,
        path=path,
        hash=_hash([path / "config.json", *files]),
        parameters=model.num_parameters(),
    )


def base_hash(name: str) -> str:
    """Hash of a base without loading it: what `Base.hash` will be."""
    path = locate(name)
    return _hash([path / "config.json", *_weight_files(path)])


def base_config(name: str) -> PretrainedConfig:
    """Config of a base, without its weights; its `dtype` is that of the stored weights.

    Raises:
        ModelError: it is missing, or of an unknown kind.

    """
    path = locate(name)
    config = _config(path)
    _model_class(path, config)
    return config


def is_encoder_base(name: str) -> bool:
    """Whether a base is an encoder, without loading its weights.

    Raises:
        ModelError: it is missing, or of an unknown kind.

    """
    return encoder.is_encoder(base_config(name))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a base, which writes what an encoder wants around a text."""
    return Tokenizer.load(path, encoder=encoder.is_encoder(_config(path)))


def is_encoder_decoder(name: str) -> bool:
    """Whether a base is an encoder-decoder, by its config alone.

    Raises:
        ModelError: it is missing.

    """
    return bool(_config(locate(name)).is_encoder_decoder)


def locate(name: str) -> Path:
    """Directory of a base; a Hub name is fetched (data files only) or found in the local cache.

    Raises:
        ModelError: there is no such directory, or the Hub does not give it.

    """
    if name == "starter":
        return starter_path()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"base '{name}'", "is no directory", "check the path")
    return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the client raises many unrelated kinds
        raise ModelError(
            f"base '{name}'",
            f"is neither a directory here nor to be had from the Hub ({_first_line(error)})",
            "check the name and the network, or download it once and set base: to its directory",
        ) from None


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a base, each readable to its end."""
    if (path / _INDEX).is_file():
        files = [path / name for name in _shards(path / _INDEX)]
    else:
        files = [path / _WEIGHTS]
    if not files[0].is_file() and any(path.glob("*.bin")):
        raise ModelError(
            str(path),
            "has its weights only as pickle files (*.bin), which can run code",
            "convert them to safetensors, or choose another base",
        )
    for file in files:
        _check_safetensors(file)
    return files


def _shards(index: Path) -> list[str]:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(str(index), "names no weight files", "download the base again")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(str(index), f"names the file {name!r}", "download the base again")
    return sorted(set(places.values()))


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    remedy = "download the base again, or check base: in task.yaml"
    if not file.is_file():
        raise ModelError(str(file), "is missing", remedy)
    try:
        with safe_open(str(file), framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            str(file), f"is damaged or cut short ({_first_line(error)})", remedy
        ) from None


def _config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    _json(path / "config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated kinds
        raise ModelError(
            str(path / "config.json"),
            f"describes no model that transformers knows ({_first_line(error)})",
            "choose a base whose architecture needs no remote code",
        ) from None
    return config


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = "is missing" if not file.exists() else f"is unreadable ({_first_line(error)})"
        raise ModelError(
            str(file), cause, "a base is a directory in Hugging Face layout; download it again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(str(file), "is not a JSON object", "download the base again")
    return value


def _model_class(path: Path, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """The class for a config and its arguments."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if encoder.is_encoder(config):
        return encoder.encoder_class(config)
    remedy = (
        "choose a causal (decoder-only) language model, one of the T5 family, or an encoder for a "
        "head"
    )
    known: Any = AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder:
        known = AutoModelForSeq2SeqLM._model_mapping
        if config.model_type not in _SEQ2SEQ:
            cause = f"is an encoder-decoder of the family {config.model_type}"
            raise ModelError(str(path), cause, remedy)
        if not isinstance(getattr(config, "decoder_start_token_id", None), int):
            raise ModelError(
                str(path / "config.json"),
                "names no decoder_start_token_id, behind which answers are written",
                "set it to the id with which the model was trained (T5: that of the padding token)",
            )
    if type(config) not in known:
        raise ModelError(str(path), f"is a {config.model_type} model", remedy)
    return known[type(config)], {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of every T5: what is missing in a base is in its report."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _model(
    path: Path, config: PretrainedConfig, dtype: torch.dtype, quantisation: dict[str, Any]
) -> PreTrainedModel:
    kind, arguments = _model_class(path, config)
    try:
        with no_weight_bar(), _quiet() if config.is_encoder_decoder else nullcontext():
            model, report = kind.from_pretrained(
                str(path),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                # Named here, because a config may name attention code to be fetched from the Hub.
                attn_implementation="sdpa" if kind._supports_sdpa else "eager",
                output_loading_info=True,
                **arguments,
                **quantisation,
            )
    except Exception as error:  # transformers raises many unrelated kinds
        raise ModelError(
            str(path),
            f"cannot be loaded ({_first_line(error)})",
            "the weights must fit config.json; download the base again",
        ) from None
    if report["missing_keys"]:
        first = min(report["missing_keys"])
        raise ModelError(
            str(path),
            f"lacks {len(report['missing_keys'])} weights, e.g. {first}",
            "this is not a whole language model or encoder; choose another base",
        )
    found: PreTrainedModel = model
    return found


def _check_vocabulary(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> None:
    weights = model.get_input_embeddings().weight
    rows = len(weights)  # type: ignore[arg-type]
    if tokenizer.vocab_size > rows:
        raise ModelError(
            str(path),
            f"its tokenizer has {tokenizer.vocab_size:,} ids but the model embeds only {rows:,}",
            "use the tokenizer that belongs to this model",
        )


def _hash(files: list[Path]) -> str:
    found = [(file.resolve(), file.stat()) for file in files]
    digests = [_digest(file, state.st_ino, state.st_ctime_ns) for file, state in found]
    return fingerprint({file.name: digest for file, digest in zip(files, digests, strict=True)})


@cache
def _digest(file: Path, _number: int, _changed: int) -> str:
    """Hash of a file, which is read once as long as nobody changes it: a base is loaded often.

    The time of its last change is the system's own: copying a file with its dates does not set it.
    """
    return file_hash(file)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
