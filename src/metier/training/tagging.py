"""Tagging: the language model reads, a linear layer says which tokens belong to which span.

The loss is the cross-entropy of the class of each unit of a text (`text.tags`), at its last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from metier.errors import TrainingError
from metier.graders.json_text import NotJson, parse
from metier.model.tagger import Tagger
from metier.records import Example
from metier.task import Training
from metier.text.spans import Entities, as_entities, find
from metier.text.tags import NONE, class_names, classes_of, read
from metier.text.template import Renderer
from metier.training import preflight
from metier.training.batches import Batch, Row
from metier.training.forward import forward_of
from metier.training.preflight import Prepared
from metier.training.sft import Judge


def types_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The types of the spans that examples name, sorted.

    Raises:
        TrainingError: an answer names no spans in the form of `text.spans`, or none does.

    """
    named = [_named(example) for example in examples]
    found = sorted({kind for entities in named for kind, texts in entities.items() if texts})
    if not found:
        raise TrainingError(
            "training part", "names no span in any answer", "give examples with spans"
        )
    return tuple(found)


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Names of the classes that a tagger learns from examples."""
    return class_names(types_of(examples))


def _named(example: Example) -> Entities:
    try:
        found = as_entities(parse(example.answer))
    except NotJson:
        found = None
    if found is None:
        raise TrainingError(
            example.place,
            "its answer does not name spans by their type",
            'write {"place": ["Rome"]}, spans word for word, and {} for none; or give tokens with '
            "tags, or texts with the places of spans (data.format: tags)",
        )
    return found


class Tagging:
    """Makes rows to be tagged of examples, and counts what could not be tagged as it stands.

    Args:
        renderer: the one that will serve.
        types: of the spans that are learned.

    """

    def __init__(self, renderer: Renderer, types: Sequence[str]) -> None:
        self._renderer, self._types = renderer, types
        self._spans = self._missing = self._unsure = self._cut = self._unknown = self._bare = 0

    def __call__(self, example: Example) -> list[Row]:
        """The row of an example: what is read, and the class of each unit of its text.

        None where no unit has a class.
        """
        reading, named = read(self._renderer, example.prompt), _named(example)
        found = find(reading.text, named)
        classes, cut = classes_of(reading.units, found, self._types)
        tags = [NONE] * len(reading.ids)
        for unit, number in zip(reading.units, classes, strict=True):
            tags[unit.token] = number
        spans = sum(map(len, named.values()))
        self._spans += spans
        self._missing += found.missing
        self._unsure += spans - found.missing - len(found.spans)
        self._cut += cut
        self._unknown += sum(span.type not in self._types for span in found.spans)
        trained = tuple(tag != NONE for tag in tags)
        if not any(trained):
            self._bare += 1
            return []
        return [Row(tuple(reading.ids), trained, tags=tuple(tags))]

    def notes(self, part: str) -> tuple[str, ...]:
        """What was counted, in words."""
        told = {
            "do not stand in their text word for word, or only inside another: they are not "
            "learned": self._missing,
            "stand in their text more often than in its answer, or under two types: as none can "
            "tell which is meant, nothing is learned there": self._unsure,
            "begin or end inside a token: the whole token is learned": self._cut,
            "have a type that no training example has: nothing is measured there": self._unknown,
        }
        notes = [
            f"{count:,} of {self._spans:,} spans of the {part} part {words}"
            for words, count in told.items()
            if count
        ]
        if self._bare:
            notes.append(f"{self._bare:,} {part} rows are left out: nothing in them can be learned")
        return tuple(notes)

    @property
    def hopeless(self) -> bool:
        """Whether most spans are not in their texts."""
        return 2 * self._missing > self._spans


def prepare(
    examples: Sequence[Example],
    renderer: Renderer,
    training: Training,
    limit: int | None,
    types: Sequence[str],
    part: str = "training",
) -> Prepared:
    """Rows of examples that may be trained on; see `preflight.prepare`.

    Raises:
        TrainingError: most spans are not in their texts, or as `preflight.prepare`.

    """
    tagging = Tagging(renderer, types)
    prepared = preflight.prepare(examples, renderer, training, limit, part, tagging)
    if tagging.hopeless:
        raise TrainingError(
            f"{part} part",
            "most of the spans that its answers name do not stand in their texts",
            "write spans word for word, or compare arms that write (lora, full)",
        )
    return replace(prepared, notes=(*prepared.notes, *tagging.notes(part)))


def tag_loss(tagger: Tagger) -> Callable[[Batch], Tensor]:
    """Sum of cross-entropies over the units of a batch."""
    logits = _logits(tagger)

    def loss(batch: Batch) -> Tensor:
        batch = batch.to(tagger.model.device)
        return F.cross_entropy(logits(batch), batch.targets, reduction="sum", ignore_index=NONE)

    return loss


def tag_judge(tagger: Tagger) -> Judge:
    """Of a batch: sum of cross-entropies, and two sums whose ratio is 1 - F1 of units in spans.

    Most units are in no span: by mistakes among all of them, a tagger that finds nothing would be
    better than one that begins to find spans.
    """
    logits = _logits(tagger)

    def judge(batch: Batch) -> tuple[float, float, float]:
        batch = batch.to(tagger.model.device)
        found, wanted = logits(batch), batch.targets >= 0
        loss = F.cross_entropy(found, batch.targets, reduction="sum", ignore_index=NONE)
        answered, true = found.argmax(-1)[wanted], batch.targets[wanted]
        named = int((answered > 0).sum() + (true > 0).sum())
        right = int(((answered == true) & (true > 0)).sum())
        return loss.item(), named - 2 * right, named

    return judge


def _logits(tagger: Tagger) -> Callable[[Batch], Tensor]:
    forward = forward_of(tagger.model)
    return lambda batch: tagger.logits(forward(batch.ids, batch.lengths))
