"""Arms with made-up scores for the tests of the verdict: counts of right answers, no chance."""

from __future__ import annotations

import numpy as np

from metier.evaluation.comparison import Measured
from metier.evaluation.schema import DataSummary, Estimate, Forgotten, Verdict
from metier.evaluation.verdict import decide
from metier.task import Arm, Data, Task

TEST, VALIDATION = 300, 100


def row(right: int, wrong_first: int = 0, examples: int = TEST) -> np.ndarray:
    """The first `right` examples are right, but for the first `wrong_first` of them."""
    scores = (np.arange(examples) < right).astype(float)
    scores[:wrong_first] = 0
    return scores


def arm(name: str, *right: int, on_validation: int | None = None, **values: object) -> Measured:
    """An arm with so many right test answers of 300, one number per seed.

    Without `on_validation` (right answers of 100), validation shows what the test will.
    """
    method, _, base = name.partition("@")
    chosen = Arm.of(method).model_copy(update={"base": base})
    share = on_validation if on_validation is not None else round(np.mean(right) / 3)
    defaults: dict[str, object] = {
        "scores": np.array([row(each) for each in right]),
        "validation": np.array([row(share, examples=VALIDATION)] * len(right)),
        "latency_mean": 0.1,
        "latency_p50": 0.1,
        "latency_p95": 0.2,
        "prompt_tokens": 60.0,
        "completion_tokens": 5.0,
    }
    if chosen.tuned:
        defaults |= {"training_seconds": 300.0, "forgetting": (kept(),)}
    return Measured(arm=chosen, **(defaults | values))


def kept() -> Forgotten:
    """Text is read a little worse, well within the tolerance."""
    return Forgotten(
        name="text: topics",
        unit="bits per byte",
        lower_is_better=True,
        before=around(1.8, 0.02),
        after=around(1.82, 0.02),
        loss=around(0.011, 0.005),
        tolerance=0.05,
        holds=True,
    )


def lost(loss: float = 0.09, half: float = 0.02) -> Forgotten:
    """Grammar suffered."""
    return Forgotten(
        name="skill: pairs",
        unit="accuracy",
        lower_is_better=False,
        before=around(0.7, 0.02),
        after=around(0.7 - loss, 0.02),
        loss=around(loss, half),
        tolerance=0.03,
        holds=False,
    )


def around(mean: float, half: float) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half)


SIMPLER = (arm("prompt", 90), arm("few-shot", 150), arm("classical", 210, prompt_tokens=0.0))


def verdict_of(
    *arms: Measured,
    kind: str = "classification",
    commonest: int = 60,
    openings: int = 1,
    seen: int = 0,
    examples: int = TEST,
    margin: float = 0.02,
    clusters: object = None,
) -> Verdict:
    """Decide between these arms; of labels `commonest` are the same, of texts none are."""
    names = np.arange(examples) if clusters is None else clusters
    labels = () if kind != "classification" else tuple("abcdefghij")
    rare = labels[1:] or tuple(f"text {number}" for number in range(examples))
    often = commonest if labels else 0
    expected = ["a" if i < often else rare[i % len(rare)] for i in range(examples)]
    return decide(
        Task(name="task", kind=kind, data=Data(file="rows.jsonl"), margin=margin),
        arms,
        clusters=names,
        expected=expected,
        labels=labels,
        data=DataSummary(
            train=1000,
            validation=VALIDATION,
            test=examples,
            test_clusters=len(set(np.asarray(names).tolist())),
            test_openings=openings,
            test_rows_seen=seen,
        ),
    )
