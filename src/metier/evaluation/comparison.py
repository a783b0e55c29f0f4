"""Every arm against the reference: scores, paired differences, costs. Numbers, no decision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from metier.errors import ConfigError, DataError
from metier.evaluation import statistics
from metier.evaluation.schema import ArmResult, Estimate, Forgotten, SeedResult
from metier.task import METHODS, SIMPLER_METHODS, Arm

LOOSE_LEVEL = 0.1
"""One-sided error of the bounds over simpler arms that validation did not choose. They only guard
against a wrong choice: by simulation (benchmarks/calibration.py) this is enough to keep false
shipments rare where validation errs, and costs hardly any power."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What the runner measured of one arm.

    Attributes:
        arm: which arm.
        scores: between 0 and 1 on the sealed test part, shape (seeds, examples); one row for an
            arm that is not trained with seeds.
        validation: the same on the validation part, shape (seeds, validation examples).
        latency_mean: seconds for one request alone.
        latency_p50: the same, median.
        latency_p95: the same, 95th percentile.
        prompt_tokens: mean per request.
        completion_tokens: mean per request.
        metrics: further metrics of the task.
        seeds: one result per training of a tuned arm.
        latency_requests: how many requests were timed.
        training_seconds: of one training, mean over seeds.
        peak_memory: bytes of the whole process.
        token_prices: of a million prompt and a million written tokens, where an endpoint bills
            them; None: the time of this machine is what a request costs.
        forgetting: general abilities before and after tuning.
        notes: what a reader must know of how it was measured.

    """

    arm: Arm
    scores: statistics.Floats
    validation: statistics.Floats
    latency_mean: float
    latency_p50: float
    latency_p95: float
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[SeedResult, ...] = ()
    latency_requests: int = 0
    training_seconds: float = 0.0
    peak_memory: int = 0
    token_prices: tuple[float, float] | None = None
    forgetting: tuple[Forgotten, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def validation_score(self) -> float:
        """Mean over seeds and validation examples: what choices are made on."""
        return float(self.validation.mean())

    @property
    def simpler(self) -> bool:
        """Whether it may be the reference."""
        return self.arm.method in SIMPLER_METHODS


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """One arm against the reference; for the reference itself all comparisons are None.

    Attributes:
        measured: what was measured.
        score: mean test score.
        difference: paired difference to the reference.
        tested: two-sided test of 'no difference'.
        p_adjusted: its p-value, Holm-corrected; tuned arms only.
        p_margin: Holm-corrected one-sided p-value of 'the gain is at most the margin'.
        adjusted_low: Holm-adjusted lower bound of the gain.
        proven: whether that bound is above the margin and `p_adjusted` below 5 %: on few clusters
            the bound, from Student's t, alone would be too hopeful.
        not_beaten: simpler arms beside the reference over which its gain is not above the margin,
            by a bound with an error of 10 %.
        above_chance: whether it scores above answers without any understanding.
        cost: of 1,000 requests.
        break_even: requests after which all trainings of this arm have paid for themselves.

    """

    measured: Measured
    score: Estimate
    difference: statistics.Effect | None = None
    tested: statistics.Tested | None = None
    p_adjusted: float | None = None
    p_margin: float | None = None
    adjusted_low: float | None = None
    proven: bool = False
    not_beaten: tuple[str, ...] = ()
    above_chance: bool = True
    cost: float = 0.0
    break_even: float | None = None

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.measured.arm.name

    @property
    def forgot(self) -> tuple[Forgotten, ...]:
        """Abilities that are not proven to be kept within their tolerance."""
        return tuple(part for part in self.measured.forgetting if not part.holds)

    @property
    def qualifies(self) -> bool:
        """Whether the rule allows this arm to be shipped."""
        return self.proven and self.above_chance and not self.forgot and not self.not_beaten


def choose_reference(arms: Sequence[Measured]) -> Measured:
    """The simpler arm with the best validation score.

    Raises:
        ConfigError: there is no simpler arm.

    """
    simpler = [arm for arm in arms if arm.simpler]
    if not simpler:
        raise ConfigError(
            "arms",
            "hold no simpler arm to compare with",
            f"add one of {', '.join(SIMPLER_METHODS)}",
        )
    return min(simpler, key=by_validation)


def by_validation(arm: Measured) -> tuple[float, float, int, str]:
    """Sort key, best first; of equals, the one that reads and writes fewer tokens."""
    return (
        -round(arm.validation_score, 9),
        arm.prompt_tokens + arm.completion_tokens,
        METHODS.index(arm.arm.method),
        arm.arm.name,
    )


def compare(
    arms: Sequence[Measured],
    clusters: statistics.Clusters,
    *,
    margin: float,
    machine_hour: float,
    chance: float,
) -> list[Compared]:
    """Compare every arm with the reference, in the order given.

    Args:
        arms: what was measured; exactly these tuned arms are corrected for.
        clusters: the cluster of each test example.
        margin: what a gain must exceed.
        machine_hour: price of one hour of this machine.
        chance: mean score of answers without any understanding.

    Raises:
        ConfigError: there is no simpler arm.
        DataError: scores are missing, not numbers, or outside 0 to 1.

    """
    for arm in arms:
        _check(arm, len(clusters))
    reference, index = choose_reference(arms), statistics.cluster_index(clusters)
    found = [_against(arm, reference, index, machine_hour) for arm in arms]
    others = [arm for arm in arms if arm.simpler and arm is not reference]
    found = [
        replace(each, not_beaten=_not_beaten(each.measured, others, index, margin))
        for each in found
    ]
    found = [replace(each, above_chance=each.score.mean > chance) for each in found]
    return _corrected(found, margin)


def _check(arm: Measured, examples: int) -> None:
    place = f"scores of the arm '{arm.arm.name}'"
    if arm.scores.ndim != 2 or arm.scores.shape[1] != examples or not arm.scores.size:
        raise DataError(
            place,
            f"have the shape {arm.scores.shape} for {examples} test examples",
            "score every test example once per seed",
        )
    if not arm.validation.size:
        raise DataError(
            place, "are missing for the validation part", "score the validation part, too"
        )
    for values in (arm.scores, arm.validation):
        wrong = values[~((values >= 0) & (values <= 1))]
        if wrong.size:
            raise DataError(
                place, f"hold {wrong[0]}", "let the grader return a number between 0 and 1"
            )


def _against(
    arm: Measured, reference: Measured, clusters: statistics.Clusters, machine_hour: float
) -> Compared:
    score = statistics.mean_score(arm.scores, clusters)
    cost = _cost_per_1000(arm, machine_hour)
    if arm is reference:
        return Compared(arm, score, cost=cost)
    saving = (_cost_per_1000(reference, machine_hour) - cost) / 1_000
    training = arm.training_seconds * len(arm.scores) * machine_hour / 3_600
    return Compared(
        arm,
        score,
        difference=statistics.paired_difference(arm.scores, reference.scores, clusters),
        tested=statistics.difference_test(arm.scores, reference.scores, clusters),
        cost=cost,
        break_even=training / saving if arm.arm.tuned and saving > 0 else None,
    )


def _cost_per_1000(arm: Measured, machine_hour: float) -> float:
    """Price of 1,000 requests answered one after the other."""
    if arm.token_prices is not None:
        prompt, completion = arm.token_prices
        return (arm.prompt_tokens * prompt + arm.completion_tokens * completion) / 1_000
    return arm.latency_mean * 1_000 / 3_600 * machine_hour


def _not_beaten(
    arm: Measured, others: Iterable[Measured], clusters: statistics.Clusters, margin: float
) -> tuple[str, ...]:
    """Guards against a reference that validation chose wrongly."""
    if not arm.arm.tuned:
        return ()
    gains = {
        other.arm.name: statistics.paired_difference(arm.scores, other.scores, clusters)
        for other in others
    }
    return tuple(name for name, gain in gains.items() if gain.low(LOOSE_LEVEL) <= margin)


def _corrected(found: list[Compared], margin: float) -> list[Compared]:
    """Add Holm's correction over the tuned arms."""
    tuned = [each for each in found if each.measured.arm.tuned]
    differences = [each.difference for each in tuned if each.difference]
    p_values = statistics.holm([each.tested.p_value for each in tuned if each.tested])
    margins = statistics.holm([difference.p_at_most(margin) for difference in differences])
    lows = statistics.holm_low(differences)
    for each, p, p_margin, low in zip(tuned, p_values, margins, lows, strict=True):
        found[found.index(each)] = replace(
            each,
            p_adjusted=p,
            p_margin=p_margin,
            adjusted_low=max(low, -1.0),
            proven=low > margin and p < 2 * statistics.LEVEL,
        )
    return found


