"""Advice in plain words: what would change the answer, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from metier.evaluation import statistics, units
from metier.evaluation.comparison import Compared
from metier.evaluation.phrases import (
    ENOUGH_SEEDS,
    Chance,
    Outcome,
    bound_in_points,
    counted,
    difference_of,
    gain,
    listed,
    loss_of,
    margin_in_points,
    points,
    unmeasured,
)
from metier.evaluation.schema import Forgotten

_SMALL_TEST = 100
_FEW_CLUSTERS = 50
_GUESSED = 0.5  # the accuracy of guessing which sentence of a pair is the better one
_PROMPTED = ("prompt", "few-shot", "rag")


def what_would_change(outcome: Outcome) -> tuple[str, ...]:
    """What would turn the decision the other way."""
    contender = outcome.contender
    if contender is None:
        return ("A tuned arm, for example lora: none was compared.",)
    bound = bound_in_points(contender.adjusted_low or 0.0, outcome.margin)
    if outcome.winner:
        return (f"A margin of {bound} or more would have kept {outcome.reference.name}.",)
    words = []
    if outcome.hopeless or not contender.above_chance:
        words.append("A more capable base, or more training examples: the task is not learnt yet.")
    elif not contender.proven:
        words.append(_power(contender, outcome))
        if 0 < (contender.adjusted_low or 0.0) <= outcome.margin:
            words.append(
                f"A margin below {bound}, set before the test part is opened, would have let "
                f"{contender.name} pass."
            )
    return (*words, *_obstacles(contender))


def _obstacles(each: Compared) -> Iterable[str]:
    """What bars an arm besides its bound."""
    for part in each.forgot:
        key = "text_tolerance" if part.lower_is_better else "skill_tolerance"
        enough = math.ceil(part.loss.high * 1_000) / 1_000
        yield (
            f"{each.name} must keep {part.name}, of which it may have lost "
            f"{loss_of(part, part.loss.high)}: if you can live with that, say so with "
            f"forgetting.{key}: {enough:g} in task.yaml (now {part.tolerance:g})."
        )
    if each.forgot:
        yield (
            "A larger training.rehearsal, a smaller training.learning_rate or fewer "
            "training.epochs forget less."
        )
    if each.proven and each.not_beaten:
        yield (
            "More validation examples, so that the reference is chosen with more certainty: "
            f"{listed(each.not_beaten)} did about as well as {each.name} on the test part."
        )


def _power(each: Compared, outcome: Outcome) -> str:
    """Whether more data could prove the gain, and how much."""
    found, level = difference_of(each), statistics.LEVEL / len(outcome.tuned)
    if math.isinf(found.error):
        return "Test examples from more than one cluster: one says nothing about others."
    if found.high() <= outcome.margin:
        return f"{each.name} must become better: a gain above the margin is ruled out."
    if (each.adjusted_low or 0.0) > outcome.margin:
        return "More test examples: on so few, the permutation test cannot confirm the gain."
    if found.mean <= outcome.margin:
        return _must_improve(
            each, outcome, outcome.margin + statistics.detectable_gain(found, level)
        )
    return _more(each, statistics.needed_to_decide(found, outcome.margin, level))


def _more(each: Compared, needed: statistics.Needed) -> str:
    """How many more examples and seeds would prove a true gain equal to the one seen."""
    found = difference_of(each)
    if needed.examples is None or needed.seeds is None:
        return (
            f"{each.name} must become better{_or_steadier(found)}: a million test examples would "
            f"not prove a gain of {points(found.mean)}."
        )
    proof = f"would prove a true gain of {points(found.mean)} in 4 of 5 runs"
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
            f"Nothing: {outcome.reference.name} leaves only {points(room)} to gain, and the "
            f"margin is {margin_in_points(outcome.margin)}."
        )
    found = f"this test finds a true gain of {points(least)} in 4 of 5 runs"
    if least > room:
        found += f", and {outcome.reference.name} leaves only {points(room)} to gain"
    return f"{each.name} must become better, and the test may be too small: {found}."


def _or_steadier(found: statistics.Effect) -> str:
    if found.training_variance <= found.examples_variance / 4:
        return ""
    return f" or steadier (trainings differ by {_spread(found)})"


def _spread(found: statistics.Effect) -> str:
    spread = math.sqrt(found.training_variance * found.seeds)
    return f"a standard deviation of {points(spread)}"


def cautions(outcome: Outcome) -> tuple[str, ...]:
    """What bears on how far the answer can be trusted."""
    return (*_of_the_test(outcome), *_of_the_bases(outcome), *_of_the_reference(outcome))


def _of_the_test(outcome: Outcome) -> Iterable[str]:
    data = outcome.data
    if data.test_openings > 1:
        seen = f" ({data.test_rows_seen:,} of its {counted(data.test, 'example')} were seen before)"
        yield (
            f"The sealed test part has been opened {data.test_openings} times, this time "
            f"included{seen if data.test_rows_seen else ''}: repeated looks make a lucky result "
            "likelier."
        )
    if data.test < _SMALL_TEST or data.test_clusters < _FEW_CLUSTERS:
        yield (
            f"The test part is small ({counted(data.test, 'example')} in "
            f"{counted(data.test_clusters, 'cluster')}): "
            "only large gains can be proven with it, and intervals are rough."
        )
    for each in outcome.tuned:
        if len(each.measured.scores) < ENOUGH_SEEDS:
            yield f"{each.name} {_few_seeds(len(each.measured.scores))}"


def over_budget(seconds: float, minutes: float) -> tuple[str, ...]:
    """That a run took longer than it was allowed to, if it did."""
    if seconds <= minutes * 60:
        return ()
    took, budget = units.seconds(seconds), units.seconds(minutes * 60)
    return (
        f"The run took {took} of a budget of {budget}: only the estimate before it is held to the "
        "budget.",
    )


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
    weak = [each for each in arms if not each.above_chance]
    if all(each.score.mean <= chance.guessing for each in arms):
        yield (
            f"{base[0].upper()}{base[1:]} cannot follow prompts at all: {_scores(arms)}, "
            f"no better than {chance.words}."
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
    return listed(f"{each.name} scores {units.percent(each.score.mean)}" for each in arms)


def _of_the_reference(outcome: Outcome) -> Iterable[str]:
    for each in outcome.arms:
        if each.difference is None or each.difference.low() <= 0:
            continue
        words = f"{each.name} scores higher than {outcome.reference.name}: {gain(each, outcome)}"
        if each.measured.simpler:
            yield (
                f"On the test part {words}. The reference was chosen on "
                f"{outcome.data.validation:,} validation examples; choosing on the test part "
                "would make its figures worthless."
            )
        elif each.measured.arm.method == "remote":
            yield (
                f"{words}. Whether its price, and sending the data away, are worth it is for you "
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
            notes.append(unmeasured(each))
        notes += [_unseen(part) for part in each.measured.forgetting if _near_chance(part)]
    return tuple(notes)


def _near_chance(part: Forgotten) -> bool:
    return not part.lower_is_better and part.before.low <= _GUESSED


def _unseen(part: Forgotten) -> str:
    return (
        f"Whether it forgot {part.name} cannot be seen: its base, at "
        f"{units.percent(part.before.mean)} (95 % interval {units.percent(part.before.low)} to "
        f"{units.percent(part.before.high)}), does no better there than guessing (50 %)."
    )
