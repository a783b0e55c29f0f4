"""The decision rule: when a tuned arm is shipped, which one, and what stands in the verdict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.evaluation.schema import Verdict
from metier.evaluation.statistics import LEVEL
from metier.evaluation.verdict import chance
from metier.task import Data, Task

from .measured_arms import SIMPLER, TEST, arm, kept, lost, row, verdict_of

LORA = arm("lora", 250, 251, 252)


def test_a_proven_gain_is_shipped():
    found = verdict_of(*SIMPLER, LORA)
    assert (found.decision, found.arm, found.reference) == ("ship", "lora", "classical")
    assert found.contender == "lora"


def test_a_gain_not_above_the_margin_is_not():
    assert verdict_of(*SIMPLER, LORA, margin=0.09).decision == "ship"
    found = verdict_of(*SIMPLER, LORA, margin=0.11)
    assert (found.decision, found.arm, found.contender) == ("use-simpler", "classical", "lora")


def test_a_gain_inside_the_noise_is_not():
    noisy = np.array([row(250, 25)] * 3)
    assert verdict_of(*SIMPLER, arm("lora", 0, 0, 0, scores=noisy)).decision == "use-simpler"


def test_a_gain_that_ends_below_the_commonest_label_is_not():
    found = verdict_of(*SIMPLER, LORA, commonest=260)
    assert (found.decision, found.arm) == ("none", "")
    assert found.arms[3].adjusted_low > found.margin


def test_a_reference_no_better_than_chance_is_not_to_be_used_either():
    forgetful = arm("lora", 250, 251, 252, forgetting=(lost(),))
    found = verdict_of(arm("prompt", 0), forgetful, kind="extraction")
    assert (found.decision, found.arm, found.reference) == ("none", "", "prompt")
    assert verdict_of(arm("prompt", 90), forgetful, kind="extraction").arm == "prompt"
    assert verdict_of(arm("prompt", 0), LORA, kind="extraction").arm == "lora"


def test_clusters_count_whole():
    clusters = np.arange(TEST) // 30
    assert verdict_of(*SIMPLER, LORA, clusters=clusters).decision == "use-simpler"


def test_seeds_that_differ_a_lot_are_not_shipped():
    steady, shaky = arm("lora", 235, 236, 237), arm("lora", 216, 230, 262)
    assert shaky.scores.mean() == steady.scores.mean()
    assert verdict_of(*SIMPLER, steady).decision == "ship"
    assert verdict_of(*SIMPLER, shaky).decision == "use-simpler"


def test_an_arm_that_forgot_is_not_shipped_but_another_is():
    forgetful = arm("full", 270, 271, 272, forgetting=(kept(), lost()))
    assert verdict_of(*SIMPLER, forgetful).decision == "use-simpler"
    assert verdict_of(*SIMPLER, forgetful, LORA).arm == "lora"


def test_of_several_the_best_on_validation_is_shipped_not_the_best_on_the_test_part():
    luckier = arm("full", 280, 281, 282, on_validation=80)
    assert verdict_of(*SIMPLER, arm("lora", 250, 251, 252, on_validation=83), luckier).arm == "lora"


def test_nothing_tuned_is_a_verdict_too():
    found = verdict_of(*SIMPLER)
    assert (found.decision, found.arm, found.contender) == ("use-simpler", "classical", "")


def test_remote_is_reported_and_neither_reference_nor_shipped():
    found = verdict_of(*SIMPLER, arm("remote", 299))
    assert (found.decision, found.reference) == ("use-simpler", "classical")
    assert any(
        reason.startswith("remote: >") or "remote: 99.7" in reason for reason in found.reasons
    )


def test_one_seed_can_be_shipped_and_is_said():
    found = verdict_of(*SIMPLER, arm("lora", 250))
    assert found.decision == "ship"
    assert "trained with 1 seed only" in found.headline
    assert any("one seed" in note for note in found.notes)


def test_the_verdict_holds_every_arm_and_survives_its_file():
    found = verdict_of(*SIMPLER, LORA, arm("remote", 240))
    assert [each.arm for each in found.arms] == [
        "prompt",
        "few-shot",
        "classical",
        "lora",
        "remote",
    ]
    lora = found.arms[3]
    assert lora.difference.low < lora.difference.mean < lora.difference.high
    assert lora.adjusted_low == pytest.approx(lora.difference.low)
    assert lora.p_margin < LEVEL
    assert lora.test.startswith("larger of exact sign-flip") or "sign-flip" in lora.test
    assert found.arms[0].test == "exact McNemar"
    assert Verdict.model_validate_json(found.model_dump_json()) == found


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=3), max_size=3),
    st.integers(1, 20),
    st.sampled_from(["classification", "extraction", "expansion"]),
)
def test_any_scores_end_in_a_whole_verdict(simpler, tuned, size, kind):
    """Whatever was measured: words without gaps, and a decision that agrees with the numbers."""
    names = ("prompt", "few-shot", "rag"), ("lora", "full", "lora+rag")
    arms = [
        arm(
            name,
            *rights,
            scores=np.array([row(r, examples=60) for r in rights]),
            validation=np.array([row(r, examples=60) for r in rights]),
        )
        for name, rights in [
            *zip(names[0], ([each] for each in simpler), strict=False),
            *zip(names[1], tuned, strict=False),
        ]
    ]
    found = verdict_of(*arms, kind=kind, examples=60, clusters=np.arange(60) // size, commonest=20)
    qualified = [
        each
        for each in found.arms
        if each.tuned and each.adjusted_low > found.margin and each.p_adjusted < 0.05
    ]
    assert found.decision != "ship" or found.arm in {each.arm for each in qualified}
    assert (found.decision == "none") == (found.arm == "")
    words = (found.headline, *found.reasons, *found.what_would_change, *found.notes)
    assert all(text.endswith(".") and "nan" not in text and "inf " not in text for text in words)
    assert Verdict.model_validate_json(found.model_dump_json()) == found


def task(kind):
    return Task(name="task", kind=kind, data=Data(file="rows.jsonl"))


def test_chance_is_the_commonest_answer_or_guessing_and_next_to_nothing_for_other_text():
    expected = ["a"] * 6 + ["b"] * 3 + ["c"]
    assert chance(task("classification"), expected, "abcdefghij").level == 0.6
    assert chance(task("classification"), expected, "abcdefghij").guessing == 0.1
    assert chance(task("classification"), ["a", "b", "c"], "ab").level == pytest.approx(1 / 3)
    spans = ["{}"] * 4 + [f'{{"place":["{place}"]}}' for place in ("Rome", "Oslo", "Bonn")]
    found = chance(task("extraction"), spans, ())
    assert (found.level, found.guessing) == (pytest.approx(4 / 7), 0.02)
    assert found.words.replace("\xa0", " ") == "always giving the commonest answer (57.1 %)"
    assert chance(task("extraction"), [str(number) for number in range(99)], ()).level == 0.02
    assert chance(task("expansion"), [], ()).level == 0.02