def arm_result(each: Compared, notes: Sequence[str]) -> ArmResult:
    """The entry of this arm in verdict.json."""
    measured, arm = each.measured, each.measured.arm
    difference = each.difference
    return ArmResult(
        arm=arm.name,
        method=arm.method,
        mode=arm.mode,
        base=arm.base,
        tuned=arm.tuned,
        score=each.score,
        metrics=dict(measured.metrics),
        validation_score=measured.validation_score,
        difference=statistics.difference_interval(difference) if difference else None,
        p_value=each.tested.p_value if each.tested else None,
        p_adjusted=each.p_adjusted,
        p_margin=each.p_margin,
        adjusted_low=each.adjusted_low,
        test=each.tested.test if each.tested else "",
        seeds=measured.seeds,
        latency_mean=measured.latency_mean,
        latency_p50=measured.latency_p50,
        latency_p95=measured.latency_p95,
        latency_requests=measured.latency_requests,
        prompt_tokens=measured.prompt_tokens,
        completion_tokens=measured.completion_tokens,
        training_seconds=measured.training_seconds,
        peak_memory=measured.peak_memory,
        cost_per_1000=each.cost,
        break_even_requests=each.break_even,
        forgetting=measured.forgetting,
        notes=(*measured.notes, *notes),
    )
