"""Verdicts as a run might end with, made up but consistent, for the tests of the report."""

from __future__ import annotations

import math
import random

from metier.evaluation.schema import (
    ArmDetails,
    ArmResult,
    CurvePoint,
    DataSummary,
    Estimate,
    Forgotten,
    Sample,
    SeedResult,
    Verdict,
)

SUBJECTS = (
    "card",
    "transfer",
    "top_up",
    "cash_withdrawal",
    "refund",
    "direct_debit",
    "exchange",
    "identity",
    "account",
    "pin",
    "statement",
)
PROBLEMS = (
    "pending",
    "declined",
    "fee_charged",
    "wrong_amount",
    "not_received",
    "cancel",
    "limits",
)
LABELS = tuple(f"{subject}_{problem}" for subject in SUBJECTS for problem in PROBLEMS)
SCRIPT = "<script>window.hacked = true</script><img src=x onerror='window.hacked=true'>"
ARABIC = "لم تصل بطاقتي بعد، ماذا أفعل؟ رقم الطلب 4821 (عاجل)"
OVERRIDE = "before \u202egnirts desrever\u202c after"
RULE = (
    "Ship a tuned arm only if the Holm-adjusted lower bound of its paired difference to the best "
    "simpler arm exceeds the margin of 2.0 points, and nothing measured before and after tuning "
    "became worse by more than its tolerance. Otherwise use the best simpler arm."
)


def around(mean: float, half: float) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def arm(name: str, score: float, /, **values: object) -> ArmResult:
    """An arm with plausible values; give what matters."""
    method = name.partition("@")[0].partition("/")[0]
    defaults: dict[str, object] = {
        "arm": name,
        "method": method,
        "mode": "head" if "/head" in name else "text",
        "base": "" if method == "classical" else name.partition("@")[2] or "starter",
        "tuned": method in ("lora", "full", "lora+rag"),
        "score": around(score, 0.03),
        "validation_score": score + 0.011,
        "latency_p50": 0.142,
        "latency_p95": 0.2317,
        "prompt_tokens": 61.4,
        "completion_tokens": 5.25,
    }
    return ArmResult.model_validate(defaults | values)


def tuned(name: str, score: float, gain: float, adjusted: float, /, **values: object) -> ArmResult:
    """A tuned arm with three seeds."""
    seeds = tuple(
        SeedResult(
            seed=seed,
            test_score=score + shift,
            validation_loss=0.412 + 0.013 * seed,
            steps=1240 + 31 * seed,
            seconds=181.0 + 7 * seed,
        )
        for seed, shift in enumerate((-0.012, 0.004, 0.008))
    )
    defaults = {
        "difference": around(gain, 0.022),
        "p_value": 0.00021,
        "p_adjusted": 0.0013,
        "p_margin": 0.0047,
        "adjusted_low": adjusted,
        "test": "sign-flip permutation over clusters",
        "seeds": seeds,
        "training_seconds": 188.0,
        "peak_memory": 1_834_000_000,
        "cost_per_1000": 0.00394,
        "break_even_requests": 12_480.0,
    }
    return arm(name, score, **(defaults | values))


def forgotten(
    text: float = 0.016, skill: float = 0.004, *, holds: bool = True
) -> tuple[Forgotten, ...]:
    return (
        Forgotten(
            name="text: python topics",
            unit="bits per byte",
            lower_is_better=True,
            before=around(1.834, 0.021),
            after=around(1.834 * (1 + text), 0.022),
            loss=around(text, 0.007),
            tolerance=0.05,
            holds=True,
        ),
        Forgotten(
            name="skill: grammatical minimal pairs",
            unit="accuracy",
            lower_is_better=False,
            before=around(0.713, 0.018),
            after=around(0.713 - skill, 0.018),
            loss=around(skill, 0.011),
            tolerance=0.03,
            holds=holds,
        ),
    )


