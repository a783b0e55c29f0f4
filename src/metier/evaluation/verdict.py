"""The decision: ship a tuned arm, use the best simpler one, or neither.

The rule in words is `explain.rule`.

What an arm scored comes from the runner as `Measured`, numbers are compared in `comparison`, and
this module applies the rule. Chosen on validation: the reference, and the winner among tuned arms
that qualify. Judged on the sealed test part: whether a tuned arm qualifies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from metier.evaluation import advice, explain
from metier.evaluation.comparison import (
    Compared,
    Measured,
    arm_result,
    by_validation,
    choose_reference,
    compare,
)
from metier.evaluation.phrases import Chance, Outcome
from metier.evaluation.schema import DataSummary, Verdict
from metier.evaluation.statistics import Clusters
from metier.evaluation.units import percent
from metier.graders.labels import read_labels, write_labels
from metier.task import Task

_NEAR_ZERO = 0.02
"""A mean score up to this, where there are no labels to guess from, is as good as nothing."""
_OFTEN = 0.1
"""Share from which a text, such as an empty list, may be given as an answer without reading."""


def decide(
    task: Task,
    arms: Sequence[Measured],
    *,
    clusters: Clusters,
    expected: Sequence[str],
    labels: Sequence[str],
    data: DataSummary,
) -> Verdict:
    """Compare the arms and decide between them.

    Args:
        task: gives name, kind, margin, price of a machine hour and currency.
        arms: what was measured of each arm, at least one of them a simpler one.
        clusters: the cluster of each test example; examples of a cluster are not independent.
        expected: the expected answer of each test example.
        labels: the closed label set of a classification, else empty.
        data: what the arms were trained and judged on.

    Returns:
        the verdict, but for `command`, `made`, `seconds` and `versions`, which the caller knows.

    Raises:
        ConfigError: there is no simpler arm to compare with.
        DataError: scores are missing, not numbers, or outside 0 to 1.

    """
    trivial = chance(task, expected, labels)
    compared = compare(
        arms,
        clusters,
        margin=task.margin,
        machine_hour=task.machine_hour,
        chance=trivial.level,
    )
    reference = choose_reference(arms)
    winner = choose_winner(compared)
    outcome = Outcome(
        kind=task.kind,
        margin=task.margin,
        currency=task.currency,
        data=data,
        chance=trivial,
        arms=tuple(compared),
        reference=next(each for each in compared if each.measured is reference),
        winner=winner,
        contender=winner or _nearest(compared),
    )
    return _verdict(task, outcome)


def choose_winner(compared: Iterable[Compared]) -> Compared | None:
    """Of the tuned arms that may be shipped, the best on validation."""
    return _best(each for each in compared if each.qualifies)


def _nearest(compared: Sequence[Compared]) -> Compared | None:
    """The tuned arm to speak of: one that is barred though proven, else best on validation."""
    proven = _best(each for each in compared if each.proven)
    return proven or _best(each for each in compared if each.measured.arm.tuned)


def _best(arms: Iterable[Compared]) -> Compared | None:
    return min(arms, key=lambda each: by_validation(each.measured), default=None)


def chance(task: Task, expected: Sequence[str], labels: Sequence[str]) -> Chance:
    """What answers without understanding would score on the test part."""
    if task.kind == "multi-label" and expected:
        return _constant(expected)
    commonest = Counter(expected).most_common(1)[0][1] / len(expected) if expected else 0.0
    if task.kind != "classification" or not expected:
        level = _NEAR_ZERO
        if commonest >= _OFTEN:
            words = f"always giving the commonest answer ({percent(commonest)})"
            return Chance(commonest, words, level)
        return Chance(level, f"giving no useful answer ({percent(level)} or less)", level)
    choices = max(len(labels), len(set(expected)))
    guessing = 1 / choices
    if guessing > commonest:
        words = f"guessing among {choices} labels ({percent(guessing)})"
        return Chance(guessing, words, guessing)
    words = f"always answering the commonest label ({percent(commonest)})"
    return Chance(commonest, words, guessing)


def _constant(expected: Sequence[str]) -> Chance:
    """The commonest labels of all, whatever is asked: the best of the two simplest answers.

    By the mean F1 of a row's labels, which is what the default grader gives.
    """
    sets = [set(read_labels(answer)) for answer in expected]
    single = Counter(label for own in sets for label in own).most_common(1)
    whole = Counter(expected).most_common(1)[0][0]
    scores = {
        write_labels(answer): fmean(
            2 * len(own & answer) / (len(own) + len(answer)) if own or answer else 1.0
            for own in sets
        )
        for answer in ({label for label, _ in single}, set(read_labels(whole)))
    }
    best = max(scores, key=lambda answer: scores[answer])
    level = scores[best]
    return Chance(level, f"always answering {best} ({percent(level)})", level)


def _verdict(task: Task, outcome: Outcome) -> Verdict:
    chosen = outcome.chosen
    return Verdict(
        task=task.name,
        kind=task.kind,
        decision="ship" if outcome.winner else "use-simpler" if chosen else "none",
        arm=chosen.name if chosen else "",
        reference=outcome.reference.name,
        contender=outcome.contender.name if outcome.contender else "",
        headline=explain.headline(outcome),
        rule=explain.rule(task.margin),
        reasons=explain.reasons(outcome),
        what_would_change=advice.what_would_change(outcome),
        notes=advice.cautions(outcome),
        margin=task.margin,
        currency=task.currency,
        data=outcome.data,
        arms=tuple(arm_result(each, advice.arm_notes(each, outcome)) for each in outcome.arms),
    )
