"""The verdict in plain words: headline, rule, reasons, what would change it, and cautions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metier.evaluation import statistics, units
from metier.evaluation.comparison import Compared
from metier.evaluation.schema import DataSummary, Forgotten
from metier.task import Kind

NEAR_ZERO = 0.02
"""A mean score up to this, where there are no labels to guess from, is as good as nothing."""
ENOUGH_SEEDS = 3
_SMALL_TEST = 100
_FEW_CLUSTERS = 50
_PROMPTED = ("prompt", "few-shot", "rag")
_UNMEASURED = "What it forgot was not measured."
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
    def hopeless(self) -> bool:
        """Whether no arm at all does better than chance."""
        return all(each.score.mean <= self.chance.level for each in self.arms)


def rule(margin: float) -> str:
    """The decision rule."""
    return (
        "The reference is the simpler arm (prompt, few-shot, rag or classical, over all bases and "
        "modes) with the best validation score; of equals, the one that reads and writes fewer "
        "tokens. A tuned arm is shipped only if the lower bound of its paired gain over the "
        "reference on the sealed test part is above the margin of "
        f"{_points(margin)}; that bound counts whole clusters of examples, differences between "
        "training seeds, and Holm's correction over the tuned arms (2.5 % error in all, "
        "one-sided). The Holm-adjusted p-value of 'no difference' must be below 0.05. It must "
        "also score above every other simpler arm on the test part by more "
        "than the margin, and for every ability measured before and after tuning the upper end of "
        "the 95 % interval of the loss must lie within the tolerance. Of several such arms the "
        "best on validation is shipped; if there is none, use the reference. An arm that asks a "
        "remote model is compared and reported, but is neither the reference nor shipped."
    )


# The headline.


def headline(outcome: Outcome) -> str:
    """The decision in one sentence with its numbers."""
    reference, contender = outcome.reference, outcome.contender
    score = units.percent(reference.score.mean)
    if outcome.hopeless:
        return (
            f"Nothing works yet: the best simpler arm on validation, {reference.name}, scores "
            f"{score}, and no arm does better than {outcome.chance.words}."
        )
    if contender is None:
        return (
            f"Use {reference.name}: {score} (95 % interval {units.percent(reference.score.low)} "
            f"to {units.percent(reference.score.high)}), the best simpler arm on validation; "
            "nothing was tuned."
        )
    reached = units.percent(contender.score.mean)
    if contender is outcome.winner:
        return (
            f"Ship {contender.name}: {reached} against {score} for {reference.name}, "
            f"{_gain(contender, outcome)}{_kept(contender)}{_seeds(contender)}."
        )
    return (
        f"Use {reference.name} ({score}): {contender.name} scores {reached}, "
        f"{_gain(contender, outcome)}{_but(contender, outcome)}."
    )


def _kept(each: Compared) -> str:
    if not each.measured.forgetting:
        return "; what it forgot was not measured"
    return ", nothing forgotten beyond tolerance"


def _seeds(each: Compared) -> str:
    seeds = len(each.measured.scores)
    return "" if seeds >= ENOUGH_SEEDS else f"; trained with {_counted(seeds, 'seed')} only"


def _but(each: Compared, outcome: Outcome) -> str:
    """Why this arm is not shipped, to follow its gain."""
    if each.proven:
        if each.forgot:
            return f", but {_forgot(each.forgot)}"
        if each.not_beaten:
            return (
                f", but it does not exceed {_listed(each.not_beaten)} on the test part by more "
                f"than the margin of {_points(outcome.margin)}"
            )
    return _unproven(each, outcome)


def _unproven(each: Compared, outcome: Outcome) -> str:
    difference, margin = _difference(each), _points(outcome.margin)
    if difference.high() < 0:
        return ": it is worse"
    if difference.high() <= outcome.margin:
        return f", which is not more than the margin of {margin}"
    if difference.mean <= outcome.margin:
        return f", which shows no gain above the margin of {margin}"
    if (each.adjusted_low or 0.0) > outcome.margin:
        return ", but there are too few examples for the permutation test to confirm it"
    if difference.low() > outcome.margin:
        count = len(outcome.tuned)
        return (
            f", which, corrected for {count} tuned arms, does not prove a gain above the margin of "
            f"{margin}"
        )
    return f", which does not prove a gain above the margin of {margin}"


def _forgot(parts: Sequence[Forgotten]) -> str:
    lost = [part for part in parts if part.loss.low > part.tolerance]
    if lost:
        return f"it forgot more than the tolerance allows ({_listed(p.name for p in lost)})"
    names = _listed(part.name for part in parts)
    return f"it is not proven to have kept its abilities within tolerance ({names})"


# The reasons.


def reasons(outcome: Outcome) -> tuple[str, ...]:
    """Why each tuned arm was or was not shipped, and where a remote arm stands."""
    remote = [each for each in outcome.arms if each.measured.arm.method == "remote"]
    return (
        *(_reason(each, outcome) for each in outcome.tuned),
        *(
            f"{each.name}: {units.percent(each.score.mean)}, {_gain(each, outcome)} over "
            f"{outcome.reference.name}; reported only, the choice is between arms that run here."
            for each in remote
        ),
    )


def _reason(each: Compared, outcome: Outcome) -> str:
    opening = f"{each.name}: {'shipped' if each is outcome.winner else 'not shipped'}."
    gain = f"Gain over {outcome.reference.name} {_gain(each, outcome)}, {_bound(each, outcome)}."
    sentences = [opening, gain]
    if each.not_beaten and each.proven:
        sentences.append(
            f"It does not exceed {_listed(each.not_beaten)} on the test part by more than the "
            "margin, so the reference may not be the best simpler arm."
        )
    sentences += [_forgotten(part) for part in each.forgot]
    if each is outcome.winner:
        kept = "Nothing forgotten beyond tolerance." if each.measured.forgetting else _UNMEASURED
        sentences += [kept, _money(each, outcome)]
    elif outcome.winner and each.qualifies:
        sentences.append(
            f"It could be shipped too; {outcome.winner.name} is better on validation "
            f"({units.percent(outcome.winner.measured.validation_score)} against "
            f"{units.percent(each.measured.validation_score)})."
        )
    return " ".join(sentences)


def _bound(each: Compared, outcome: Outcome) -> str:
    low, margin = each.adjusted_low or 0.0, outcome.margin
    bound = _distinct(low, margin)
    name = "Holm-adjusted lower bound" if len(outcome.tuned) > 1 else "lower bound"
    if low > margin:
        return f"{name} {bound}, above the margin of {_points(margin)}"
    return f"{name} {bound}, not above the margin of {_points(margin)}"


def _forgotten(part: Forgotten) -> str:
    low, high, tolerance = map(_number, (part.loss.low, part.loss.high, part.tolerance))
    loss = f"worse by {_loss(part, part.loss.mean)} (95 % interval {low} to {high}, tolerance {tolerance})"
    if part.loss.low > part.tolerance:
        return f"It forgot: {part.name} is {loss}."
    return f"It is not proven to have kept {part.name}: {loss}."


def _loss(part: Forgotten, value: float) -> str:
    """A loss: in % of before where lower is better, else in points."""
    return _number(value) + (" %" if part.lower_is_better else " points")


def _number(share: float) -> str:
    """A share as a number of percent or points, without a plus."""
    return units.points(share).removeprefix("+")


def _money(each: Compared, outcome: Outcome) -> str:
    here, there = (units.money(c.cost, outcome.currency) for c in (each, outcome.reference))
    costs = f"1,000 requests cost {here} ({outcome.reference.name}: {there})"
    if each.break_even is None:
        return f"{costs}, so no saving repays the training."
    return f"{costs}, which repays the training after {each.break_even:,.0f} requests."


# What would change the answer.


def what_would_change(outcome: Outcome) -> tuple[str, ...]:
    """What would turn the decision the other way."""
    contender = outcome.contender
    if contender is None:
        return ("A tuned arm, for example lora: none was compared.",)
    bound = _distinct(contender.adjusted_low or 0.0, outcome.margin)
    if outcome.winner:
        return (f"A margin of {bound} or more would have kept {outcome.reference.name}.",)
    words = []
    if outcome.hopeless:
        words.append("A more capable base, or more training examples: no arm has learnt the task.")
    elif not contender.proven:
        words.append(_power(contender, outcome))
        if (contender.adjusted_low or 0.0) > 0:
            words.append(
                f"A margin below {bound}, set before the test part is opened, would have let "
                f"{contender.name} pass."
            )
    return (*words, *_obstacles(contender))


def _obstacles(each: Compared) -> Iterable[str]:
    """What bars an arm besides its bound."""
    for part in each.forgot:
        yield (
            f"{each.name} must keep {part.name}: a tolerance above {_loss(part, part.loss.high)} "
            f"instead of {_number(part.tolerance)} would accept what it lost; less training, or "
            "general text among the training data, loses less."
        )
    if each.proven and each.not_beaten:
        yield (
            "More validation examples, so that the reference is chosen with more certainty: "
            f"{_listed(each.not_beaten)} did about as well as {each.name} on the test part."
        )


def _power(each: Compared, outcome: Outcome) -> str:
    """Whether more data could prove the gain, and how much."""
    found, level = _difference(each), statistics.LEVEL / len(outcome.tuned)
    if outcome.data.test_clusters < 2:
        return "Test examples from more than one cluster: one says nothing about others."
    if found.high() <= outcome.margin:
        return f"{each.name} must become better: a gain above the margin is ruled out."
    if (each.adjusted_low or 0.0) > outcome.margin:
        return "More test examples: on so few, the permutation test cannot confirm the gain."
    if found.mean <= outcome.margin:
        return _must_improve(
            each, outcome, outcome.margin + statistics.detectable_gain(found, level)
        )
    needed = statistics.needed_to_decide(found, outcome.margin, level)
    proof = f"would prove a true gain of {_points(found.mean)} in 4 of 5 runs"
    if needed.examples is None or needed.seeds is None:
        return (
            f"{each.name} must become better{_or_steadier(found)}: a million test examples would "
            f"not prove a gain of {_points(found.mean)}."
        )
    size = f"About {needed.examples:,} test examples"
    if needed.seeds == found.seeds:
        return f"{size} instead of {found.examples:,} {proof}."
    alone = "alone cannot" if needed.alone is None else f"alone: about {needed.alone:,}"
    return (
        f"{size} and {needed.seeds} seeds instead of {found.examples:,} and {found.seeds} {proof} "
        f"(more test examples {alone}, since trainings differ by {_spread(found)})."
    )


def _must_improve(each: Compared, outcome: Outcome, least: float) -> str:
    room = 1 - outcome.reference.score.mean
    if room <= outcome.margin:
        return (
            f"Nothing: {outcome.reference.name} leaves only {_points(room)} to gain, and the "
            f"margin is {_points(outcome.margin)}."
        )
    found = f"this test finds a true gain of {_points(least)} in 4 of 5 runs"
    if least > room:
        found += f", and {outcome.reference.name} leaves only {_points(room)} to gain"
    return f"{each.name} must become better, and the test may be too small: {found}."


def _or_steadier(found: statistics.Effect) -> str:
    if found.training_variance <= found.examples_variance / 4:
        return ""
    return f" or steadier (trainings differ by {_spread(found)})"


def _spread(found: statistics.Effect) -> str:
    spread = math.sqrt(found.training_variance * found.seeds)
    return f"a standard deviation of {_points(spread)}"


# Cautions.


def cautions(outcome: Outcome) -> tuple[str, ...]:
    """What bears on how far the answer can be trusted."""
    return (*_of_the_test(outcome), *_of_the_bases(outcome), *_of_the_reference(outcome))


def _of_the_test(outcome: Outcome) -> Iterable[str]:
    data = outcome.data
    if data.test_openings > 1:
        yield (
            f"The sealed test part has been opened {data.test_openings} times, this time "
            "included: repeated looks make a lucky result likelier."
        )
    if data.test < _SMALL_TEST or data.test_clusters < _FEW_CLUSTERS:
        yield (
            f"The test part is small ({_counted(data.test, 'example')} in "
            f"{_counted(data.test_clusters, 'cluster')}): "
            "only large gains can be proven with it, and intervals are rough."
        )
    for each in outcome.tuned:
        if len(each.measured.scores) < ENOUGH_SEEDS:
            yield f"{each.name} {_few_seeds(len(each.measured.scores))}"


def _few_seeds(seeds: int) -> str:
    if seeds == 1:
        return (
            "was trained with one seed: its interval speaks of this one model, not of what "
            "another training would give."
        )
    return f"was trained with {seeds} seeds: how much trainings differ is hardly known."


def _of_the_bases(outcome: Outcome) -> Iterable[str]:
    prompted: dict[str, list[Compared]] = {}
    for each in outcome.arms:
        if each.measured.arm.method in _PROMPTED:
            prompted.setdefault(each.measured.arm.base, []).append(each)
    for base, arms in prompted.items():
        yield from _of_one_base(f"the base {base}" if base else "the base", arms, outcome.chance)


def _of_one_base(base: str, arms: Sequence[Compared], chance: Chance) -> Iterable[str]:
    weak = [each for each in arms if each.score.mean <= chance.level]
    if all(each.score.mean <= chance.guessing for each in arms):
        yield (
            f"{base[0].upper()}{base[1:]} cannot follow prompts at all: {_scores(arms)}, no better than "
            f"{chance.words}."
        )
    elif len(weak) == len(arms):
        yield f"Prompted, {base} does no better than {chance.words}: {_scores(arms)}."
    elif plain := [each for each in weak if each.measured.arm.method == "prompt"]:
        able = [each for each in arms if each not in weak]
        yield (
            f"With an instruction alone, {base} does no better than {chance.words}: "
            f"{_scores(plain)}; with examples, {_scores(able)}."
        )


def _scores(arms: Iterable[Compared]) -> str:
    return _listed(f"{each.name} scores {units.percent(each.score.mean)}" for each in arms)


def _of_the_reference(outcome: Outcome) -> Iterable[str]:
    for each in outcome.arms:
        if each.difference is None or each.difference.low() <= 0:
            continue
        gain = f"{each.name} scores higher than {outcome.reference.name}: {_gain(each, outcome)}"
        if each.measured.simpler:
            yield (
                f"On the test part {gain}. The reference was chosen on "
                f"{outcome.data.validation:,} validation examples; choosing on the test part "
                "would make its figures worthless."
            )
        elif each.measured.arm.method == "remote":
            yield (
                f"{gain}. Whether its price, and sending the data away, are worth it is for you "
                "to say."
            )


def arm_notes(each: Compared, outcome: Outcome) -> tuple[str, ...]:
    """What a reader must know of one arm."""
    notes = []
    if outcome.kind == "classification" and each.score.mean < outcome.chance.level:
        notes.append(f"Worse than {outcome.chance.words}.")
    if each.measured.arm.tuned:
        if len(each.measured.scores) < ENOUGH_SEEDS:
            notes.append(f"It {_few_seeds(len(each.measured.scores))}")
        if not each.measured.forgetting:
            notes.append(_UNMEASURED)
    return tuple(notes)


# Words for numbers.


def _difference(each: Compared) -> statistics.Effect:
    if each.difference is None:
        raise ValueError(f"{each.name} is the reference")
    return each.difference


def _gain(each: Compared, outcome: Outcome) -> str:
    """A difference to the reference with its interval and p-value."""
    difference = statistics.difference_interval(_difference(each))
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


def _points(share: float) -> str:
    """An amount of points without sign: 0.02 is `2.0 points`, 0.0025 is `0.25 points`."""
    value = round(share * 100, 2)
    return f"{value:.1f} points" if value == round(value, 1) or value >= 1 else f"{value} points"


def _distinct(bound: float, margin: float) -> str:
    """A bound in points with as many decimals as show on which side of the margin it lies."""
    text = ""
    for decimals in (1, 2, 3):
        text = f"{bound * 100:.{decimals}f}"
        if float(text) != round(margin * 100, 6):
            break
    return f"{text.replace('-', _MINUS)} points"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(names: Iterable[str]) -> str:
    """Names as a list in a sentence."""
    words = list(names)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
