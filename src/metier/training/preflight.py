"""Look before training: what is trained on, and every row that could not be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from metier.errors import MetierError, TrainingError
from metier.records import Example
from metier.task import Training, Turns
from metier.text.template import Rendered, Renderer
from metier.training.batches import Row


@dataclass(frozen=True)
class Prepared:
    """Rows that may be trained on.

    Attributes:
        rows: as ids.
        examples: behind the rows, one for each.
        sample: one example as text, its trained tokens between ⟦ and ⟧.
        dropped: rows left out, by reason.

    """

    rows: list[Row]
    examples: list[Example]
    sample: str
    dropped: dict[str, int] = field(default_factory=dict)


def prepare(
    examples: Sequence[Example],
    renderer: Renderer,
    training: Training,
    limit: int | None,
    part: str = "training",
) -> Prepared:
    """Render examples and refuse what would fail in silence.

    Args:
        examples: the training or validation part.
        renderer: the one that will serve.
        training: for `max_length`, `too_long` and `turns`.
        limit: longest input of the base in tokens, if it names one.
        part: name of the part, for messages.

    Raises:
        TrainingError: a row has no trained token, does not train its stop token, or is too long.

    """
    most = longest(training, limit)
    found = [(row, e) for e in examples for row in render(e, renderer, training.turns)]
    for row, example in found:
        if len(row.ids) > most and training.too_long != "drop":
            raise _too_long(example, len(row.ids), most)
    fitting = [(row, example) for row, example in found if len(row.ids) <= most]
    if not fitting:
        raise TrainingError(
            f"{part} part",
            f"has no row of at most {most:,} tokens to train with",
            "give more or shorter examples, or raise training.max_length",
        )
    rows, kept = [row for row, _ in fitting], [example for _, example in fitting]
    dropped = len(found) - len(fitting)
    shown = renderer.show(Rendered(rows[0].ids, rows[0].trained))
    return Prepared(rows, kept, shown, {f"{part} rows": dropped} if dropped else {})


def longest(training: Training, limit: int | None) -> int:
    """Tokens of the longest row that is trained on; `limit` is what the base can read."""
    return min(training.max_length, limit or training.max_length)


def render(example: Example, renderer: Renderer, turns: Turns = "last") -> list[Row]:
    """The rows of one example: one, or several where all its answers are learned.

    Raises:
        TrainingError: one has no trained token, or does not train its stop token.

    """
    place = example.source or f"example {example.id}"
    try:
        if turns == "all":
            rendered = renderer.turns(example.messages, example.tools)
        else:
            rendered = [renderer.example(example.messages, example.tools)]
    except MetierError as error:
        raise TrainingError(f"{place}: {error.place}", error.cause, error.remedy) from None
    for row in rendered:
        _check(row, renderer, place)
    return [Row.of(row) for row in rendered]


def _check(row: Rendered, renderer: Renderer, place: str) -> None:
    """Refuse a row from which an answer or its end would not be learned."""
    if not any(row.trained[:-1]):
        raise TrainingError(place, "its answer has no token to train on", "give it an answer")
    if row.ids[-1] not in renderer.stop_ids or not row.trained[-1]:
        raise TrainingError(
            place,
            "the stop token is not trained, so the model would never stop",
            "use a template that ends answers with the stop token",
        )


def _too_long(example: Example, length: int, longest: int) -> TrainingError:
    return TrainingError(
        example.source or f"example {example.id}",
        f"is {length:,} tokens long, the limit is {longest:,}: its answer would be cut",
        "raise training.max_length (up to the base's context), shorten the row, "
        "or set training.too_long: drop",
    )
