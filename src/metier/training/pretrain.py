"""Pre-training: a tokenizer and a Llama-architecture base from random weights and streamed text.

The stages meet as files in the run directory: ``tokenizer-*``, ``tokens-*``, ``training``
(checkpoints and log) and at last ``model-*`` in Hugging Face layout. Left out on purpose:
several devices, other architectures.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from metier import runs
from metier.config import Config
from metier.data import stream
from metier.errors import ConfigError, DataError
from metier.model.device import choose_device, compute_dtype
from metier.model.llama import LlamaForward, has_compiler
from metier.progress import Progress, Silent
from metier.task import Seed
from metier.text import bpe
from metier.training.forward import forward_of
from metier.training.held_out import HeldOut, bits_per_byte, spaced_windows, token_bytes
from metier.training.loop import Loop, Plan, State, trapezoid
from metier.training.losses import next_tokens, of_head
from metier.training.mixture import Mixture, Window
from metier.training.optimizers import muon_and_adam

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

_EVALUATION_LENGTH = 512
# Compiling takes about a minute: only a longer run wins it back.
_WORTH_COMPILING = 5_000_000
# Names beside those of sources in the figures of an evaluation.
_FIGURES = ("loss", "step", "train_loss", "validation_loss")
# The trainer numbers control tokens first, in this order.
_BOS, _EOS, _PAD = (bpe.CONTROL_TOKENS.index(token) for token in (bpe.BOS, bpe.EOS, bpe.PAD))


class Shape(Config):
    """Size of a Llama-architecture decoder with tied embeddings."""

    vocabulary: Annotated[int, Field(ge=bpe.SMALLEST)] = 8192
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

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.micro_tokens * len(self.step_lengths)


def pretrain(
    config: PretrainConfig,
    base: Path,
    out: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a base and return the directory of the finished model.

    Args:
        config: the recipe.
        base: directory that `config.root` is relative to.
        out: run directory; an interrupted run there goes on where it stopped.
        device: where it is trained; by default the fastest there is.
        dtype: compute dtype (parameters and optimiser stay in float32); by default the device's.
        progress: is told every step.

    Raises:
        ConfigError: the recipe cannot be followed.
        DataError: a file of the corpus cannot be read, or there is too little text.

    """
    listener: Progress = progress or Silent()
    root = base / config.root
    device = device or choose_device()
    dtype = dtype or compute_dtype(device)
    _check(config, root)
    with runs.Run(out) as run:
        listener.stage("hash the corpus")
        files = {source.name: stream.file_hashes(source, root) for source in config.sources}
        tokenizer_dir = _tokenizer_stage(run, config, root, files, listener)
        tokens_dir = _tokens_stage(run, config, root, files, tokenizer_dir, listener)
        about = {"config": config.model_dump(mode="json"), "tokens": str(tokens_dir.name)}

        def make(directory: Path) -> None:
            model = _new_model(config, device)
            state = _train(run, config, model, tokenizer_dir, tokens_dir, dtype, listener)
            _export(directory, model, state, tokenizer_dir, config)

        return run.stage("model", about, make)


def _check(config: PretrainConfig, root: Path) -> None:
    _check_shape(config)
    _check_steps(config)
    if not _trained(config):
        raise ConfigError("sources", "none has a weight above 0", "give one to train on")
    names = [source.name for source in config.sources]
    for source in config.sources:
        if names.count(source.name) > 1:
            raise ConfigError("sources", f"'{source.name}' stands twice", "name each differently")
        if source.name in _FIGURES:
            raise ConfigError("sources", f"'{source.name}' names a figure already", "rename it")
        stream.matching_files(source, root)


def _check_shape(config: PretrainConfig) -> None:
    shape = config.shape
    if shape.hidden % shape.heads:
        raise ConfigError(
            "shape.heads", f"does not divide hidden ({shape.hidden})", "choose a divisor"
        )
    if shape.hidden // shape.heads % 2:
        raise ConfigError(
            "shape.heads",
            f"makes heads of {shape.hidden // shape.heads} numbers, which rotary positions pair",
            "choose heads of an even size",
        )


