"""Look before training: what is trained on, and every row that could not be learned from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from metier.errors import MetierError, TrainingError
from metier.records import Example
from metier.task import Training, Turns
from metier.text.bpe import CHAT_TEMPLATE
from metier.text.template import Rendered, Renderer
from metier.training.batches import Row

_MARKUP = (
    *("<|im_start|>", "<|start_header_id|>", "[INST]", "<<SYS>>", "<start_of_turn>", "<|turn>"),
    *("<|START_OF_TURN_TOKEN|>", "<|start_of_role|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|begin_of_text|>", "<s>[INST]"),
    *("<|im_end|>", "<|eot_id|>", "[/INST]", "<end_of_turn>", "<turn|>", "<|end|>", "</s>"),
    *("<|END_OF_TURN_TOKEN|>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
)
"""What opens and ends turns in the chat templates that people use."""

_SHOWN = 40


@dataclass(frozen=True)
class Prepared:
    """Rows that may be trained on.

    Attributes:
        rows: as ids.
        examples: behind the rows, one for each.
        sample: one example as text, its trained tokens between ⟦ and ⟧.
        dropped: rows left out, by reason.
        notes: what may be meant otherwise, in words.

    """

    rows: list[Row]
    examples: list[Example]
    sample: str
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def prepare(
    examples: Sequence[Example],
    renderer: Renderer,
    training: Training,
    limit: int | None,
    part: str = "training",
    to_rows: Callable[[Example], list[Row]] | None = None,
) -> Prepared:
    """Render examples and refuse what would fail in silence.

    Args:
        examples: the training or validation part.
        renderer: the one that will serve.
        training: for `max_length`, `too_long` and `turns`.
        limit: longest input of the base in tokens, if it names one.
        part: name of the part, for messages.
        to_rows: makes the rows of an example where it is not its answers that are learned.

    Raises:
        TrainingError: a row has no trained token, does not train its stop token, or is too long;
            the template leaves a part of it out; or the data is rendered already.

    """
    notes = (
        *_of_template(renderer),
        *_of_markup(examples, renderer, part),
        *_of_vocabulary(examples, renderer, part),
    )
    most = longest(training, limit)
    make = to_rows or (lambda example: render(example, renderer, training.turns))
    found = [(row, e) for e in examples for row in make(e)]
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
    return Prepared(rows, kept, shown, {f"{part} rows": dropped} if dropped else {}, notes)


def _of_template(renderer: Renderer) -> list[str]:
    """Say where a base that may know a chat template is trained with another."""
    own = renderer.tokenizer.chat_template
    if renderer.template == "chat" or own in (None, CHAT_TEMPLATE):
        return []
    return [
        f"{renderer.tokenizer.name} has a chat template of its own, but template is "
        f"{renderer.template}: if it was taught to chat, template: chat is the form it knows"
    ]


def _of_vocabulary(examples: Sequence[Example], renderer: Renderer, part: str) -> list[str]:
    """Say where the tokenizer does not give an answer back as it is written.

    T5's has no braces, and makes blanks of line breaks.
    """
    tokenizer = renderer.tokenizer
    found = [(e, tokenizer.decode(tokenizer.encode(e.answer)).strip()) for e in examples]
    changed = [(e, e.answer.strip(), back) for e, back in found if back != e.answer.strip()]
    if not changed:
        return []
    first, answer, back = changed[0]
    pairs = enumerate(zip(answer, back, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(answer), len(back)))
    start, end = max(0, at - _SHOWN // 2), at + _SHOWN // 2
    return [
        f"{len(changed):,} of {len(examples):,} {part} answers cannot be written as they are: "
        f"{tokenizer.name} gives {answer[start:end]!r} of {first.place} "
        f"back as {back[start:end]!r}"
    ]


def _of_markup(examples: Sequence[Example], renderer: Renderer, part: str) -> list[str]:
    """Refuse data that was rendered already; say where a few rows look like it.

    Typed control tokens are trained as the characters they are: right in a text about chat
    templates, wrong where they were meant as turns, calls or reasoning.
    """
    pattern = _markup(renderer)
    found = [(e, hit) for e in examples if (hit := _first_hit(pattern, e))]
    if not found:
        return []
    first, token = found[0]
    place = first.place
    told = f"{len(found):,} of {len(examples):,} {part} rows begin or end with control tokens"
    if 1 < len(found) >= len(examples) / 2:
        raise TrainingError(
            place,
            f"begins or ends with '{token}', and {told}: as text they would be trained as the "
            "characters they are",
            "write messages without the markup of a chat template: plain text by role, calls as "
            "tool_calls, answers without reasoning tokens",
        )
    return [f"{told}, such as '{token}' in {place}: they are trained as ordinary characters"]


def _first_hit(pattern: re.Pattern[str], example: Example) -> str:
    contents = (message.get("content") or "" for message in example.messages)
    return next((hit.group().strip() for text in contents if (hit := pattern.search(text))), "")


def _markup(renderer: Renderer) -> re.Pattern[str]:
    """Markup at either end of a text; under a chat template all that it writes counts."""
    own = renderer.tokenizer.chat_template or ""
    control = renderer.tokenizer.control_tokens if renderer.template == "chat" else ()
    wanted = {*_MARKUP, *(token for token in control if token in own)}
    tokens = "|".join(map(re.escape, sorted(wanted, key=len, reverse=True)))
    return re.compile(rf"\A\s*(?:{tokens})|(?:{tokens})\s*\Z")


def longest(training: Training, limit: int | None) -> int:
    """Tokens of the longest row that is trained on; `limit` is what the base can read."""
    return min(training.max_length, limit or training.max_length)


def render(example: Example, renderer: Renderer, turns: Turns = "last") -> list[Row]:
    """The rows of one example: one, or several where all its answers are learned.

    Raises:
        TrainingError: one has no trained token, or does not train its stop token.

    """
    place = example.place
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
        example.place,
        f"is {length:,} tokens long, the limit is {longest:,}: its answer would be cut",
        "raise training.max_length (up to the base's context), shorten the row, "
        "or set training.too_long: drop",
    )
