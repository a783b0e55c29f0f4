"""The documented shape of verdict.json and of the details that the report draws.

The JSON Schema is written by `Verdict.model_json_schema()`.
"""

from __future__ import annotations

from typing import Literal

from metier.config import Config


class Estimate(Config):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class SeedResult(Config):
    """One training of a tuned arm."""

    seed: int
    test_score: float
    validation_loss: float
    steps: int
    seconds: float


class Forgotten(Config):
    """One general ability before and after tuning."""

    name: str
    """What was measured: `text: <name>` in bits per byte, or `skill: <name>` as accuracy."""
    unit: str
    lower_is_better: bool
    before: Estimate
    after: Estimate
    loss: Estimate
    """How much worse it became (positive is worse), in the units of `tolerance`."""
    tolerance: float
    holds: bool
    """Non-inferiority: the upper bound of the loss is within the tolerance."""


class ArmResult(Config):
    """One arm on the sealed test part."""

    arm: str
    method: str
    mode: str
    base: str
    tuned: bool
    score: Estimate
    metrics: dict[str, float] = {}
    """Further metrics of the task, e.g. macro_f1, valid_json, invalid_answers."""
    validation_score: float
    difference: Estimate | None = None
    """Paired difference to the reference; None for the reference itself."""
    p_value: float | None = None
    """Two-sided, of 'no difference to the reference'."""
    p_adjusted: float | None = None
    """`p_value`, Holm-corrected over the tuned arms; None for other arms."""
    p_margin: float | None = None
    """One-sided, of 'the gain is at most the margin', Holm-corrected over the tuned arms: below
    0.025 exactly when `adjusted_low` is above the margin."""
    adjusted_low: float | None = None
    """Holm-adjusted lower bound of the difference to the reference, for one-sided error 2.5 % over
    all tuned arms: the largest margin this arm would clear."""
    test: str = ""
    """Which test gave the p-value."""
    seeds: tuple[SeedResult, ...] = ()
    latency_p50: float
    """Seconds for one request alone."""
    latency_p95: float
    prompt_tokens: float
    """Mean per request."""
    completion_tokens: float
    training_seconds: float = 0.0
    """Mean per seed."""
    peak_memory: int = 0
    """Bytes, of the process, at its highest."""
    cost_per_1000: float = 0.0
    break_even_requests: float | None = None
    """Requests after which training has paid for itself against the reference; None: never."""
    forgetting: tuple[Forgotten, ...] = ()
    notes: tuple[str, ...] = ()
    """Plain words on what a reader must know, e.g. that the base cannot follow prompts."""


class DataSummary(Config):
    """What the arms were trained and judged on."""

    train: int
    validation: int
    test: int
    test_clusters: int
    removed: dict[str, int] = {}
    """Rows left out, by reason code."""
    test_openings: int = 1
    """How often the sealed part has been opened, this time included."""
    warnings: tuple[str, ...] = ()


class Verdict(Config):
    """The decision between arms with its evidence."""

    version: Literal[1] = 1
    task: str
    kind: str
    decision: Literal["ship", "use-simpler"]
    arm: str
    """The arm to use."""
    reference: str
    """The best simpler arm, chosen on validation."""
    headline: str
    """The decision in one sentence, with its numbers."""
    rule: str
    """The decision rule in words."""
    reasons: tuple[str, ...]
    """Why each tuned arm was or was not shipped."""
    what_would_change: tuple[str, ...] = ()
    """What would change the answer: test examples needed, seeds, tolerance."""
    notes: tuple[str, ...] = ()
    """Plain words on how far the answer can be trusted: a small test part, a test part opened
    before, few seeds, a base that cannot follow prompts."""
    contender: str = ""
    """The tuned arm the decision turned on: the one shipped, else the one nearest to it; empty
    where none was tuned."""
    margin: float
    """What the gain of a tuned arm must exceed, as a share of 1."""
    currency: str
    data: DataSummary
    arms: tuple[ArmResult, ...]
    command: str = ""
    made: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = {}


class Sample(Config):
    """One test example as answered by an arm and by the reference."""

    id: str
    input: str
    expected: str
    answer: str
    score: float
    explanation: str = ""
    reference_answer: str = ""
    reference_score: float = 0.0


class CurvePoint(Config):
    """One evaluation during training."""

    step: int
    train_loss: float
    validation_loss: float


class ArmDetails(Config):
    """What the report draws for one arm."""

    arm: str
    won: tuple[Sample, ...] = ()
    """Up to ten examples this arm answers better than the reference."""
    lost: tuple[Sample, ...] = ()
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, int, int], ...] = ()
    """(row of the true label, row of the answered label, count); the answer may be past the last
    label: no valid label."""
    curves: tuple[tuple[CurvePoint, ...], ...] = ()
    """One learning curve per seed."""
