"""What a model has forgotten: general text and grammar, measured before and after tuning.

*General text*: bits per byte, the model's surprise at every byte of text that has nothing to do
with the task. It can be compared over tokenizers and needs no task. *General skill*: the share of
minimal pairs in which the grammatical sentence has the higher probability.

The question is not whether a difference is significant but whether a relevant loss is excluded
(non-inferiority): an ability holds only if the upper end of the 95 % interval of its loss is within
the tolerance. The same windows and sentences are read before and after, so the intervals are
paired. Where an arm was trained with several seeds, any of the models may be the one that ships:
the ability holds only if it holds for each, and the worst is shown. No correction is needed for
several seeds or abilities that must all hold (intersection-union, Berger 1982).

The intervals speak of text like this and of sentences like these. Windows lie far apart and pairs
are drawn one by one, so each counts for itself; the phenomena of the pairs are a fixed set, not a
sample of English. (Over 50 draws of 1,200 pairs the loss of a damaged model varied with a standard
deviation of 0.0144, where this error is 0.0146; clusters by phenomenon would make it 0.0211.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metier.config import Config
from metier.data import pairs as minimal_pairs
from metier.data.pairs import Pair
from metier.errors import DataError, ModelError, RunError
from metier.evaluation.schema import Estimate, Forgotten
from metier.evaluation.statistics import (
    difference_interval,
    mean_score,
    non_inferior,
    paired_difference,
    ratio,
)
from metier.task import Forgetting, resolve
from metier.text.windows import cut, fit

if TYPE_CHECKING:
    from metier.text.tokenizer import Tokenizer

Ids = list[int]
LogProbs = Callable[[Sequence[tuple[Ids, Ids]]], list[float]]
"""(prompt, continuation) pairs to the log-probability (nats) of each continuation."""

_WINDOW = 800
_WINDOWS = 40
GENERAL_TEXT = _WINDOWS * _WINDOW
"""Characters of general text that are read at most."""
_FEWEST_WINDOWS = 10


@dataclass(frozen=True, slots=True)
class Material:
    """What general ability is measured on.

    Attributes:
        text: name of the general text.
        texts: the text itself.
        skill: name of the pairs.
        pairs: good and bad sentences.

    """

    text: str
    texts: tuple[str, ...]
    skill: str
    pairs: tuple[Pair, ...]


class Ability(Config):
    """One measurement of one model, kept by unit so that a later one can be paired with it."""

    name: str
    """`text: <name>` or `skill: <name>`."""
    values: tuple[float, ...]
    """text: bits of each window. skill: 1 where the good sentence wins, 0.5 at a tie, else 0."""
    sizes: tuple[int, ...] = ()
    """text: UTF-8 bytes of each window."""


def load_material(settings: Forgetting, task_file: Path) -> Material:
    """The user's texts and pairs; by default Python's language reference and generated pairs.

    Args:
        settings: section `forgetting` of the task.
        task_file: paths in `settings` are relative to it.

    Raises:
        DataError: a file cannot be read.

    """
    if settings.texts:
        text = ", ".join(settings.texts)
        texts = [_read(resolve(path, task_file)) for path in settings.texts]
    else:
        from metier.data.builtin import topics

        text, texts = "Python language reference", topics()
    if settings.pairs:
        skill = ", ".join(settings.pairs)
        found = minimal_pairs.read(resolve(path, task_file) for path in settings.pairs)
    else:
        skill, found = "grammatical minimal pairs", minimal_pairs.generate()
    return Material(text, tuple(texts), skill, tuple(found))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), f"is not UTF-8 (byte {error.start})", "save the file as UTF-8"
        ) from None


def measure(
    logprobs: LogProbs, tokenizer: Tokenizer, context: int | None, material: Material
) -> tuple[Ability, Ability]:
    """General text and general skill of one model.

    Every window and sentence begins after the beginning-of-sequence token (the end-of-sequence
    token, where the tokenizer has none), from which its first token is predicted.

    Args:
        logprobs: scores continuations with the model.
        tokenizer: the model's.
        context: longest sequence the model reads, in tokens; None where there is no limit.
        material: the same before and after.

    Raises:
        DataError: there is too little text, or a sentence is longer than the context.
        ModelError: the model gives something no finite probability.

    """
    return (
        _measure_text(logprobs, tokenizer, context, material),
        _measure_skill(logprobs, tokenizer, context, material),
    )


def _measure_text(
    logprobs: LogProbs, tokenizer: Tokenizer, context: int | None, material: Material
) -> Ability:
    pieces = [piece for text in material.texts for piece in cut(text, _WINDOW)]
    if len(pieces) < _FEWEST_WINDOWS:
        raise DataError(
            "forgetting.texts",
            f"hold {sum(map(len, material.texts)):,} characters, too few for an interval",
            f"give at least {_FEWEST_WINDOWS * _WINDOW:,} characters of general text",
        )
    room = math.inf if context is None else context - 1
    windows = [window for piece in _spread(pieces) for window in fit(piece, tokenizer, room)]
    sums = _scored(logprobs, tokenizer, [tokenizer.encode(window) for window in windows])
    return Ability(
        name=f"text: {material.text}",
        values=tuple(-value / math.log(2) for value in sums),
        sizes=tuple(len(window.encode()) for window in windows),
    )


def _spread(pieces: list[str]) -> list[str]:
    """At most `_WINDOWS` pieces, evenly spread, so that they resemble each other little."""
    count = min(_WINDOWS, len(pieces))
    return [pieces[i * len(pieces) // count] for i in range(count)]


def _measure_skill(
    logprobs: LogProbs, tokenizer: Tokenizer, context: int | None, material: Material
) -> Ability:
    sentences = [sentence for pair in material.pairs for sentence in (pair.good, pair.bad)]
    sequences = [tokenizer.encode(sentence) for sentence in sentences]
    for sentence, ids in zip(sentences, sequences, strict=True):
        if context is not None and len(ids) >= context:
            raise DataError(
                f"forgetting.pairs: '{sentence[:40]}…'",
                f"has {len(ids):,} tokens, but the model reads at most {context - 1:,}",
                "shorten or remove the sentence",
            )
    sums = _scored(logprobs, tokenizer, sequences)
    wins = [
        (good > bad) + (good == bad) / 2 for good, bad in zip(sums[::2], sums[1::2], strict=True)
    ]
    return Ability(
        name=f"skill: {material.skill}",
        values=tuple(wins),
    )


def _scored(logprobs: LogProbs, tokenizer: Tokenizer, sequences: Sequence[Ids]) -> list[float]:
    sums = logprobs([([tokenizer.opening_id], ids) for ids in sequences])
    for number, value in enumerate(sums):
        if not math.isfinite(value):
            text = tokenizer.decode(sequences[number])[:60]
            raise ModelError(
                tokenizer.name,
                f"the model gives '{text}' the log-probability {value}",
                "its weights are damaged or its training diverged: lower the learning rate",
            )
    return sums


def compare(
    before: Sequence[Ability], after: Sequence[Sequence[Ability]], settings: Forgetting
) -> tuple[Forgotten, ...]:
    """What was lost, by ability.

    Args:
        before: `measure` of the base.
        after: `measure` of the tuned model, once for each seed.
        settings: holds the tolerances: for text a share of the base's bits per byte, for skill a
            difference of accuracy.

    Raises:
        RunError: the measurements are not of the same material.

    """
    _check_same(before, after)
    return tuple(
        max(
            (_forgotten(base, seed[place], settings) for seed in after),
            key=lambda found: found.loss.high,
        )
        for place, base in enumerate(before)
    )


def _check_same(before: Sequence[Ability], after: Sequence[Sequence[Ability]]) -> None:
    def shape(abilities: Sequence[Ability]) -> list[object]:
        return [(a.name, len(a.values), a.sizes) for a in abilities]

    if not after or any(shape(seed) != shape(before) for seed in after):
        raise RunError(
            "forgetting",
            "was measured on other material before than after",
            "delete the stages named ability-*; the run makes them again",
        )


def _forgotten(before: Ability, after: Ability, settings: Forgetting) -> Forgotten:
    if before.sizes:
        return _text_forgotten(before, after, settings.text_tolerance)
    return _skill_forgotten(before, after, settings.skill_tolerance)


def _text_forgotten(before: Ability, after: Ability, tolerance: float) -> Forgotten:
    first, second = np.array(before.values), np.array(after.values)
    sizes = np.array(before.sizes, dtype=np.float64)
    grown = ratio(second, first)
    loss = Estimate(mean=grown.mean - 1, low=grown.low - 1, high=grown.high - 1)
    return Forgotten(
        name=before.name,
        unit="bits per byte",
        lower_is_better=True,
        before=ratio(first, sizes),
        after=ratio(second, sizes),
        loss=loss,
        tolerance=tolerance,
        holds=non_inferior(loss, tolerance),
    )


def _skill_forgotten(before: Ability, after: Ability, tolerance: float) -> Forgotten:
    first, second = np.array([before.values]), np.array([after.values])
    each = np.arange(len(before.values))
    loss = difference_interval(paired_difference(first, second, each))
    return Forgotten(
        name=before.name,
        unit="accuracy",
        lower_is_better=False,
        before=mean_score(first, each),
        after=mean_score(second, each),
        loss=loss,
        tolerance=tolerance,
        holds=non_inferior(loss, tolerance),
    )
