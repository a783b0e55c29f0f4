"""The documented shape of verdict.json and of the details that the report draws.

The JSON Schema is written by `Verdict.model_json_schema()`.
"""

from __future__ import annotations

from typing import Literal

from metier.config import Config


class Estimate(Config):
    """A mean with its 95 % confidence interval."""

    mean: float
    """The mean."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


class SeedResult(Config):
    """One training of a tuned arm."""

    seed: int
    """Of the adapter's start, the order of rows and dropout."""
    test_score: float
    """Mean over the test examples, 0 to 1."""
    validation_loss: float
    """Nats per trained token, of the parameters that were kept."""
    steps: int
    """Optimiser steps."""
    seconds: float
    """Training time."""


class Forgotten(Config):
    """One general ability before and after tuning."""

    name: str
    """What was measured: `text: <name>` in bits per byte, or `skill: <name>` as accuracy."""
    unit: str
    """Unit of `before` and `after`."""
    lower_is_better: bool
    """Whether a smaller figure is the better one."""
    before: Estimate
    """The base."""
    after: Estimate
    """The tuned model."""
    loss: Estimate
    """How much worse it became (positive is worse), in the units of `tolerance`."""
    tolerance: float
    """Largest loss that is accepted."""
    holds: bool
    """Non-inferiority: the upper bound of the loss is within the tolerance."""


class ArmResult(Config):
    """One arm on the sealed test part."""

    arm: str
    """Its name: method, mode and base."""
    method: str
    """prompt, few-shot, rag, classical, remote, or a way of tuning such as lora or lora+rag."""
    mode: str
    """How it answers: text, likelihood (labels scored), head (classification head) or tags (a class
    for each token)."""
    base: str
    """The base, where several are compared."""
    tuned: bool
    """Whether a language model was trained for it."""
    score: Estimate
    """Mean test score, 0 to 1; over all seeds for a tuned arm."""
    metrics: dict[str, float] = {}
    """Further metrics of the task, e.g. macro_f1, valid_json, invalid_answers. Of arms that give
    probabilities, ece: the expected calibration error over 15 bins of equally many answers, and
    ece_uncalibrated: the same before calibration."""
    validation_score: float
    """Mean validation score, 0 to 1: what choices were made on."""
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
    """One result per training of a tuned arm."""
    latency_mean: float | None = None
    """Seconds for one request alone; None where it was not recorded, and cost rests on the median.
    """
    latency_p50: float
    """Seconds, median."""
    latency_p95: float
    """Seconds, 95th percentile."""
    latency_requests: int | None = None
    """How many requests were timed; None where it was not recorded."""
    prompt_tokens: float
    """Mean per request."""
    completion_tokens: float
    """Mean per request."""
    training_seconds: float = 0.0
    """Mean per seed."""
    peak_memory: int = 0
    """Bytes of the whole process at its highest, while this arm was trained or answered. Memory
    that earlier arms left in it counts as well: arms cannot be compared by it."""
    cost_per_1000: float = 0.0
    """Price of 1,000 requests: of their tokens, or of the machine's time one after the other."""
    break_even_requests: float | None = None
    """Requests after which the trainings of all seeds have paid for themselves against the
    reference by cheaper requests; None: never, or nothing was trained."""
    forgetting: tuple[Forgotten, ...] = ()
    """General abilities before and after tuning."""
    notes: tuple[str, ...] = ()
    """Plain words on what a reader must know, e.g. that the base cannot follow prompts."""


class DataSummary(Config):
    """What the arms were trained and judged on."""

    train: int
    """Training examples."""
    validation: int
    """Validation examples."""
    test: int
    """Examples of the sealed test part."""
    test_clusters: int
    """Clusters in it: groups merged with their near-duplicates."""
    removed: dict[str, int] = {}
    """Rows left out, by reason code."""
    test_openings: int = 1
    """How often a test part with examples of this one has been opened, this time included."""
    test_rows_seen: int = 0
    """Test examples that were opened before; 0 also where that was not recorded."""
    warnings: tuple[str, ...] = ()
    """What is doubtful about the data."""


class Verdict(Config):
    """The decision between arms with its evidence."""

    version: Literal[1] = 1
    """Version of this format."""
    task: str
    """Name of the task."""
    kind: str
    """classification, extraction or expansion."""
    decision: Literal["ship", "use-simpler", "none"]
    """Ship a tuned arm, use the reference, or neither: none may be shipped, and the reference does
    no better than answers without any understanding."""
    arm: str
    """The arm to use; empty where there is none."""
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
    """Currency of all prices."""
    data: DataSummary
    """What the arms were trained and judged on."""
    arms: tuple[ArmResult, ...]
    """Every arm that was compared."""
    command: str = ""
    """The command that made this."""
    made: str = ""
    """When, ISO 8601."""
    seconds: float = 0.0
    """Making every stage it rests on (arms, answers, measurements), whenever that was. Of a stage
    that was interrupted only the last start counts, but of a training every start."""
    versions: dict[str, str] = {}
    """Versions and hardware it was made with."""


class Sample(Config):
    """One test example as answered by an arm and by the reference."""

    id: str
    """The example's id."""
    input: str
    expected: str
    """The expected output."""
    answer: str
    """What the arm answered."""
    score: float
    """What the answer is worth, 0 to 1."""
    explanation: str = ""
    """Why, in words."""
    reference_answer: str = ""
    """What the reference answered."""
    reference_score: float = 0.0
    """What that is worth, 0 to 1."""


class CurvePoint(Config):
    """One evaluation during training."""

    step: int
    train_loss: float
    validation_loss: float
    validation_mistakes: float | None = None
    """Share of the validation answers' tokens that would be written wrong; of an arm that
    tags, 1 - F1 of the tokens in spans; a classification head writes none."""


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
