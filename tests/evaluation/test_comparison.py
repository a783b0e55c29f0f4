"""Choosing the reference, Holm over the tuned arms only, costs, and scores that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from metier.errors import ConfigError, DataError
from metier.evaluation import statistics
from metier.evaluation.comparison import choose_reference, compare
from metier.task import SIMPLER_METHODS

from .measured_arms import SIMPLER, TEST, arm, lost, row

LORA = arm("lora", 250, 251, 252)


def compared(*arms, margin=0.02, machine_hour=0.1, chance=0.2):
    found = compare(arms, np.arange(TEST), margin=margin, machine_hour=machine_hour, chance=chance)
    return {each.name: each for each in found}


def test_the_reference_is_best_on_validation_not_on_the_test_part():
    better_on_test = arm("rag", 280, on_validation=50)
    assert choose_reference([*SIMPLER, better_on_test]).arm.name == "classical"


def test_the_reference_is_chosen_over_bases_and_modes_but_never_tuned_or_remote():
    arms = [
        arm("prompt@a", 90),
        arm("prompt/likelihood@b", 150),
        arm("lora", 290, 290, 290),
        arm("remote", 299),
    ]
    assert choose_reference(arms).arm.name == "prompt/likelihood@b"


def test_of_equals_the_reference_is_the_one_with_fewer_tokens():
    long, short = arm("few-shot", 150, prompt_tokens=900.0), arm("rag", 150, prompt_tokens=80.0)
    assert choose_reference([long, short]).arm.name == "rag"
    same = [arm(method, 150) for method in reversed(SIMPLER_METHODS)]
    assert choose_reference(same).arm.name == "prompt"


def test_without_a_simpler_arm_there_is_nothing_to_compare_with():
    with pytest.raises(ConfigError, match="no simpler arm"):
        compared(arm("lora", 200, 200, 200), arm("remote", 200))


def test_the_reference_has_no_comparison_and_the_others_have():
    found = compared(*SIMPLER, LORA)
    assert found["classical"].difference is None
    assert found["classical"].tested is None
    assert found["few-shot"].difference.mean == pytest.approx(-0.2)
    assert found["lora"].difference.mean == pytest.approx(41 / 300)
    assert found["lora"].difference.seeds == 3


def test_only_tuned_arms_are_corrected_for_and_count():
    one = compared(*SIMPLER, arm("remote", 240), arm("lora", 224, 225, 227))
    three = compared(
        *SIMPLER,
        arm("remote", 240),
        arm("lora", 224, 225, 227),
        arm("full", 210, 211, 212),
        arm("lora/head", 208, 210, 213),
    )
    assert one["remote"].p_adjusted is one["remote"].adjusted_low is None
    assert one["lora"].p_adjusted == one["lora"].tested.p_value
    assert one["lora"].adjusted_low == one["lora"].difference.low()
    assert three["lora"].p_adjusted == pytest.approx(3 * one["lora"].p_adjusted)
    assert three["lora"].adjusted_low == one["lora"].difference.low(statistics.LEVEL / 3)


def test_proven_wants_the_bound_above_the_margin_and_the_p_value_below_5_percent():
    strong = compared(*SIMPLER, LORA)["lora"]
    assert strong.proven
    assert strong.p_margin < statistics.LEVEL
    weak = compared(*SIMPLER, LORA, margin=0.13)["lora"]
    assert not weak.proven
    assert weak.p_margin > statistics.LEVEL


def test_on_very_few_clusters_the_permutation_test_has_the_last_word():
    """Five of six clusters gained: the bound of Student's t clears the margin, exact p = 1/16."""
    names = ["prompt", "lora"]
    scores = [np.zeros(6), np.array([1, 1, 1, 1, 1, 0.0])]
    arms = [
        arm(name, 0, scores=values[None], validation=values[None])
        for name, values in zip(names, scores, strict=True)
    ]
    found = compare(arms, np.arange(6), margin=0.02, machine_hour=0.1, chance=0.2)[1]
    assert found.adjusted_low > 0.02
    assert found.p_adjusted == pytest.approx(1 / 16)
    assert not found.proven


def test_a_tuned_arm_must_also_beat_the_simpler_arms_that_validation_did_not_choose():
    rival = arm("rag", 242, on_validation=50)
    found = compared(*SIMPLER, rival, LORA)["lora"]
    assert found.score.mean - 242 / TEST > 0.02
    assert found.proven
    assert found.not_beaten == ("rag",)
    assert not found.qualifies
    assert compared(*SIMPLER, arm("rag", 230, on_validation=50), LORA)["lora"].qualifies


def test_a_tuned_arm_must_do_better_than_chance():
    assert compared(*SIMPLER, LORA, chance=0.83)["lora"].qualifies
    barred = compared(*SIMPLER, LORA, chance=0.84)["lora"]
    assert barred.proven
    assert not barred.qualifies


def test_what_was_forgotten_bars_an_arm():
    found = compared(*SIMPLER, arm("lora", 250, 251, 252, forgetting=(lost(),)))["lora"]
    assert found.proven
    assert [part.name for part in found.forgot] == ["skill: pairs"]
    assert not found.qualifies


def test_cost_is_mean_time_at_the_price_of_a_machine_hour():
    found = compared(arm("prompt", 90, latency_mean=3.6, latency_p50=0.1), machine_hour=0.5)
    assert found["prompt"].cost == pytest.approx(0.5)


def test_an_endpoint_costs_what_its_tokens_cost():
    remote = arm("remote", 90, prompt_tokens=1000, completion_tokens=100, token_prices=(2.0, 8.0))
    found = compared(arm("prompt", 90), remote)
    assert found["remote"].cost == pytest.approx(1000 * (1000 * 2e-6 + 100 * 8e-6))


def test_all_trainings_are_paid_back_by_cheaper_requests_or_never():
    slow = arm("few-shot", 150, latency_mean=1.0)
    fast = arm("lora", 250, 251, 252, latency_mean=0.1, training_seconds=300.0)
    assert compared(slow, fast)["lora"].break_even == pytest.approx(3 * 300 / 0.9)
    assert compared(fast, arm("classical", 210, latency_mean=0.1))["lora"].break_even is None
    assert compared(slow, arm("rag", 100, latency_mean=0.1))["rag"].break_even is None


@pytest.mark.parametrize("wrong", [np.nan, 1.2, -0.1, np.inf])
@pytest.mark.parametrize("part", ["scores", "validation"])
def test_scores_outside_0_to_1_are_refused(part, wrong):
    values = row(150)[None]
    values[0, 7] = wrong
    bad = arm("prompt", 150, **{part: values})
    with pytest.raises(DataError, match=r"arm 'prompt'.*\n.*between 0 and 1"):
        compared(bad, arm("classical", 210))


def test_a_missing_validation_part_is_refused():
    with pytest.raises(DataError, match="validation part"):
        compared(arm("prompt", 90, validation=np.zeros((1, 0))), arm("classical", 210))


@pytest.mark.parametrize("shape", [(1, TEST - 1), (TEST,), (0, TEST)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(DataError, match="300 test examples"):
        compared(arm("prompt", 90, scores=np.zeros(shape)), arm("classical", 210))
