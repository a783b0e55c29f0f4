"""Pre-training: a tokenizer and a Llama-architecture base from random weights and streamed text.

The stages meet as files in the run directory: ``tokenizer-*``, ``tokens-*``, ``training``
(checkpoints and log) and at last ``model-*`` in Hugging Face layout. Left out on purpose:
several devices, other architectures.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metier import runs
from metier.config import Config
from metier.data import stream
from metier.errors import ConfigError
from metier.model.llama import LlamaForward, has_compiler
from metier.progress import Progress, Silent
from metier.task import Seed
from metier.text import bpe
from metier.training.loop import Loop, Plan, State, trapezoid
from metier.training.losses import linear_cross_entropy
from metier.training.optimizers import muon_and_adam

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

_EVALUATION_LENGTH = 512
# Compiling takes about a minute: only a longer run wins it back.
_WORTH_COMPILING = 5_000_000
# The trainer numbers control tokens first, in this order.
_BOS, _EOS, _PAD = (bpe.CONTROL_TOKENS.index(token) for token in (bpe.BOS, bpe.EOS, bpe.PAD))


class Shape(Config):
    """Size of a Llama-architecture decoder with tied embeddings."""

    vocabulary: Annotated[int, Field(gt=262)] = 8192
    """Tokens of the byte-level BPE tokenizer trained first."""
    hidden: Annotated[int, Field(gt=0)] = 320
    """Width of the residual stream."""
    layers: Annotated[int, Field(gt=0)] = 7
    """Decoder layers."""
    heads: Annotated[int, Field(gt=0)] = 5
    """Attention heads; `hidden` is a multiple of it."""
    intermediate: Annotated[int, Field(gt=0)] = 864
    """Width inside the feed-forward layers."""
    context: Annotated[int, Field(gt=0)] = 1024
    """Longest input in tokens."""


class PretrainConfig(Config):
    """The whole of a pre-training recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Name of the base."""
    root: str = "."
    """Directory that the sources' paths start from, relative to the recipe."""
    sources: Annotated[tuple[stream.Source, ...], Field(min_length=1)]
    """The corpus."""
    shape: Shape = Shape()
    """Size of the model."""
    tokens: Annotated[int, Field(gt=0)]
    """Tokens to train on; more than the corpus has means several passes."""
    step_lengths: Annotated[tuple[int, ...], Field(min_length=1)] = (128,) * 6 + (512, 1024)
    """Window lengths of the micro-batches of one optimiser step. Short windows are cheap and
    teach sentence beginnings; some long ones teach the whole context."""
    micro_tokens: Annotated[int, Field(gt=0)] = 2048
    """Tokens in a micro-batch: few enough that activations stay in the processor's cache."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 0.004
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Decoupled weight decay of the matrices."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps in which the learning rate rises. A number, not a share: until the final fall begins,
    a run may be given more tokens and goes on as if it had always had them."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of steps at the end in which it falls to zero."""
    seed: Seed = 0
    """Seed of weights and order."""
    evaluate_every: Annotated[int, Field(ge=0)] = 250
    """Steps between held-out figures."""
    evaluation_windows: Annotated[int, Field(gt=0)] = 24
    """Held-out windows of 512 tokens per source and evaluation."""
    tokenizer_bytes: Annotated[int, Field(gt=0)] = 80_000_000
    """The tokenizer is trained on at most this much text, taken evenly from every source."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds between checkpoints."""