def _check_steps(config: PretrainConfig) -> None:
    for length in config.step_lengths:
        if length < 1 or length > config.shape.context or config.micro_tokens % length:
            raise ConfigError(
                "step_lengths",
                f"{length} is above the context or no divisor of micro_tokens",
                "choose divisors of micro_tokens up to shape.context",
            )
    if max(config.step_lengths) < config.shape.context:
        raise ConfigError(
            "shape.context",
            f"{config.shape.context} is above every step length: its end would stay untrained",
            "lower it, or add a window of that length",
        )
    if config.tokens < config.step_tokens:
        raise ConfigError(
            "tokens",
            f"is {config.tokens:,}, less than one optimiser step of {config.step_tokens:,}",
            "give more tokens, or lower micro_tokens or the number of step_lengths",
        )


Files = Mapping[str, Mapping[str, str]]
"""Name of a source to the SHA-256 of its files by path: changed text makes new stages."""


def _inputs(sources: Sequence[stream.Source], files: Files) -> list[dict[str, Any]]:
    """All that the documents of sources depend on."""
    return [source.model_dump(mode="json") | {"files": files[source.name]} for source in sources]


def _refuse_edits(sources: Sequence[stream.Source], root: Path, files: Files) -> None:
    """A stage is named by the text as it was hashed: what was read must be that."""
    for source in sources:
        stream.refuse_edits(source, root, files[source.name])


def _tokenizer_stage(
    run: runs.Run, config: PretrainConfig, root: Path, files: Files, progress: Progress
) -> Path:
    inputs = {
        "sources": _inputs(_trained(config), files),
        "vocabulary": config.shape.vocabulary,
        "bytes": config.tokenizer_bytes,
    }

    def make(directory: Path) -> None:
        progress.stage("train tokenizer")
        bpe.train_bpe(_sample(config, root), config.shape.vocabulary, directory)
        _refuse_edits(_trained(config), root, files)

    return run.stage("tokenizer", inputs, make)


def _trained(config: PretrainConfig) -> list[stream.Source]:
    return [source for source in config.sources if source.weight > 0]


def _sample(config: PretrainConfig, root: Path) -> Iterator[str]:
    """Training documents for the tokenizer, an equal share of bytes from each source.

    Raises:
        DataError: a source has no text to train on.

    """
    trained = _trained(config)
    for source in trained:
        share = left = config.tokenizer_bytes // len(trained)
        for text in _texts(source, root, held_out=False):
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
        if left == share:
            raise DataError(
                f"source '{source.name}'",
                "has no text to train on: its files are empty, or all documents are held out",
                "give more documents, or a smaller held_out",
            )


def _texts(source: stream.Source, root: Path, *, held_out: bool) -> Iterator[str]:
    share = source.held_out if source.weight > 0 else 1.0
    for document in stream.documents(source, root):
        if (share == 1.0 or stream.is_held_out(document, share)) == held_out:
            yield document.text


def _tokens_stage(
    run: runs.Run,
    config: PretrainConfig,
    root: Path,
    files: Files,
    tokenizer_dir: Path,
    progress: Progress,
) -> Path:
    inputs = {"tokenizer": tokenizer_dir.name, "sources": _inputs(config.sources, files)}

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
        _refuse_edits(config.sources, root, files)

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


