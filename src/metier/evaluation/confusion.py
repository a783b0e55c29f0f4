"""Which labels an arm confuses: counts per label, the worst pairs, and a heat map as inline SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from metier.evaluation.schema import ArmDetails
from metier.evaluation.svg import add, element, markup

if TYPE_CHECKING:
    from markupsafe import Markup

NO_LABEL = "no valid label"
MOST_LABELS = 100
"""Labels drawn at most; with more, those with the most mistakes."""
_MOST_PAIRS = 12
_LONGEST_NAME = 26


@dataclass(frozen=True)
class LabelCount:
    """How the test examples of one label were answered."""

    label: str
    total: int
    right: int
    mistaken_for: str
    """The most frequent wrong answer, or empty."""
    mistaken: int
    """How often that one was given."""


@dataclass(frozen=True)
class Pair:
    """One label answered as another."""

    expected: str
    answered: str
    count: int
    total: int
    """Test examples of the expected label."""


@dataclass(frozen=True)
class Confusion:
    """What the report shows of one arm's answers per label."""

    labels: tuple[LabelCount, ...]
    """Labels with the most mistakes first."""
    pairs: tuple[Pair, ...]
    """The most frequent mistakes first, at most twelve."""
    heat_map: Markup
    mistakes: int
    total: int
    """Test examples, and how many of them were answered wrongly."""
    undrawn: int
    """Labels that the heat map leaves out because it holds at most `MOST_LABELS`."""


def confusion_of(details: ArmDetails) -> Confusion | None:
    """Counts, worst pairs and heat map of an arm; None where there are no labels."""
    if not details.labels or not details.confusion:
        return None
    counts: Counter[tuple[str, str]] = Counter()
    for expected, answered, number in details.confusion:
        counts[details.labels[expected], _name(details.labels, answered)] += number
    labels = sorted(
        (_count(label, counts) for label in details.labels),
        key=lambda row: (row.right - row.total, row.total == 0, row.label),
    )
    return Confusion(
        labels=tuple(labels),
        pairs=_worst_pairs(counts, {row.label: row.total for row in labels}),
        heat_map=heat_map(details.arm, labels[:MOST_LABELS], counts),
        mistakes=sum(row.total - row.right for row in labels),
        total=sum(row.total for row in labels),
        undrawn=max(len(labels) - MOST_LABELS, 0),
    )


def _name(labels: Sequence[str], index: int) -> str:
    return labels[index] if index < len(labels) else NO_LABEL


def _count(label: str, counts: Counter[tuple[str, str]]) -> LabelCount:
    answers = {
        answered: number
        for (expected, answered), number in counts.items()
        if expected == label and number
    }
    right = answers.pop(label, 0)
    wrong = min(answers, key=lambda answered: (-answers[answered], answered), default="")
    return LabelCount(label, right + sum(answers.values()), right, wrong, answers.get(wrong, 0))


def _worst_pairs(counts: Counter[tuple[str, str]], totals: dict[str, int]) -> tuple[Pair, ...]:
    wrong = [(pair, number) for pair, number in counts.items() if pair[0] != pair[1] and number]
    wrong.sort(key=lambda item: (-item[1], item[0]))
    return tuple(
        Pair(expected, answered, number, totals[expected])
        for (expected, answered), number in wrong[:_MOST_PAIRS]
    )


def heat_map(arm: str, labels: Sequence[LabelCount], counts: Counter[tuple[str, str]]) -> Markup:
    """Rows are the expected labels, columns the answers; darker is a larger share of the row.

    Right answers (the diagonal) and mistakes have different hues. Cells that are large enough
    carry their count; every cell says in its title what it counts.
    """
    answers = [row.label for row in labels]
    if any(counts[row.label, NO_LABEL] for row in labels) and NO_LABEL not in answers:
        answers.append(NO_LABEL)
    cell = 30 if len(labels) <= 12 else 20 if len(labels) <= 40 else 11
    left = min(max(len(name) for name in answers), _LONGEST_NAME) * 6 + 12
    top = left
    width, height = left + cell * len(answers) + 52, top + cell * len(labels) + 6
    svg = element(
        "svg",
        class_="heat",
        role="img",
        width=round(width),
        height=round(height),
        viewBox=f"0 0 {round(width)} {round(height)}",
    )
    add(svg, "title", f"{arm}: expected labels (rows) against answers (columns)")
    add(svg, "desc", "The same counts stand in the table of all labels below.")
    grid = add(svg, "g", transform=f"translate({left:g},{top:g})")
    _names(grid, labels, answers, cell)
    for row, label in enumerate(labels):
        _cells(grid, row, label, answers, counts, cell)
    return markup(svg)


def _names(grid: Element, labels: Sequence[LabelCount], answers: Sequence[str], cell: int) -> None:
    width, height = cell * len(answers), cell * len(labels)
    add(grid, "rect", width=width, height=height, class_="ground")
    for row, label in enumerate(labels):
        middle = (row + 0.5) * cell
        add(grid, "text", _short(label.label), x=-7, y=middle, dy="0.35em", text_anchor="end")
        add(
            grid,
            "text",
            f"{label.right}/{label.total}",
            x=width + 7,
            y=middle,
            dy="0.35em",
            class_="right",
        )
        add(grid, "path", d=f"M0,{(row + 1) * cell}h{width}", class_="grid")
    for column, answer in enumerate(answers):
        add(
            grid,
            "text",
            _short(answer),
            dy="0.35em",
            transform=f"translate({(column + 0.5) * cell:g},-7) rotate(-90)",
        )
        add(grid, "path", d=f"M{(column + 1) * cell},0v{height}", class_="grid")


def _cells(
    grid: Element,
    row: int,
    label: LabelCount,
    answers: Sequence[str],
    counts: Counter[tuple[str, str]],
    cell: int,
) -> None:
    for column, answer in enumerate(answers):
        number = counts[label.label, answer]
        if not number:
            continue
        shade = 1 + min(int(number / label.total * 5), 4)
        kind = "hit" if answer == label.label else "miss"
        square = add(
            grid,
            "rect",
            x=column * cell,
            y=row * cell,
            width=cell,
            height=cell,
            class_=f"{kind} s{shade}",
        )
        add(square, "title", f"{label.label} → {answer}: {number} of {label.total}")
        if cell >= 20:
            add(
                grid,
                "text",
                str(number),
                x=(column + 0.5) * cell,
                y=(row + 0.5) * cell,
                dy="0.35em",
                text_anchor="middle",
                class_=f"number s{shade}",
            )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
