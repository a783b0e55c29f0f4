"""The verdict in words: every case has its sentence, with the numbers that decided."""

from __future__ import annotations

import numpy as np
import pytest

from metier.evaluation import explain

from .measured_arms import SIMPLER, arm, kept, lost, row, verdict_of

LORA = arm("lora", 250, 251, 252)


def plain(text: str) -> str:
    """Without the spaces and signs that only typesetting needs."""
    return text.replace("\u00a0", " ").replace("\u2212", "-")


def headline(*arms, **how) -> str:
    return plain(verdict_of(*arms, **how).headline)


def test_shipping_names_scores_gain_interval_and_what_was_kept():
    assert headline(*SIMPLER, LORA) == (
        "Ship lora: 83.7 % against 70.0 % for classical, +13.7 points (95 % interval +9.8 to "
        "+17.6, p = 0.00010), nothing forgotten beyond tolerance."
    )


def test_several_tuned_arms_are_said_to_be_corrected_for():
    assert "Holm-adjusted p = " in headline(*SIMPLER, LORA, arm("full", 211, 212, 213))


def test_forgetting_that_was_not_measured_is_said():
    assert headline(*SIMPLER, arm("lora", 250, 251, 252, forgetting=())).endswith(
        "; what it forgot was not measured."
    )


def test_a_head_is_said_not_to_be_held_to_the_rule_on_forgetting():
    found = verdict_of(*SIMPLER, arm("lora/head", 250, 251, 252, forgetting=()))
    assert found.arm == "lora/head"
    assert found.headline.endswith(
        "; a head writes no text, so it is not held to the rule on forgetting."
    )
    assert "not held to the rule on forgetting" in found.reasons[0]
    assert (
        "an arm that answers by a head is not held to this, since it cannot write text"
        in found.rule
    )


@pytest.mark.parametrize(
    ("scores", "margin", "end"),
    [
        (
            (row(216, 6), row(214), row(216)),
            0.02,
            ", which shows no gain above the margin of 2.0 points.",
        ),
        (
            (row(220, 3), row(226), row(231)),
            0.02,
            ", which does not prove a gain above the margin of 2.0 points.",
        ),
        (
            (row(211), row(212), row(213)),
            0.025,
            ", which is not more than the margin of 2.5 points.",
        ),
        ((row(150), row(151), row(152)), 0.0025, ": it is worse."),
    ],
)
def test_not_shipping_says_how_the_gain_stands_to_the_margin(scores, margin, end):
    lora = arm("lora", 0, 0, 0, scores=np.array(scores))
    found = headline(*SIMPLER, lora, margin=margin)
    assert found.startswith("Use classical (70.0 %): lora scores ")
    assert found.endswith(end)


def test_a_gain_that_only_holms_correction_takes_away_is_said_to_be_so():
    others = [arm(name, 211, 212, 213) for name in ("full", "lora+rag", "lora/head", "full/head")]
    lora = arm("lora", 224, 225, 227, on_validation=90)
    assert headline(*SIMPLER, lora, margin=0.025).startswith("Ship lora")
    assert "corrected for 5 tuned arms" in headline(*SIMPLER, lora, *others, margin=0.025)


def test_what_was_forgotten_stands_in_headline_and_reason():
    found = verdict_of(*SIMPLER, arm("lora", 250, 251, 252, forgetting=(kept(), lost())))
    assert plain(found.headline).endswith(
        ", but it forgot more than the tolerance allows (skill: pairs)."
    )
    assert (
        "It forgot: skill: pairs is worse by 9.0 points (95 % interval 7.0 to 11.0, tolerance 3.0)."
        in plain(found.reasons[0])
    )


def test_a_loss_that_is_only_not_excluded_is_not_called_forgotten():
    found = verdict_of(*SIMPLER, arm("lora", 250, 251, 252, forgetting=(lost(0.02, 0.03),)))
    assert "not proven to have kept its abilities within tolerance" in found.headline
    assert "It is not proven to have kept skill: pairs" in found.reasons[0]


def test_a_simpler_arm_that_validation_missed_bars_the_tuned_one_in_words():
    found = verdict_of(*SIMPLER, arm("rag", 246, on_validation=50), LORA)
    assert "but it is not clearly better than rag on the test part" in found.headline
    assert "the reference may not be the best simpler arm" in found.reasons[0]


def test_nothing_tuned_and_nothing_learnt_have_headlines_of_their_own():
    assert headline(*SIMPLER) == (
        "Use classical: 70.0 % (95 % interval 64.6 % to 74.9 %), the best simpler arm on "
        "validation; nothing was tuned."
    )
    assert headline(*SIMPLER, LORA, commonest=270) == (
        "Nothing works yet: the best simpler arm on validation, classical, scores 70.0 %, and no "
        "arm does better than always answering the commonest label (90.0 %)."
    )


def test_a_reference_that_is_no_use_is_not_recommended():
    forgetful = arm("lora", 250, 251, 252, forgetting=(lost(),))
    assert headline(arm("prompt", 0), forgetful, kind="extraction") == (
        "Nothing can be shipped yet: lora scores 83.7 %, +83.7 points (95 % interval +79.5 to "
        "+87.9, p = 0.00010), but it forgot more than the tolerance allows (skill: pairs); the "
        "best simpler arm on validation, prompt (0.0 %), does no better than giving no useful "
        "answer (2.0 % or less)."
    )
    assert headline(arm("prompt", 0, on_validation=90), arm("rag", 99), kind="extraction") == (
        "Nothing can be shipped yet: the best simpler arm on validation, prompt (0.0 %), does no "
        "better than giving no useful answer (2.0 % or less); nothing was tuned."
    )


def test_a_gain_below_the_commonest_label_is_not_praised():
    better = arm("remote", 290)
    found = verdict_of(*SIMPLER, better, LORA, commonest=260)
    assert (
        ", but it does no better than always answering the commonest label (86.7 %); the best "
        "simpler arm"
    ) in plain(found.headline)
    assert "It does no better than always answering" in found.reasons[0]


def test_every_tuned_arm_and_remote_has_a_reason():
    found = verdict_of(
        *SIMPLER, arm("remote", 240), LORA, arm("full", 260, 261, 262), arm("lora/head", 211)
    )
    reasons = [plain(each) for each in found.reasons]
    assert [each.partition(":")[0] for each in reasons] == ["lora", "full", "lora/head", "remote"]
    assert "It could be shipped too; full is better on validation" in reasons[0]
    assert "above the margin of 2.0 points. Nothing forgotten beyond tolerance." in reasons[1]
    assert "1,000 requests cost" in reasons[1]
    assert "not above the margin" in reasons[2]
    assert "reported only" in reasons[3]


def test_cheaper_requests_repay_the_training_in_words():
    slow = arm("few-shot", 150, latency_mean=1.0)
    found = verdict_of(slow, LORA, commonest=10)
    assert found.reasons[0].endswith("which repays the training after 1,000 requests.")


def test_the_rule_names_the_margin_exactly():
    assert "the margin of 0.25 points" in explain.rule(0.0025)
    assert "the margin of 2.0 points" in explain.rule(0.02)
    assert "  " not in explain.rule(0.02)