def _train(
    run: runs.Run,
    config: PretrainConfig,
    model: LlamaForCausalLM,
    tokenizer_dir: Path,
    tokens_dir: Path,
    dtype: torch.dtype,
    progress: Progress,
) -> State:
    tokenizer = _load_tokenizer(tokenizer_dir)
    loss = _next_token_loss(model, dtype, compiled=config.tokens >= _WORTH_COMPILING)
    steps = math.ceil(config.tokens / config.step_tokens)
    plan = Plan(
        steps=steps,
        schedule=trapezoid(steps, config.warmup_steps, round(steps * config.decay)),
        seed=config.seed,
        evaluate_every=config.evaluate_every,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    held_out = _held_out(config, tokens_dir, tokenizer, progress)
    progress.stage(f"pre-train {config.name}", steps)
    loop = Loop(
        model,
        loss,
        _mixture(config, tokens_dir, tokenizer),
        muon_and_adam(model, config.learning_rate, config.weight_decay),
        plan,
        directory=runs.begun(run.path / f"training-{_recipe_key(config, tokens_dir)}", progress),
        evaluate=(lambda: _evaluate(loss, held_out, progress)) if held_out else None,
        resumed=lambda state: _check_resumed(state, plan, config, progress),
        progress=progress,
    )
    return loop.run()


def _check_resumed(state: State, plan: Plan, config: PretrainConfig, progress: Progress) -> None:
    """Refuse steps beyond the plan, and say where the learning rates do not meet.

    Raises:
        ConfigError: the plan would end before its learning rate has fallen.

    """
    if state.step > plan.steps or (state.step == plan.steps and not state.finished):
        raise ConfigError(
            "tokens",
            f"is {config.tokens:,}, but {state.step * config.step_tokens:,} are done, at a "
            "learning rate that was to fall to zero later",
            "give as many as before or more, or another output directory",
        )
    planned = plan.schedule(state.step - 1)
    if state.rate is not None and not math.isclose(state.rate, planned):
        progress.say(
            f"the learning rate was at {state.rate:.0%} of its peak and is now at {planned:.0%}: "
            "with other tokens its final fall begins elsewhere, so the model is not the one "
            "that a run with these tokens from the start would give"
        )


def _mixture(config: PretrainConfig, tokens_dir: Path, tokenizer: Tokenizer) -> Mixture:
    files = [
        (stream.TokenFile(_token_path(tokens_dir, source, held_out=False)), source.weight)
        for source in config.sources
    ]
    return Mixture(files, config.step_lengths, config.micro_tokens, config.seed, tokenizer, _BOS)


def _next_token_loss(
    model: LlamaForCausalLM, dtype: torch.dtype, *, compiled: bool
) -> Callable[[Window], Tensor]:
    """Sum of the next-token losses of a window, on the model's device."""
    device, head = model.device, model.model.embed_tokens.weight
    forward = (
        LlamaForward(model, dtype, compiled=compiled and has_compiler())
        if device.type == "cpu"
        else forward_of(model)
    )

    def loss(window: Window) -> Tensor:
        ids = window.ids.to(device)
        rows, length = ids.shape
        hidden = forward(ids[:, :-1].flatten(), [length - 1] * rows).to(dtype)
        return of_head(hidden, head, next_tokens(ids[:, 1:].flatten()))

    return loss


def _recipe_key(config: PretrainConfig, tokens_dir: Path) -> str:
    """Names the checkpoints of a recipe; how long it trains and looks is not part of it."""
    free = {"tokens", "root", "checkpoint_seconds", "evaluate_every", "evaluation_windows"}
    recipe = config.model_dump(mode="json", exclude=free)
    return runs.fingerprint([recipe, tokens_dir.name])[:12]


def _new_model(config: PretrainConfig, device: torch.device) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.shape
    torch.manual_seed(config.seed)
    # Drawn on the processor, so that every device starts from the same weights.
    model = LlamaForCausalLM(
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
    return model.to(device)  # type: ignore[arg-type,no-any-return]


def _held_out(
    config: PretrainConfig, tokens_dir: Path, tokenizer: Tokenizer, progress: Progress
) -> list[HeldOut]:
    sizes = token_bytes(tokenizer)
    length = min(_EVALUATION_LENGTH, config.shape.context)
    found = []
    for source in config.sources:
        file = stream.TokenFile(_token_path(tokens_dir, source, held_out=True))
        ids, text_bytes = spaced_windows(
            file, sizes, count=config.evaluation_windows, length=length, bos=_BOS
        )
        if text_bytes:
            found.append(HeldOut(source.name, ids, text_bytes, trained=source.weight > 0))
        elif source.held_out > 0:
            progress.say(f"'{source.name}' has too little held-out text for a figure")
    return found


def _evaluate(
    loss: Callable[[Window], Tensor], held_out: Sequence[HeldOut], progress: Progress
) -> Mapping[str, float]:
    figures = bits_per_byte(lambda ids: loss(Window(ids)), held_out)
    told = ", ".join(f"{part.name} {figures[part.name]:.3f}" for part in held_out)
    progress.say(f"held-out bits per byte: {told}")
    return figures


def _export(
    directory: Path,
    model: LlamaForCausalLM,
    state: State,
    tokenizer_dir: Path,
    config: PretrainConfig,
) -> None:
    model.bfloat16().save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    settings["model_max_length"] = config.shape.context
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    facts = {
        "recipe": config.model_dump(mode="json", exclude={"root"}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state.step,
        "tokens_seen": state.step * config.step_tokens,
        "curve": [
            {name: value for name, value in point.items() if not math.isnan(value)}
            for point in state.curve
        ],
        "versions": runs.versions(),
    }
    (directory / "training.json").write_text(json.dumps(facts, indent=1))
