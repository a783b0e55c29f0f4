"""The verdict in plain words: the rule, the headline, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence

from metier.evaluation import units
from metier.evaluation.comparison import Compared
from metier.evaluation.phrases import (
    ENOUGH_SEEDS,
    Outcome,
    bound_in_points,
    counted,
    difference_of,
    gain,
    listed,
    loss_of,
    margin_in_points,
    number,
    unmeasured,
)
from metier.evaluation.schema import Forgotten


def rule(margin: float) -> str:
    """The decision rule."""
    return (
        "The reference is the simpler arm (prompt, few-shot, rag or classical, over all bases and "
        "modes) with the best validation score; of equals, the one that reads and writes fewer "
        "tokens. A tuned arm is shipped only if three things hold. First, the lower bound of its "
        "paired gain over the reference on the sealed test part is above the margin of "
        f"{margin_in_points(margin)}, and the p-value of 'no difference' is below 0.05; bound and "
        "p-value count whole clusters of examples, differences between training seeds, and Holm's "
        "correction over the tuned arms (2.5 % error in all, one-sided). Second, its gain over "
        "every other simpler arm is above the margin, too (lower bound with 10 % error: validation "
        "may have chosen a wrong reference), and it scores above answers without any "
        "understanding, such as always the commonest label. Third, for every ability "
        "measured before and after tuning, the upper end of the 95 % interval of the loss lies "
        "within the tolerance; an arm that answers by a head is not held to this, since it "
        "cannot write text. Of several such arms the best on validation is shipped; if there "
        "is none, use the reference, and if that does no better than answers without any "
        "understanding, nothing yet. An arm that asks a remote model is compared and reported, "
        "but is neither the reference nor shipped."
    )


def headline(outcome: Outcome) -> str:
    """The decision in one sentence with its numbers."""
    reference, contender = outcome.reference, outcome.contender
    score = units.percent(reference.score.mean)
    if outcome.hopeless:
        return (
            f"Nothing works yet: the best simpler arm on validation, {reference.name}, scores "
            f"{score}, and no arm does better than {outcome.chance.words}."
        )
    if outcome.chosen is None:
        return f"Nothing can be shipped yet: {_nothing(outcome)}."
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
            f"{gain(contender, outcome)}{_kept(contender)}{_seeds(contender)}."
        )
    return (
        f"Use {reference.name} ({score}): {contender.name} scores {reached}, "
        f"{gain(contender, outcome)}{_but(contender, outcome)}."
    )


def _nothing(outcome: Outcome) -> str:
    """Why no arm is good enough though one of them does better than chance."""
    reference, contender = outcome.reference, outcome.contender
    simpler = (
        f"the best simpler arm on validation, {reference.name} "
        f"({units.percent(reference.score.mean)}), does no better than {outcome.chance.words}"
    )
    if contender is None:
        return f"{simpler}; nothing was tuned"
    return (
        f"{contender.name} scores {units.percent(contender.score.mean)}, "
        f"{gain(contender, outcome)}{_but(contender, outcome)}; {simpler}"
    )


def _kept(each: Compared) -> str:
    if each.measured.arm.headed:
        return "; a head writes no text, so it is not held to the rule on forgetting"
    if not each.measured.forgetting:
        return "; what it forgot was not measured"
    return ", nothing forgotten beyond tolerance"


def _seeds(each: Compared) -> str:
    seeds = len(each.measured.scores)
    return "" if seeds >= ENOUGH_SEEDS else f"; trained with {counted(seeds, 'seed')} only"


def _but(each: Compared, outcome: Outcome) -> str:
    """Why this arm is not shipped, to follow its gain."""
    if each.proven:
        if not each.above_chance:
            return f", but it does no better than {outcome.chance.words}"
        if each.forgot:
            return f", but {_forgot(each.forgot)}"
        if each.not_beaten:
            return f", but it is not clearly better than {listed(each.not_beaten)} on the test part"
    return _unproven(each, outcome)


def _unproven(each: Compared, outcome: Outcome) -> str:
    difference, margin = difference_of(each), margin_in_points(outcome.margin)
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
        return f"it forgot more than the tolerance allows ({listed(p.name for p in lost)})"
    names = listed(part.name for part in parts)
    return f"it is not proven to have kept its abilities within tolerance ({names})"


def reasons(outcome: Outcome) -> tuple[str, ...]:
    """Why each tuned arm was or was not shipped, and where a remote arm stands."""
    remote = [each for each in outcome.arms if each.measured.arm.method == "remote"]
    return (
        *(_reason(each, outcome) for each in outcome.tuned),
        *(
            f"{each.name}: {units.percent(each.score.mean)}, {gain(each, outcome)} over "
            f"{outcome.reference.name}; reported only, the choice is between arms that run here."
            for each in remote
        ),
    )


def _reason(each: Compared, outcome: Outcome) -> str:
    over = outcome.reference.name
    opening = f"{each.name}: {'shipped' if each is outcome.winner else 'not shipped'}."
    sentences = [opening, f"Gain over {over} {gain(each, outcome)}, {_bound(each, outcome)}."]
    if each.not_beaten and each.proven:
        sentences.append(
            f"It is not clearly better than {listed(each.not_beaten)} on the test part: the "
            "reference may not be the best simpler arm."
        )
    if each.proven and not each.above_chance:
        sentences.append(f"It does no better than {outcome.chance.words}.")
    if not each.proven and (each.adjusted_low or 0.0) > outcome.margin:
        sentences.append("On so few examples the permutation test does not confirm it.")
    sentences += [_forgotten(part) for part in each.forgot]
    if each is outcome.winner:
        kept = (
            "Nothing forgotten beyond tolerance." if each.measured.forgetting else unmeasured(each)
        )
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
    bound = bound_in_points(low, margin)
    name = "Holm-adjusted lower bound" if len(outcome.tuned) > 1 else "lower bound"
    if low > margin:
        return f"{name} {bound}, above the margin of {margin_in_points(margin)}"
    return f"{name} {bound}, not above the margin of {margin_in_points(margin)}"


def _forgotten(part: Forgotten) -> str:
    low, high, tolerance = map(number, (part.loss.low, part.loss.high, part.tolerance))
    loss = f"worse by {loss_of(part, part.loss.mean)}"
    loss += f" (95 % interval {low} to {high}, tolerance {tolerance})"
    if part.loss.low > part.tolerance:
        return f"It forgot: {part.name} is {loss}."
    return f"It is not proven to have kept {part.name}: {loss}."


def _money(each: Compared, outcome: Outcome) -> str:
    here, there = (units.money(c.cost, outcome.currency) for c in (each, outcome.reference))
    costs = f"1,000 requests cost {here} ({outcome.reference.name}: {there})"
    if each.break_even is None:
        return f"{costs}, so no saving repays the training."
    return f"{costs}, which repays the training after {each.break_even:,.0f} requests."
