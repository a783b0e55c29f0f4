"""What a pre-training recipe says, for a new base and for one that is given."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from metier.config import Config
from metier.data.stream import Source
from metier.errors import ConfigError
from metier.task import Lora, Seed
from metier.text import bpe

_NEW_LENGTHS = (128,) * 6 + (512, 1024)
_NEW_WARMUP, _GIVEN_WARMUP = 100, 20
# Names beside those of sources in the figures of an evaluation.
_FIGURES = ("loss", "step", "train_loss", "validation_loss")


class Shape(Config):
    """A new base: a Llama-architecture decoder with tied embeddings, and its tokenizer."""

    vocabulary: Annotated[int, Field(ge=bpe.SMALLEST)] = 8192
    """Tokens of the byte-level BPE tokenizer trained first."""
    tokenizer_bytes: Annotated[int, Field(gt=0)] = 80_000_000
    """The tokenizer is trained on at most this much text, taken evenly from every source."""
    hidden: Annotated[int, Field(gt=0)] = 320
    """Width of the residual stream."""
    layers: Annotated[int, Field(gt=0)] = 7
    """Decoder layers."""
    heads: Annotated[int, Field(gt=0)] = 5
    """Attention heads; `hidden` is a multiple of it."""
    intermediate: Annotated[int, Field(gt=0)] = 864
    """Width inside the feed-forward layers."""
    context: Annotated[int, Field(ge=8)] = 1024
    """Longest input in tokens."""


class PretrainConfig(Config):
    """The whole of a pre-training recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Name of what is trained."""
    root: str = "."
    """Directory that the sources' paths start from, relative to the recipe."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """The corpus."""
    shape: Shape | None = None
    """The new base that is trained from random weights; not with `base`."""
    base: str | None = None
    """A base that is trained further: `starter`, a directory (relative to the recipe) or a Hub
    name. Without one, a new base is trained."""
    adapter: Lora | None = None
    """Train an adapter of the given base, which is merged into it at the end; without one, all its
    weights are trained."""
    tokens: Annotated[int, Field(gt=0)]
    """Tokens to train on; more than the corpus has means several passes."""
    step_lengths: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    """Window lengths of the micro-batches of one optimiser step. By default six of 128, one of 512
    and one of 1,024 for a new base: short windows are cheap and teach sentence beginnings, some
    long ones teach the whole context. A given base has eight of what its context holds."""
    micro_tokens: Annotated[int, Field(gt=0)] = 2048
    """Tokens in a micro-batch: few enough that activations stay in the processor's cache."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate; by default 0.004 for a new base, and for a given one by its width and
    whether an adapter is trained."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Decoupled weight decay of the matrices."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the learning rate rises, by default 100 for a new base and 20 for a given one.
    A number, not a share: until the final fall begins, a run may be given more tokens and goes on
    as if it had always had them."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of steps at the end in which it falls to zero."""
    seed: Seed = 0
    """Seed of weights and order."""
    evaluate_every: Annotated[int, Field(ge=0)] = 250
    """Steps between held-out figures."""
    evaluation_windows: Annotated[int, Field(gt=0)] = 24
    """Held-out windows of at most 1,600 characters per source and evaluation."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds between checkpoints."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """`step_lengths`, once they are known."""
        return self.step_lengths or _NEW_LENGTHS

    @property
    def warmup(self) -> int:
        """`warmup_steps`, or their default."""
        if self.warmup_steps is None:
            return _NEW_WARMUP if self.base is None else _GIVEN_WARMUP
        return self.warmup_steps

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.micro_tokens * len(self.lengths)

    @property
    def trained(self) -> tuple[Source, ...]:
        """The sources that are trained on."""
        return tuple(source for source in self.sources if source.trained)


def checked(config: PretrainConfig, context: int | None) -> PretrainConfig:
    """The recipe with its window lengths, unless it cannot be followed.

    Args:
        config: the recipe.
        context: longest input of the given base, in tokens; None where it has no limit, or there
            is no such base.

    Raises:
        ConfigError: a field is wrong, or does not go with another.

    """
    _check_model(config)
    _check_sources(config)
    if config.base is None:
        context = (config.shape or Shape()).context
    elif config.step_lengths is None:
        longest = min(context or config.micro_tokens, config.micro_tokens)
        fitting = next(n for n in range(longest, 0, -1) if config.micro_tokens % n == 0)
        config = config.model_copy(update={"step_lengths": (fitting,) * len(_NEW_LENGTHS)})
    _check_steps(config, context)
    return config


def _check_model(config: PretrainConfig) -> None:
    if config.base is None:
        if config.adapter:
            raise ConfigError(
                "adapter", "is given without a base", "give a base, or leave adapter out"
            )
        _check_shape(config.shape or Shape())
    elif config.shape:
        raise ConfigError(
            "shape", f"is given beside the base '{config.base}', which has its own", "give one"
        )


def _check_shape(shape: Shape) -> None:
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


def _check_steps(config: PretrainConfig, context: int | None) -> None:
    for length in config.lengths:
        if length < 1 or config.micro_tokens % length:
            raise ConfigError(
                "step_lengths",
                f"{length} is no divisor of micro_tokens ({config.micro_tokens})",
                "choose divisors of micro_tokens",
            )
        if context and length > context:
            raise ConfigError(
                "step_lengths",
                f"{length} is above the context of {context} tokens",
                f"choose lengths up to {context}",
            )
    if config.base is None and context and max(config.lengths) < context:
        raise ConfigError(
            "shape.context",
            f"{context} is above every step length: its end would stay untrained",
            "lower it, or add a window of that length",
        )
    if config.tokens < config.step_tokens:
        raise ConfigError(
            "tokens",
            f"is {config.tokens:,}, less than one optimiser step of {config.step_tokens:,}",
            "give more tokens, or lower micro_tokens or the number of step_lengths",
        )


def _check_sources(config: PretrainConfig) -> None:
    if not config.trained:
        raise ConfigError("sources", "none has a weight above 0", "give one to train on")
    shares = [source.share for source in config.sources if source.share]
    if sum(shares) >= 1 or len(shares) == len(config.trained):
        raise ConfigError(
            "sources",
            f"shares of {sum(shares):.0%} in all leave the others nothing, or there is no other",
            "leave one source without a share: it takes the rest",
        )
    names = [source.name for source in config.sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("sources", f"'{name}' stands twice", "name each differently")
        if name in _FIGURES:
            raise ConfigError("sources", f"'{name}' names a figure already", "rename it")