@dataclass(frozen=True)
class Window:
    """A micro-batch of windows: ids of shape (windows, 1 + length)."""

    ids: Tensor

    @property
    def weight(self) -> float:
        """Every token after the first is predicted."""
        return float(self.ids[:, 1:].numel())

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return self.ids[:, 1:].numel()


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one source with the bytes they stand for."""

    name: str
    ids: Tensor
    text_bytes: int


def pretrain(
    config: PretrainConfig,
    base: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Path:
    """Train a base and return the directory of the finished model.

    Args:
        config: the recipe.
        base: directory that `config.root` is relative to.
        out: run directory; an interrupted run there goes on where it stopped.
        dtype: compute dtype (parameters and optimiser stay in float32).
        progress: is told every step.

    """
    listener: Progress = progress or Silent()
    root = base / config.root
    _check(config, root)
    with runs.Run(out) as run:
        tokenizer_dir = _tokenizer_stage(run, config, root, listener)
        tokens_dir = _tokens_stage(run, config, root, tokenizer_dir, listener)
        model, state = _train(run, config, tokenizer_dir, tokens_dir, dtype, listener)
        about = {"config": config.model_dump(mode="json"), "tokens": str(tokens_dir.name)}
        return run.stage("model", about, lambda d: _export(d, model, state, tokenizer_dir, config))


def _check(config: PretrainConfig, root: Path) -> None:
    if config.shape.hidden % config.shape.heads:
        raise ConfigError(
            "shape.heads", f"does not divide hidden ({config.shape.hidden})", "choose a divisor"
        )
    for length in config.step_lengths:
        if length > config.shape.context or config.micro_tokens % length:
            raise ConfigError(
                "step_lengths",
                f"{length} is above the context or no divisor of micro_tokens",
                "choose divisors of micro_tokens up to shape.context",
            )
    if not any(source.weight > 0 for source in config.sources):
        raise ConfigError("sources", "none has a weight above 0", "give one to train on")
    names = [source.name for source in config.sources]
    for source in config.sources:
        if names.count(source.name) > 1:
            raise ConfigError("sources", f"'{source.name}' stands twice", "name each differently")
        stream.matching_files(source, root)


def _tokenizer_stage(run: runs.Run, config: PretrainConfig, root: Path, progress: Progress) -> Path:
    inputs = {
        "sources": [source.model_dump(mode="json") for source in config.sources],
        "vocabulary": config.shape.vocabulary,
        "bytes": config.tokenizer_bytes,
    }

    def make(directory: Path) -> None:
        progress.stage("train tokenizer")
        bpe.train_bpe(_sample(config, root), config.shape.vocabulary, directory)

    return run.stage("tokenizer", inputs, make)


def _sample(config: PretrainConfig, root: Path) -> Iterator[str]:
    """Training documents for the tokenizer, an equal share of bytes from each source."""
    trained = [source for source in config.sources if source.weight > 0]
    for source in trained:
        left = config.tokenizer_bytes // len(trained)
        for text in _texts(source, root, held_out=False):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def _texts(source: stream.Source, root: Path, *, held_out: bool) -> Iterator[str]:
    share = source.held_out if source.weight > 0 else 1.0
    for document in stream.documents(source, root):
        if (share == 1.0 or stream.is_held_out(document, share)) == held_out:
            yield document.text


def _tokens_stage(
    run: runs.Run, config: PretrainConfig, root: Path, tokenizer_dir: Path, progress: Progress
) -> Path:
    inputs = {
        "tokenizer": tokenizer_dir.name,
        "sources": [source.model_dump(mode="json") for source in config.sources],
    }

    def make(directory: Path) -> None:
        tokenizer = _load_tokenizer(tokenizer_dir)
        for source, held_out in itertools.product(config.sources, (False, True)):
            progress.stage(f"tokenise {source.name}{' (held out)' if held_out else ''}")
            stream.write_tokens(
                _texts(source, root, held_out=held_out),
                _encoder(tokenizer),
                _token_path(directory, source, held_out=held_out),
                bos=_BOS,
                eos=_EOS,
                vocabulary=config.shape.vocabulary,
            )

    return run.stage("tokens", inputs, make)


def _token_path(directory: Path, source: stream.Source, *, held_out: bool) -> Path:
    return directory / f"{source.name}{'.held-out' if held_out else ''}.bin"


def _load_tokenizer(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def _encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    # A corpus may quote "<|eos|>"; only documents' true ends may become the control token.
    tokenizer.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode


class _Mix:
    """The micro-batches of a step: windows of several lengths over the weighted corpus."""

    def __init__(self, config: PretrainConfig, tokens_dir: Path, tokenizer: Tokenizer) -> None:
        files = [
            (stream.TokenFile(_token_path(tokens_dir, source, held_out=False)), source.weight)
            for source in config.sources
        ]
        self._lengths, self._micro = config.step_lengths, config.micro_tokens
        self._windows = {
            length: stream.Windows(
                files, length=length, seed=config.seed, bos=_BOS, breaks=_breaks(tokenizer)
            )
            for length in set(config.step_lengths)
        }

    def step(self, index: int) -> list[Window]:
        """Micro-batches of step `index`."""
        done = {
            length: index * self._lengths.count(length) * (self._micro // length)
            for length in self._windows
        }
        batches = []
        for length in self._lengths:
            count = self._micro // length
            rows = [self._windows[length][done[length] + i] for i in range(count)]
            done[length] += count
            batches.append(Window(torch.from_numpy(np.stack(rows))))
        return batches


def _breaks(tokenizer: Tokenizer) -> NDArray[Any]:
    """Tokens after which a paragraph may begin: those that end a line, and BOS."""
    found = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    for token in range(len(found)):
        found[token] = token == _BOS or tokenizer.decode([token]).endswith("\n")
    return found


def _train(
    run: runs.Run,
    config: PretrainConfig,
    tokenizer_dir: Path,
    tokens_dir: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[LlamaForCausalLM, State]:
    tokenizer = _load_tokenizer(tokenizer_dir)
    model = _new_model(config)
    forward = LlamaForward(
        model, dtype, compiled=config.tokens >= _WORTH_COMPILING and has_compiler()
    )
    head = model.model.embed_tokens.weight

    def loss(window: Window) -> Tensor:
        hidden = forward(window.ids[:, :-1])
        targets = window.ids[:, 1:].reshape(-1)
        return linear_cross_entropy(hidden.reshape(len(targets), -1), head, targets)

    steps = math.ceil(config.tokens / (config.micro_tokens * len(config.step_lengths)))
    plan = Plan(
        steps=steps,
        schedule=trapezoid(steps, config.warmup_steps, round(steps * config.decay)),
        seed=config.seed,
        evaluate_every=config.evaluate_every,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    held_out = _held_out(config, tokens_dir, tokenizer)
    progress.stage(f"pre-train {config.name}", steps)
    loop = Loop(
        model,
        loss,
        _Mix(config, tokens_dir, tokenizer),
        muon_and_adam(model, config.learning_rate, config.weight_decay),
        plan,
        directory=run.path / f"training-{_recipe_key(config, tokens_dir)}",
        evaluate=(lambda: _bits_per_byte(loss, held_out, progress)) if held_out else None,
        progress=progress,
    )
    return model, loop.run()


def _recipe_key(config: PretrainConfig, tokens_dir: Path) -> str:
    """Names the checkpoints of a recipe; how long it trains and looks is not part of it."""
    free = {"tokens", "root", "checkpoint_seconds", "evaluate_every", "evaluation_windows"}
    recipe = config.model_dump(mode="json", exclude=free)
    return runs.fingerprint([recipe, tokens_dir.name])[:12]


def _new_model(config: PretrainConfig) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.shape
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            intermediate_size=shape.intermediate,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            bos_token_id=_BOS,
            eos_token_id=_EOS,
            pad_token_id=_PAD,
        )
    )


def _held_out(config: PretrainConfig, tokens_dir: Path, tokenizer: Tokenizer) -> list[HeldOut]:
    """Evenly spaced held-out windows of each source that has any."""
    sizes = _token_bytes(tokenizer)
    length = min(_EVALUATION_LENGTH, config.shape.context)
    found = []
    for source in config.sources:
        ids = stream.TokenFile(_token_path(tokens_dir, source, held_out=True)).ids
        count = min(config.evaluation_windows, len(ids) // length)
        if count == 0:
            continue
        starts = np.linspace(0, len(ids) - length, count).astype(int)
        windows = np.stack([ids[s : s + length] for s in starts]).astype(np.int64)
        rows = np.insert(windows, 0, _BOS, axis=1)
        found.append(HeldOut(source.name, torch.from_numpy(rows), int(sizes[windows].sum())))
    return found


def _token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text behind each token, shape (vocabulary,); control tokens have none."""
    # A byte-level token is written with one character per byte.
    sizes = [len(tokenizer.id_to_token(token) or "") for token in range(tokenizer.get_vocab_size())]
    sizes[: len(bpe.CONTROL_TOKENS)] = [0] * len(bpe.CONTROL_TOKENS)
    return np.array(sizes, dtype=np.int64)


def _bits_per_byte(
    loss: Callable[[Window], Tensor], held_out: list[HeldOut], progress: Progress
) -> Mapping[str, float]:
    """Bits per byte of each source's held-out windows; ``loss`` is their mean."""
    figures: dict[str, float] = {}
    for part in held_out:
        nats = sum(float(loss(Window(rows))) for rows in torch.split(part.ids, 4))
        figures[part.name] = nats / math.log(2) / part.text_bytes
    figures["loss"] = sum(figures.values()) / len(figures)
    progress.say("held-out bits per byte: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    return figures


def _export(
    directory: Path,
    model: LlamaForCausalLM,
    state: State,
    tokenizer_dir: Path,
    config: PretrainConfig,
) -> None:
    model.bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tokenizer_dir / name).read_bytes())
    facts = {
        "recipe": config.model_dump(mode="json", exclude={"root"}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state.step,
        "tokens_seen": state.step * config.micro_tokens * len(config.step_lengths),
        "curve": state.curve,
        "versions": runs.versions(),
    }
    (directory / "training.json").write_text(json.dumps(facts, indent=1))
