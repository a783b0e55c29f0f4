"""What would change the answer, and what a reader is warned of."""

from __future__ import annotations

import re

import numpy as np
import pytest

from metier.evaluation.advice import over_budget
from metier.task import Forgetting, Training

from .measured_arms import SIMPLER, arm, around, kept, lost, row, verdict_of
from .test_explain import plain

LORA = arm("lora", 250, 251, 252)


def changes(*arms, **how) -> str:
    return plain(" ".join(verdict_of(*arms, **how).what_would_change))


def notes(*arms, **how) -> str:
    return plain(" ".join(verdict_of(*arms, **how).notes))


def test_a_shipped_arm_is_kept_back_by_a_larger_margin():
    assert changes(*SIMPLER, LORA) == "A margin of 9.8 points or more would have kept classical."


def test_an_unproven_gain_says_how_many_examples_would_prove_it():
    found = changes(*SIMPLER, arm("lora", 0, 0, 0, scores=np.array([row(230, 8)] * 3)))
    more = re.fullmatch(
        r"About ([\d,]+) test examples instead of 300 would prove a true gain of 4.0 points in 4 "
        r"of 5 runs\.( A margin below .* would have let lora pass\.)?",
        found,
    )
    assert more
    assert 400 < int(more[1].replace(",", "")) < 3_000


def test_where_seeds_differ_too_much_more_seeds_are_named():
    found = changes(*SIMPLER, arm("lora", 222, 236, 246))
    assert "seeds instead of 300 and 3" in found
    assert "more test examples alone cannot, since trainings differ by" in found


def test_where_no_test_would_do_the_arm_must_become_better_or_steadier():
    found = changes(*SIMPLER, arm("lora", 180, 220, 270))
    assert found.startswith("lora must become better or steadier (trainings differ by")


def test_a_gain_not_seen_is_told_what_the_test_could_find():
    found = changes(*SIMPLER, arm("lora", 0, 0, 0, scores=np.array([row(222, 9)] * 3)))
    assert re.search(r"this test finds a true gain of \d+\.\d points in 4 of 5 runs", found)


def test_a_gain_that_is_ruled_out_asks_for_no_more_examples():
    assert changes(*SIMPLER, arm("lora", 150, 151, 152)) == (
        "lora must become better: a gain above the margin is ruled out."
    )


def test_a_perfect_reference_leaves_nothing_to_gain():
    found = changes(arm("classical", 300), arm("lora", 300, 300, 300))
    assert "leaves only 0.0 points to gain" in found or "ruled out" in found


def test_a_lower_margin_is_named_with_its_condition():
    found = changes(*SIMPLER, arm("lora", 224, 225, 227), margin=0.04)
    assert re.search(r"A margin below \d\.\d+ points, set before the test part is opened", found)


def test_a_forgetful_arm_is_told_the_tolerance_it_would_need():
    worse = kept().model_copy(update={"loss": around(0.1, 0.0904), "holds": False})
    found = verdict_of(*SIMPLER, arm("lora", 250, 251, 252, forgetting=(worse, lost(0.1, 0.02))))
    text, skill, less = found.what_would_change
    assert "forgetting.text_tolerance: 0.191 in task.yaml (now 0.05)" in text
    assert "forgetting.skill_tolerance: 0.121 in task.yaml (now 0.03)" in skill
    assert "smaller training.learning_rate" in less
    for part, key in zip(found.arms[3].forgetting, ("0.191", "0.121"), strict=True):
        assert part.loss.high <= float(key)
    assert {"text_tolerance", "skill_tolerance"} <= Forgetting.model_fields.keys()
    assert "learning_rate" in Training.model_fields


def test_a_doubtful_reference_asks_for_more_validation():
    found = changes(*SIMPLER, arm("rag", 246, on_validation=50), LORA)
    assert found.startswith("More validation examples")


def test_one_cluster_asks_for_others():
    found = changes(*SIMPLER, LORA, clusters=np.zeros(300, int))
    assert found.startswith("Test examples from more than one cluster")


def test_nothing_tuned_and_nothing_learnt():
    assert changes(*SIMPLER).startswith("A tuned arm")
    assert changes(*SIMPLER, LORA, commonest=270).startswith("A more capable base")


# Cautions.


def test_a_sound_verdict_needs_no_caution():
    assert verdict_of(*SIMPLER, LORA).notes == ()