def curve(seed: int, floor: float = 0.41, points: int = 14) -> tuple[CurvePoint, ...]:
    """Falls, then the validation loss rises a little; no training loss before the first step."""
    draw = random.Random(seed)
    return tuple(
        CurvePoint(
            step=90 * index,
            train_loss=math.nan if index == 0 else 3.4 * math.exp(-index / 2.6) + 0.2,
            validation_loss=3.5 * math.exp(-index / 2.4)
            + floor
            + 0.011 * index
            + draw.uniform(0, 0.05),
        )
        for index in range(points)
    )


def confusion(
    labels: tuple[str, ...], per_label: int, error: float, seed: int = 0
) -> tuple[tuple[int, int, int], ...]:
    """Most answers right; mistakes go to a neighbour, now and then to no valid label."""
    draw = random.Random(seed)
    counts: dict[tuple[int, int], int] = {}
    for expected in range(len(labels)):
        trouble = error * (4 if expected % 9 == 4 else 0.6)
        for _ in range(per_label):
            answered = expected
            if draw.random() < trouble:
                near = (expected + draw.choice((1, 1, 1, -1, 2, 7))) % len(labels)
                answered = draw.choice((near, near, near, near, len(labels)))
            counts[expected, answered] = counts.get((expected, answered), 0) + 1
    return tuple((expected, answered, n) for (expected, answered), n in sorted(counts.items()))


def samples(kind: str, number: int = 10) -> tuple[Sample, ...]:
    """Won or lost examples; the first ones hold what a page must survive."""
    texts = [
        "I was charged twice for the same coffee yesterday and the app shows both as pending.",
        "Why has my new card not arrived yet? I ordered it two weeks ago. " * 9,
        ARABIC,
        SCRIPT,
        "line one\n  line two, indented\n\nline four",
        OVERRIDE,
        "日本語のテキストです。カードがまだ届きません。" * 3 + " 👩‍👩‍👧‍👦 n̈́͗ó",
        "x" * 300,
        "",
        "How do I raise the limit of my card before I travel?",
    ]
    score, other = (1.0, 0.0) if kind == "won" else (0.0, 0.6667)
    return tuple(
        Sample(
            id=f"{kind}-{index:04d}",
            input=texts[index % len(texts)],
            expected=LABELS[index * 7],
            answer=LABELS[index * 7 if score else index * 7 + 1],
            score=score,
            explanation="same label" if score else "another label",
            reference_answer=LABELS[index * 7 if other else index * 7 + 2],
            reference_score=other,
        )
        for index in range(number)
    )


