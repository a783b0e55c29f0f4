"""The statistics against independent second computations, and against simulated truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metier.evaluation import statistics
from metier.evaluation.statistics import Effect


def drawn(rng, clusters, seeds=1, correlation=0.0, share=0.6, seed_sd=0.0):
    """Binary scores (seeds, examples) whose examples resemble each other inside clusters."""
    n = len(clusters)
    copies = rng.random(n) < math.sqrt(correlation)
    rows = []
    for _ in range(seeds):
        own = np.where(copies, rng.random(max(clusters) + 1)[clusters], rng.random(n))
        rows.append(own < share + rng.normal(0, seed_sd))
    return np.array(rows, dtype=float)


# Effect.


def test_with_single_examples_it_is_students_interval():
    values = np.random.default_rng(0).normal(0.3, 1, 40)
    found = statistics.effect(values[None], np.arange(40))
    expected = stats.ttest_1samp(values, 0.1)
    interval = expected.confidence_interval(0.95)
    assert found.interval().low == pytest.approx(interval.low, abs=1e-12)
    assert found.interval().high == pytest.approx(interval.high, abs=1e-12)
    one_sided = stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    assert found.p_at_most(0.1) == pytest.approx(one_sided, rel=1e-9)


def test_with_equal_clusters_it_is_students_interval_of_their_means():
    values = np.random.default_rng(1).normal(0.3, 1, (25, 4))
    found = statistics.effect(values.reshape(1, -1), np.repeat(np.arange(25), 4))
    interval = stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.95)
    assert (found.low(), found.high()) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_with_unequal_clusters_it_is_cr2_of_a_regression_on_a_constant():
    """The sandwich written with matrices, as for any regression (Bell and McCaffrey 2002)."""
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(7), [1, 2, 3, 5, 8, 1, 4])
    values = rng.normal(0, 1, len(clusters))
    design = np.ones((len(clusters), 1))
    bread = np.linalg.inv(design.T @ design)
    residuals, meat = values - values.mean(), 0.0
    for cluster in range(7):
        x, e = design[clusters == cluster], residuals[clusters == cluster]
        roots, vectors = np.linalg.eigh(np.eye(len(x)) - x @ bread @ x.T)
        adjust = vectors @ np.diag(roots**-0.5) @ vectors.T
        meat += (x.T @ adjust @ e).item() ** 2
    expected = bread.item() ** 2 * meat
    assert statistics.effect(values[None], clusters).examples_variance == pytest.approx(expected)


def test_seeds_and_examples_add_up_as_in_a_two_way_analysis_of_variance():
    rng = np.random.default_rng(3)
    seeds, n = 4, 30
    values = rng.normal(0, 1, (seeds, n)) + rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 1, n)
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    rest = values - rows[:, None] - columns + mean
    by_examples = seeds * ((columns - mean) ** 2).sum() / (n - 1)
    by_seeds = n * ((rows - mean) ** 2).sum() / (seeds - 1)
    by_both = (rest**2).sum() / ((seeds - 1) * (n - 1))
    found = statistics.effect(values, np.arange(n))
    assert found.examples_variance == pytest.approx(by_examples / (n * seeds))
    assert found.seeds_variance == pytest.approx(by_seeds / (n * seeds))
    assert found.mixed_variance == pytest.approx(by_both / (n * seeds))


def test_degrees_of_freedom_fall_with_one_huge_alike_cluster():
    rng = np.random.default_rng(4)
    singles, lumped = np.arange(300), np.r_[np.zeros(100, int), np.arange(1, 201)]
    values = rng.normal(0, 1, 300)
    alike = values.copy()
    alike[:100] = 1.5
    assert statistics.effect(values[None], singles).df == pytest.approx(299)
    assert statistics.effect(alike[None], lumped).df < 3


def test_one_cluster_says_nothing():
    scores = np.array([[1.0, 0.0, 1.0, 1.0]])
    clusters = np.zeros(4, int)
    assert statistics.mean_score(scores, clusters).low == 0
    assert statistics.mean_score(scores, clusters).high == 1
    difference = statistics.paired_difference(scores, 1 - scores, clusters)
    interval = statistics.difference_interval(difference)
    assert (interval.low, interval.high) == (-1, 1)
    assert difference.p_at_most(0) == 0.5


def test_names_and_numbers_of_clusters_say_the_same():
    values = np.random.default_rng(5).normal(0, 1, (1, 6))
    by_name = statistics.effect(values, ["b", "a", "b", "c", "c", "a"])
    assert by_name == statistics.effect(values, np.array([7, 2, 7, 5, 5, 2]))


# The mean score.


@pytest.mark.parametrize(("right", "of"), [(0, 300), (1, 300), (3, 40), (150, 300), (300, 300)])
def test_the_mean_of_independent_binary_scores_has_wilsons_interval(right, of):
    scores = (np.arange(of) < right).astype(float)[None]
    found = statistics.mean_score(scores, np.arange(of))
    wilson = stats.binomtest(right, of).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), rel=0.06, abs=2e-4)


def test_no_hit_at_all_is_not_plus_or_minus_nothing():
    found = statistics.mean_score(np.zeros((3, 300)), np.arange(300))
    assert found.mean == found.low == 0
    assert 0.01 < found.high < 0.015


@pytest.mark.parametrize("value", [0.1, 0.3, 1.0])
def test_equal_scores_are_not_taken_for_certainty(value):
    found = statistics.mean_score(np.full((3, 300), value), np.arange(300))
    assert found.mean == pytest.approx(value)
    assert found.high - found.low > 0.01


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30),
    st.lists(st.integers(0, 5), min_size=30, max_size=30),
    st.integers(1, 3),
)
def test_the_interval_of_a_mean_score_holds_it_and_stays_between_0_and_1(scores, groups, seeds):
    matrix = np.array([np.roll(scores, shift) for shift in range(seeds)])
    found = statistics.mean_score(matrix, np.array(groups[: len(scores)]))
    assert 0 <= found.low <= found.mean <= found.high <= 1


# Coverage, by simulation.


def coverage(clusters, tasks=400, seeds=3, seed_sd=0.02, *, blind_to=""):
    """Share of simulated tasks whose 95 % interval holds the true difference of 0.1."""
    rng, hits = np.random.default_rng(6), 0
    for _ in range(tasks):
        tuned = drawn(rng, clusters, seeds, 0.4, 0.6, seed_sd)
        reference = drawn(rng, clusters, 1, 0.4, 0.5)
        if blind_to == "seeds":
            tuned = tuned.mean(axis=0, keepdims=True)
        seen = np.arange(len(clusters)) if blind_to == "clusters" else clusters
        found = statistics.paired_difference(tuned, reference, seen)
        hits += found.low() <= 0.1 <= found.high()
    return hits / tasks


CLUSTERS = np.repeat(np.arange(60), np.resize([1, 3, 5, 7], 60))


def test_intervals_of_paired_differences_cover():
    assert coverage(CLUSTERS) >= 0.93


def test_the_control_that_is_blind_to_clusters_does_not_cover():
    assert coverage(CLUSTERS, blind_to="clusters") < 0.9


def test_intervals_cover_where_three_seeds_differ_a_lot_and_the_control_does_not():
    assert coverage(np.arange(200), seed_sd=0.08) >= 0.93
    assert coverage(np.arange(200), seed_sd=0.08, blind_to="seeds") < 0.85


def test_equal_answers_do_not_give_certainty():
    scores = np.ones((1, 200))
    found = statistics.paired_difference(scores, scores, np.arange(200))
    three = 3 / 200  # the rule of three: up to this many per example may differ unseen
    assert three * 0.6 < found.high() < three * 1.5
    assert found.low() == pytest.approx(-found.high())


# Tests.


def test_sign_flip_is_scipys_exact_permutation_test():
    rng = np.random.default_rng(7)
    for _ in range(5):
        sums = rng.normal(0.4, 1, 9)
        expected = stats.permutation_test(
            (sums, np.zeros(9)),
            lambda x, y: np.sum(x - y),
            permutation_type="samples",
            n_resamples=np.inf,
        )
        found = statistics.sign_flip(sums)
        assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)
        assert found.test == "exact sign-flip on 9 clusters"


def test_sign_flip_draws_agree_with_the_exact_p_value():
    """Sums of -1 and 1 are a binomial in disguise, exact for any number of clusters."""
    sums = np.r_[np.ones(25), -np.ones(13)]
    exact = stats.binomtest(25, 38).pvalue
    found = statistics.sign_flip(sums)
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1e4))
    assert found == statistics.sign_flip(sums)
    assert found.test == "sign-flip on 38 clusters (10,000 draws)"


def test_sign_flip_never_says_impossible_and_knows_no_difference():
    assert statistics.sign_flip(np.ones(40)).p_value == 1 / 10_000
    assert statistics.sign_flip(np.zeros(40)).p_value == 1


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant(better, worse):
    difference = np.r_[np.ones(better), -np.ones(worse), np.zeros(3)]
    expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert statistics.mcnemar(difference) == pytest.approx(expected, rel=1e-9)


def test_the_test_is_named_and_fits_the_data():
    rng = np.random.default_rng(8)
    singles, pairs = np.arange(60), np.repeat(np.arange(30), 2)
    tuned, reference = drawn(rng, singles, 3, share=0.8), drawn(rng, singles, share=0.5)
    one = tuned[:1]
    assert statistics.difference_test(one, reference, singles).test == "exact McNemar"
    assert "sign-flip on 30 clusters" in statistics.difference_test(one, reference, pairs).test
    assert "McNemar" not in statistics.difference_test(one * 0.5, reference, singles).test
    assert "t with 3 seeds" in statistics.difference_test(tuned, reference, singles).test


def test_with_several_seeds_the_p_value_agrees_with_the_interval():
    """Seeds that disagree wildly: sign-flip alone, blind to them, would find a difference."""
    reference = np.zeros((1, 200))
    tuned = np.array([np.arange(200) < right for right in (10, 60, 110)], dtype=float)
    clusters = np.arange(200)
    found = statistics.difference_test(tuned, reference, clusters)
    assert statistics.sign_flip(tuned.mean(axis=0)).p_value < 0.001
    assert found.p_value > 0.05
    assert statistics.paired_difference(tuned, reference, clusters).low() < 0


# Holm.


def closed_testing(p_values):
    """Holm as what it is: every set of hypotheses that holds i must be rejected by Bonferroni."""
    everyone = range(len(p_values))
    sets = [s for size in everyone for s in itertools.combinations(everyone, size + 1)]
    return [
        max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s)
        for i in everyone
    ]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_closed_testing_with_bonferroni(p_values):
    assert statistics.holm(p_values) == pytest.approx(closed_testing(p_values))


EFFECTS = st.builds(
    Effect,
    mean=st.floats(-0.2, 0.4),
    examples_variance=st.floats(1e-5, 1e-2),
    examples_df=st.floats(1, 400),
    seeds_variance=st.floats(0, 1e-3),
    mixed_variance=st.just(0.0),
    seeds=st.just(3),
    examples=st.just(300),
)


@given(st.lists(EFFECTS, min_size=1, max_size=5), st.floats(-0.2, 0.3))
def test_holms_bounds_say_what_holms_p_values_say_at_every_margin(effects, margin):
    lows = statistics.holm_low(effects)
    adjusted = statistics.holm([each.p_at_most(margin) for each in effects])
    for low, p_value in zip(lows, adjusted, strict=True):
        if abs(low - margin) > 1e-9:
            assert (low > margin) == (p_value < statistics.LEVEL)


def test_without_correction_bounds_are_higher():
    effects = [Effect(0.1, 1e-3, 100, 0, 0, 1, 300)] * 3
    assert max(statistics.holm_low(effects)) < effects[0].low()
    assert statistics.holm_low(effects[:1]) == [effects[0].low()]


def test_non_inferiority_wants_the_upper_end_within_the_tolerance():
    loss = Effect(0.01, 1e-4, 1e6, 0, 0, 1, 300).interval()
    assert loss.high == pytest.approx(0.01 + 1.96 * 0.01, abs=1e-5)
    assert statistics.non_inferior(loss, 0.03)
    assert not statistics.non_inferior(loss, 0.0295)


# Power.


def power(gain, margin, examples, tasks=2_000):
    """Share of tasks in which the lower bound is above the margin; differences of SD 0.5."""
    values = np.random.default_rng(9).normal(gain, 0.5, (tasks, examples))
    error = values.std(axis=1, ddof=1) / math.sqrt(examples)
    bound = values.mean(axis=1) - stats.t.ppf(1 - statistics.LEVEL, examples - 1) * error
    return (bound > margin).mean()


def normal(gain, examples):
    return Effect(gain, 0.25 / examples, examples - 1, 0, 0, 1, examples)


def test_the_examples_needed_give_a_power_of_80_percent():
    needed = statistics.needed_to_decide(normal(0.08, 100), 0.02)
    assert needed.seeds == 1
    assert needed.alone == needed.examples
    assert 0.78 <= power(0.08, 0.02, needed.examples) <= 0.86
    assert power(0.08, 0.02, int(needed.examples * 0.8)) < 0.78


def test_the_detectable_gain_is_found_with_a_power_of_80_percent():
    gain = 0.02 + statistics.detectable_gain(normal(0.0, 150))
    assert power(gain, 0.02, 150) == pytest.approx(0.8, abs=0.03)


def test_where_seeds_decide_more_examples_do_not_help_and_more_seeds_do():
    seen = Effect(0.06, 4e-4, 299, 4e-4, 5e-5, 3, 300)
    needed = statistics.needed_to_decide(seen, 0.02)
    assert needed.alone is None
    assert needed.seeds > 3
    assert needed.examples >= 300
    steadier = replace(seen, seeds_variance=2e-5)
    assert statistics.needed_to_decide(steadier, 0.02).seeds == 3


def test_no_test_proves_a_gain_that_is_not_there():
    assert statistics.needed_to_decide(normal(0.01, 300), 0.02).examples is None
    assert statistics.needed_to_decide(normal(0.0201, 300), 0.02).examples is None
