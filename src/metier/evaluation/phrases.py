"""What there is to explain, and the phrases that every explanation is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from metier.evaluation import statistics, units
from metier.evaluation.comparison import Compared
from metier.evaluation.schema import DataSummary, Forgotten
from metier.task import Kind

ENOUGH_SEEDS = 3
_UNMEASURED = "What it forgot was not measured."
_HEAD = (
    "It is not held to the rule on forgetting: the model under its head was changed, too, but it "
    "cannot write text."
)
_MINUS = "\u2212"


@dataclass(frozen=True, slots=True)
class Chance:
    """What answers without any understanding would score.

    Attributes:
        level: mean test score, 0 to 1, of the best such answers.
        words: which answers those are.
        guessing: mean test score of guessing blindly; not above `level`.

    """

    level: float
    words: str
    guessing: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is to explain.

    Attributes:
        kind: of the task.
        margin: what a gain must exceed.
        currency: of all prices.
        data: what the arms were judged on.
        chance: what answers without understanding would score.
        arms: every arm, compared.
        reference: the best simpler arm on validation.
        winner: the tuned arm to ship, if any.
        contender: the tuned arm the decision turned on: the winner, else the one nearest to it.

    """

    kind: Kind
    margin: float
    currency: str
    data: DataSummary
    chance: Chance
    arms: tuple[Compared, ...]
    reference: Compared
    winner: Compared | None
    contender: Compared | None

    @property
    def tuned(self) -> tuple[Compared, ...]:
        """The tuned arms: Holm's correction is over these."""
        return tuple(each for each in self.arms if each.measured.arm.tuned)

    @property
    def chosen(self) -> Compared | None:
        """The arm to use: the winner, else the reference if it does better than chance."""
        return self.winner or (self.reference if self.reference.above_chance else None)

    @property
    def hopeless(self) -> bool:
        """Whether no arm at all does better than chance."""
        return not any(each.above_chance for each in self.arms)


def difference_of(each: Compared) -> statistics.Effect:
    """The paired difference of an arm that is not the reference."""
    if each.difference is None:
        raise ValueError(f"{each.name} is the reference")
    return each.difference


def gain(each: Compared, outcome: Outcome) -> str:
    """A difference to the reference with its interval and p-value."""
    difference = statistics.difference_interval(difference_of(each))
    p_value = each.tested.p_value if each.tested else None
    name = "p"
    if each.p_adjusted is not None:
        p_value = each.p_adjusted
        name = "Holm-adjusted p" if len(outcome.tuned) > 1 else "p"
    text = units.probability(p_value)
    relation = text if text[0] in "<>" else f"= {text}"
    return (
        f"{units.points(difference.mean)} points (95 % interval {units.points(difference.low)} "
        f"to {units.points(difference.high)}, {name} {relation})"
    )


def points(share: float) -> str:
    """An amount of points without sign: 0.0432 is `4.3 points`."""
    return f"{share * 100:.1f} points"


def margin_in_points(margin: float) -> str:
    """A margin in points, with all its decimals: 0.02 is `2.0 points`, 0.0025 `0.25 points`."""
    value = round(margin * 100, 6)
    return points(margin) if value == round(value, 1) else f"{value:g} points"


def bound_in_points(bound: float, margin: float) -> str:
    """A bound in points with as many decimals as show on which side of the margin it lies."""
    text = ""
    for decimals in (1, 2, 3):
        text = f"{bound * 100:.{decimals}f}"
        if float(text) != round(margin * 100, 6):
            break
    return f"{text.replace('-', _MINUS)} points"


def counted(amount: int, noun: str) -> str:
    """A number of things: `1 seed`, `1,204 examples`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """Names as a list in a sentence."""
    words = list(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def unmeasured(each: Compared) -> str:
    """Why nothing is said of what a tuned arm forgot."""
    return _HEAD if each.measured.arm.headed else _UNMEASURED


def loss_of(part: Forgotten, value: float) -> str:
    """A loss: in % of before where lower is better, else in points."""
    return number(value) + (" %" if part.lower_is_better else " points")


def number(share: float) -> str:
    """A share as a number of percent or points, without a plus."""
    return units.points(share).removeprefix("+")