def shipping() -> tuple[Verdict, list[ArmDetails]]:
    """A tuned arm is shipped: 77 labels, everything measured, one arm that forgot too much."""
    arms = (
        arm(
            "prompt",
            0.0,
            score=Estimate(mean=0.0, low=0.0, high=0.0),
            validation_score=0.0,
            difference=around(-0.852, 0.03),
            peak_memory=512_000_000,
            cost_per_1000=0.00391,
            notes=("The base cannot follow prompts: no answer was a valid label.",),
            metrics={"macro_f1": 0.0, "invalid_answers": 1540.0},
        ),
        arm(
            "few-shot",
            0.312,
            difference=around(-0.54, 0.04),
            prompt_tokens=412.7,
            latency_p50=0.51,
            latency_p95=0.9,
            cost_per_1000=0.0142,
            peak_memory=534_000_000,
            metrics={"macro_f1": 0.2914, "invalid_answers": 122.0},
        ),
        arm(
            "rag",
            0.741,
            difference=around(-0.111, 0.029),
            prompt_tokens=506.1,
            cost_per_1000=0.0171,
            metrics={"macro_f1": 0.7312, "invalid_answers": 12.0},
        ),
        arm(
            "classical",
            0.852,
            score=around(0.852, 0.019),
            prompt_tokens=0,
            completion_tokens=0,
            latency_p50=0.00213,
            latency_p95=0.0031,
            training_seconds=4.2,
            peak_memory=301_000_000,
            cost_per_1000=0.0000592,
            metrics={"macro_f1": 0.8467, "invalid_answers": 0.0},
        ),
        tuned(
            "lora",
            0.897,
            0.045,
            0.0231,
            forgetting=forgotten(),
            metrics={"macro_f1": 0.8953, "invalid_answers": 1.0},
        ),
        tuned(
            "lora/head",
            0.913,
            0.061,
            0.0392,
            score=around(0.913, 0.016),
            forgetting=forgotten(0.012, 0.002),
            completion_tokens=0.0,
            metrics={"macro_f1": 0.9121, "invalid_answers": 0.0},
        ),
        tuned(
            "full",
            0.921,
            0.069,
            0.0447,
            peak_memory=2_410_000_000,
            training_seconds=402.0,
            break_even_requests=None,
            forgetting=forgotten(0.031, 0.041, holds=False),
            metrics={"macro_f1": 0.9203, "invalid_answers": 0.0},
        ),
    )
    verdict = Verdict(
        task="banking",
        kind="classification",
        decision="ship",
        arm="lora/head",
        reference="classical",
        contender="lora/head",
        notes=(
            "The sealed test part has been opened 3 times, this time included.",
            "The base starter cannot follow prompts at all: prompt scores 0.0 %.",
        ),
        headline="Ship lora/head: 91.3 % against 85.2 % for classical, a gain of 6.1 points of "
        "which at least 3.9 are certain (margin 2.0).",
        rule=RULE,
        reasons=(
            "lora/head: the adjusted lower bound +3.9 exceeds the margin 2.0 and nothing was "
            "forgotten beyond tolerance.",
            "full: better still on the test part, but grammatical minimal pairs fell by 4.1 "
            "points; the tolerance is 3.0.",
            "lora: clears the margin too, with a lower bound than lora/head.",
        ),
        what_would_change=(
            "A tolerance of 5.2 points or more on grammatical minimal pairs would "
            "let full be shipped.",
        ),
        margin=0.02,
        currency="USD",
        data=DataSummary(
            train=7210,
            validation=1203,
            test=1540,
            test_clusters=1388,
            removed={"exact_duplicate": 31, "near_duplicate_across_parts": 187, "too_long": 2},
            test_openings=3,
            warnings=("The label pin_limits has only 20 test examples.",),
        ),
        arms=arms,
        command="metier run task.yaml --out runs/banking --set margin=0.02",
        made="2026-08-14T09:31:07Z",
        seconds=1687.0,
        versions={
            "metier": "0.1.0",
            "python": "3.12.4",
            "torch": "2.13.0",
            "machine": "x86_64",
            "processor": "AMD EPYC 7B13",
            "cores": "2",
        },
    )
    details = [
        _details("prompt", 1.0, ()),
        _details("few-shot", 0.5, ()),
        _details("rag", 0.24, ()),
        _details("classical", 0.12, (), compared=False),
        _details("lora", 0.09, tuple(curve(seed) for seed in range(3))),
        _details("lora/head", 0.07, tuple(curve(seed, 0.36) for seed in range(3))),
        _details("full", 0.065, tuple(curve(seed, 0.31) for seed in range(3))),
    ]
    return verdict, details


def _details(
    name: str, error: float, curves: tuple[tuple[CurvePoint, ...], ...], *, compared: bool = True
) -> ArmDetails:
    return ArmDetails(
        arm=name,
        labels=LABELS,
        confusion=confusion(LABELS, 20, error),
        curves=curves,
        won=samples("won") if compared else (),
        lost=samples("lost", 6) if compared else (),
    )