def test_an_opened_test_part_a_small_one_and_few_seeds_are_said():
    found = notes(
        *SIMPLER, arm("lora", 250), arm("full", 250, 251), openings=3, clusters=np.arange(300) // 10
    )
    assert "has been opened 3 times, this time included: repeated looks" in found
    assert "small (300 examples in 30 clusters)" in found
    assert "lora was trained with one seed" in found
    assert "full was trained with 2 seeds" in found


def test_how_much_of_the_test_part_was_seen_before_is_said():
    found = notes(*SIMPLER, LORA, openings=2, seen=55)
    assert "opened 2 times, this time included (55 of its 300 examples were seen before)" in found


def test_a_run_longer_than_its_budget_is_said_to_be():
    assert over_budget(1800, 30) == ()
    (note,) = over_budget(1920, 30)
    assert plain(note).startswith("The run took 32 min of a budget of 30 min: ")


WEAK = (arm("prompt", 10), arm("few-shot", 20))


def test_a_base_that_cannot_follow_prompts_at_all_is_named():
    assert notes(*WEAK, arm("classical", 210)).startswith(
        "The base cannot follow prompts at all: prompt scores 3.3 % and few-shot scores 6.7 %, no "
        "better than always answering the commonest label (20.0 %)."
    )
    both = notes(arm("prompt@Weak", 10), arm("prompt@Good", 200), arm("classical", 210))
    assert "The base Weak cannot" in both
    assert "Good" not in both


def test_a_base_that_repeats_the_commonest_label_is_said_to_do_so():
    found = notes(arm("prompt", 60), arm("few-shot", 55), arm("classical", 210))
    assert "Prompted, the base does no better than always answering the commonest label" in found
    assert "cannot follow" not in found


def test_a_base_that_needs_examples_is_told_apart():
    found = notes(arm("prompt", 10), arm("few-shot", 150), arm("classical", 210))
    assert "With an instruction alone, the base does no better" in found
    assert "with examples, few-shot scores 50.0 %" in found


@pytest.mark.parametrize("kind", ["extraction", "expansion"])
def test_for_text_chance_is_next_to_nothing(kind):
    weak = (arm("prompt", 0), arm("few-shot", 5))
    assert "cannot follow prompts at all" in notes(*weak, LORA, kind=kind)
    assert "cannot" not in notes(arm("prompt", 90), LORA, kind=kind)


def test_a_better_simpler_arm_and_a_better_remote_arm_are_pointed_out():
    found = notes(*SIMPLER, arm("rag", 246, on_validation=50), arm("remote", 290), LORA)
    assert "On the test part rag scores higher than classical" in found
    assert "remote scores higher than classical" in found


def test_notes_of_an_arm_say_what_it_is_not_better_than():
    found = verdict_of(
        arm("prompt", 10, notes=("as measured",)),
        *SIMPLER[1:],
        arm("lora", 250, 251, forgetting=()),
    )
    by_arm = {each.arm: plain(" ".join(each.notes)) for each in found.arms}
    assert by_arm["prompt"] == (
        "as measured Worse than always answering the commonest label (20.0 %)."
    )
    assert by_arm["few-shot"] == ""
    assert by_arm["lora"].startswith("It was trained with 2 seeds")
    assert by_arm["lora"].endswith("What it forgot was not measured.")


def notes_of(tuned) -> str:
    return plain(" ".join(verdict_of(*SIMPLER, tuned).arms[-1].notes))


def test_a_head_is_said_to_have_changed_its_model_unmeasured():
    said = (
        "It is not held to the rule on forgetting: the model under its head was changed, too, but "
        "it cannot write text."
    )
    assert notes_of(arm("lora/head", 250, 251, 252, forgetting=())) == said
    assert notes_of(LORA) == ""


@pytest.mark.parametrize(("mean", "said"), [(0.7, False), (0.53, False), (0.515, True)])
def test_an_ability_the_base_hardly_has_cannot_be_seen_to_be_lost(mean, said):
    skill = lost().model_copy(update={"before": around(mean, 0.02), "holds": True})
    found = notes_of(arm("lora", 250, 251, 252, forgetting=(kept(), skill)))
    assert found == (
        "Whether it forgot skill: pairs cannot be seen: its base, at 51.5 % (95 % interval 49.5 % "
        "to 53.5 %), does no better there than guessing (50 %)."
        if said
        else ""
    )
