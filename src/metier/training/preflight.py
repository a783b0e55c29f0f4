"""Look before training: what is trained on, and every row that could not be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from metier.errors import MetierError, TrainingError
from metier.records import Example
from metier.task import Training
from metier.text.template import Renderer
from metier.training.batches import Row


@dataclass(frozen=True)
class Prepared:
    """Rows that may be trained on.

    Attributes:
        rows: as ids.
        examples: behind the rows.
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
        training: for `max_length` and `too_long`.
        limit: longest input of the base in tokens, if it names one.
        part: name of the part, for messages.

    Raises:
        TrainingError: a row has no trained token, does not train its stop token, or is too long.

    """
    most = longest(training, limit)
    rows: list[Row] = []
    kept: list[Example] = []
    for example in examples:
        row = render(example, renderer)
        if len(row.ids) > most:
            if training.too_long != "drop":
                raise _too_long(example, len(row.ids), most)
            continue
        rows.append(row)
        kept.append(example)
    if not rows:
        raise TrainingError(
            f"{part} part",
            f"has no row of at most {most:,} tokens to train with",
            "give more or shorter examples, or raise training.max_length",
        )
    shown = renderer.show(renderer.example(kept[0].messages, kept[0].tools))
    dropped = len(examples) - len(kept)
    return Prepared(rows, kept, shown, {f"{part} rows": dropped} if dropped else {})


def longest(training: Training, limit: int | None) -> int:
    """Tokens of the longest row that is trained on; `limit` is what the base can read."""
    return min(training.max_length, limit or training.max_length)


def render(example: Example, renderer: Renderer) -> Row:
    """The row of one example.

    Raises:
        TrainingError: it has no trained token, or does not train its stop token.

    """
    place = example.source or f"example {example.id}"
    try:
        row = Row.of(renderer.example(example.messages, example.tools))
    except MetierError as error:
        raise TrainingError(f"{place}: {error.place}", error.cause, error.remedy) from None
    if not any(row.trained[:-1]):
        raise TrainingError(place, "its answer has no token to train on", "give it an answer")
    if row.ids[-1] not in renderer.stop_ids or not row.trained[-1]:
        raise TrainingError(
            place,
            "the stop token is not trained, so the model would never stop",
            "use a template that ends answers with the stop token",
        )
    return row


def _too_long(example: Example, length: int, longest: int) -> TrainingError:
    return TrainingError(
        example.source or f"example {example.id}",
        f"is {length:,} tokens long, the limit is {longest:,}: its answer would be cut",
        "raise training.max_length (up to the base's context), shorten the row, "
        "or set training.too_long: drop",
    )