def simpler() -> tuple[Verdict, list[ArmDetails]]:
    """A simpler arm is enough: two bases with long names, few labels, no learning curves."""
    far = "/home/someone/models/a-rather-long-directory/SmolLM2-135M-Instruct"
    arms = (
        arm("prompt@starter", 0.21, difference=around(-0.55, 0.05)),
        arm(f"prompt@{far}", 0.64, difference=around(-0.12, 0.05), peak_memory=790_000_000),
        arm("classical", 0.76, latency_p50=0.0008, latency_p95=0.0011, training_seconds=0.7),
        arm("remote", 0.79, base="", difference=around(0.03, 0.04), cost_per_1000=1.284),
        tuned(
            "lora@starter",
            0.748,
            -0.012,
            -0.041,
            p_value=0.61,
            p_adjusted=1.0,
            p_margin=0.93,
            break_even_requests=None,
        ),
        tuned(
            f"lora@{far}",
            0.781,
            0.021,
            -0.0093,
            p_value=0.071,
            p_adjusted=0.142,
            p_margin=0.31,
            break_even_requests=1_204_000.0,
        ),
    )
    labels = ("billing", "delivery", "returns", "صيانة", "その他")
    verdict = Verdict(
        task="tickets",
        kind="classification",
        decision="use-simpler",
        arm="classical",
        reference="classical",
        contender=f"lora@{far}",
        headline="Use classical: 76.0 %; no tuned arm is certainly more than 2.0 points better.",
        rule=RULE,
        reasons=(
            "lora@starter: 1.2 points worse than classical.",
            f"lora@{far}: 2.1 points better, but the adjusted lower bound -0.9 does not "
            "exceed the margin 2.0.",
        ),
        what_would_change=(
            "About 1,900 more test examples would decide whether the second lora "
            "is better by the margin.",
        ),
        margin=0.02,
        currency="EUR",
        data=DataSummary(train=812, validation=100, test=240, test_clusters=240),
        arms=arms,
        command="metier run tickets.yaml",
        made="2026-08-14",
        seconds=312.4,
        versions={"metier": "0.1.0"},
    )
    details = [
        ArmDetails(
            arm=one.arm,
            labels=labels,
            confusion=confusion(labels, 48, 0.2, index),
            won=samples("won", 3) if one.arm != "classical" else (),
            lost=samples("lost", 2) if one.arm != "classical" else (),
        )
        for index, one in enumerate(arms)
    ]
    return verdict, details


def bare() -> tuple[Verdict, list[ArmDetails]]:
    """Nothing optional: one arm, no details, no reasons."""
    only = arm("prompt", 0.5)
    verdict = Verdict(
        task="t",
        kind="expansion",
        decision="use-simpler",
        arm="prompt",
        reference="prompt",
        headline="Use prompt: 50.0 %.",
        rule=RULE,
        reasons=(),
        margin=0.0,
        currency="USD",
        data=DataSummary(train=0, validation=10, test=40, test_clusters=40),
        arms=(only,),
    )
    return verdict, []


def hostile() -> tuple[Verdict, list[ArmDetails]]:
    """Every text that a user or a model could have written tries to run a script."""
    bad = f'"></title></style></svg>{SCRIPT}' + "unbroken" * 12
    name = f"lora@{bad}"
    arms = (
        arm("classical", 0.5, notes=(bad,), metrics={bad: 0.25}),
        tuned(
            name,
            0.7,
            0.2,
            0.1,
            test=bad,
            forgetting=(forgotten()[0].model_copy(update={"name": f"text: {bad}", "unit": bad}),),
        ),
    )
    verdict = Verdict(
        task="t",
        kind="classification",
        decision="ship",
        arm=name,
        reference="classical",
        contender=name,
        notes=(bad,),
        headline=bad,
        rule=bad,
        reasons=(bad,),
        what_would_change=(bad,),
        margin=0.02,
        currency="USD",
        arms=arms,
        command=bad,
        made=bad,
        versions={bad: bad},
        data=DataSummary(
            train=1, validation=1, test=2, test_clusters=2, removed={bad: 1}, warnings=(bad,)
        ),
    )
    sample = Sample(
        id=bad,
        input=bad,
        expected=bad,
        answer=bad,
        score=1.0,
        explanation=bad,
        reference_answer=bad * 40,
    )
    details = ArmDetails(
        arm=name,
        won=(sample,),
        lost=(sample,),
        labels=(bad, "b"),
        confusion=((0, 0, 1), (0, 2, 1), (1, 0, 3)),
        curves=(curve(0),),
    )
    return verdict, [details]


ALL = {"shipping": shipping, "simpler": simpler, "bare": bare, "hostile": hostile}
