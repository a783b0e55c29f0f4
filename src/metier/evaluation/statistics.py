"""Means, paired differences, tests and power for scores with clusters and seeds.

Two things make a test score uncertain. *Examples*: another test part would have other examples,
and examples of one cluster (a customer, a document, near-duplicates) resemble each other, so a
cluster is the unit that counts. *Seeds*: another training would give another model. Every
interval here holds both. The frame is Miller 2024 (arXiv 2411.00640): cluster-robust standard
errors, and paired differences between arms that answered the same examples.

Scores come as a matrix of shape (seeds, examples); an arm that is not trained has one row.
One-sided error is held at `LEVEL` = 2.5 %, so a bound agrees with the end of a 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from metier.evaluation.schema import Estimate

Floats = NDArray[np.float64]
Clusters = Sequence[str] | NDArray[np.intp]
"""The cluster of each example, by name or number."""

LEVEL = 0.025
"""One-sided error of every bound that decides."""
POWER = 0.8
"""Chance to prove a gain for which a test is planned."""
_ENUMERATE = 12
_DRAWS = 9_999
_ROUNDING = 1e-20
_LEAST_DIFFERING = 4
_MOST_EXAMPLES = 1_000_000
_MOST_SEEDS = 10


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean over examples and seeds with what is needed for its interval.

    The variance of the mean is ``examples_variance + seeds_variance``. The second, taken from the
    spread of the seeds' means, holds some noise of the examples too (``mixed_variance``) that the
    first has counted already: this errs on the safe side, as leaving out the intersection term of
    two-way cluster-robust variance does (Cameron, Gelbach and Miller 2011).

    Attributes:
        mean: mean over seeds and examples.
        examples_variance: variance of the mean from the choice of examples.
        examples_df: its degrees of freedom.
        seeds_variance: variance of the mean from the choice of seeds; 0 with one seed.
        mixed_variance: the part of `seeds_variance` that more examples would remove.
        seeds: number of seeds.
        examples: number of examples.

    """

    mean: float
    examples_variance: float
    examples_df: float
    seeds_variance: float
    mixed_variance: float
    seeds: int
    examples: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.examples_variance + self.seeds_variance)

    @property
    def training_variance(self) -> float:
        """The part of `seeds_variance` that only more seeds would lessen."""
        return max(self.seeds_variance - self.mixed_variance, 0.0)

    @property
    def df(self) -> float:
        """Degrees of freedom of `error`.

        Satterthwaite (1946) over both levels. Where seeds carry more than half of what examples
        do, only the seeds' own S - 1 count: there Satterthwaite's value lets the error double.
        """
        if self.seeds_variance > self.examples_variance / 2:
            return min(self.seeds - 1, self.examples_df)
        if self.seeds_variance == 0 or math.isinf(self.examples_variance):
            return self.examples_df
        share = self.seeds_variance / (self.examples_variance + self.seeds_variance)
        return 1 / (share**2 / (self.seeds - 1) + (1 - share) ** 2 / self.examples_df)

    def low(self, level: float = LEVEL) -> float:
        """Lower confidence bound with one-sided error `level`."""
        return self.mean - _t_quantile(self.df, level) * self.error

    def high(self, level: float = LEVEL) -> float:
        """Upper confidence bound with one-sided error `level`."""
        return self.mean + _t_quantile(self.df, level) * self.error

    def interval(self) -> Estimate:
        """The mean with its 95 % interval."""
        return Estimate(mean=self.mean, low=self.low(), high=self.high())

    def p_at_most(self, margin: float) -> float:
        """One-sided p-value of the hypothesis that the true mean is `margin` or less."""
        if self.error == 0:
            return float(self.mean <= margin)
        return float(special.stdtr(self.df, -(self.mean - margin) / self.error))


def _t_quantile(df: float, level: float) -> float:
    return float(-special.stdtrit(df, level))


def effect(values: Floats, clusters: Clusters) -> Effect:
    """Mean of a (seeds, examples) matrix with cluster-robust and seed-to-seed variance.

    The examples' variance is Bell and McCaffrey's CR2 (2002), which for a mean divides the squared
    residual sum of a cluster by ``1 - share of the cluster``. Its degrees of freedom are those of
    Imbens and Kolesár (2016): they heed the correlation inside clusters, so that one huge cluster
    is not taken for many. With a single cluster nothing can be said: the variance is infinite.

    Args:
        values: finite numbers, shape (seeds, examples).
        clusters: the cluster of each example.

    """
    index = cluster_index(clusters)
    sizes = np.bincount(index).astype(float)
    seeds, n = values.shape
    per_seed, per_example = values.mean(axis=1), values.mean(axis=0)
    mean = float(per_example.mean())
    pairs = max(seeds - 1, 1) * seeds
    mixed = values - per_example - per_seed[:, None] + mean
    return Effect(
        mean=mean,
        examples_variance=_clustered_variance(per_example - mean, index, sizes),
        examples_df=_clustered_df(per_example - mean, index, sizes),
        seeds_variance=float(((per_seed - mean) ** 2).sum()) / pairs,
        mixed_variance=sum(_clustered_variance(row, index, sizes) for row in mixed) / pairs,
        seeds=seeds,
        examples=n,
    )


def cluster_index(clusters: Clusters) -> NDArray[np.intp]:
    """Number the clusters from 0; shape (examples,)."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1]


def independent_examples(clusters: Clusters) -> float:
    """Number of independent examples that say as much, if those of a cluster are all alike."""
    sizes = np.bincount(cluster_index(clusters)).astype(float)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _clustered_variance(residuals: Floats, index: NDArray[np.intp], sizes: Floats) -> float:
    """CR2 variance of a mean from its residuals, shape (examples,)."""
    if len(sizes) < 2:
        return math.inf
    n = sizes.sum()
    sums = _sums(residuals, index)
    return float((sums**2 / (1 - sizes / n)).sum() / n**2)


def _clustered_df(residuals: Floats, index: NDArray[np.intp], sizes: Floats) -> float:
    """Degrees of freedom of the above: of a sum of clusters whose variances differ with size."""
    squares, pairs = float((residuals**2).sum()), float((sizes * (sizes - 1)).sum())
    alike = float((_sums(residuals, index) ** 2).sum()) - squares
    correlation = min(max(alike / pairs / (squares / sizes.sum()), 0), 1) if pairs * squares else 0
    variances = sizes * (1 + (sizes - 1) * correlation)
    return max(float(variances.sum() ** 2 / (variances**2).sum()) - 1, 1.0)


def _sums(values: Floats, index: NDArray[np.intp]) -> Floats:
    """Sum of the values of each cluster, shape (clusters,)."""
    return np.asarray(np.bincount(index, values), dtype=np.float64)


def mean_score(scores: Floats, clusters: Clusters) -> Estimate:
    """Mean of scores between 0 and 1 with a 95 % interval that stays between 0 and 1.

    Wilson's interval (1927) at the effective number of examples ``mean (1 - mean) / variance``
    with Student's quantile (Dean and Pagano 2015, for surveys). Where all scores are equal, the
    examples of a cluster count as one: 0 of 300 is 0.0 to 1.3 %, never plus or minus nothing.

    Args:
        scores: between 0 and 1, shape (seeds, examples).
        clusters: the cluster of each example.

    """
    found = effect(scores, clusters)
    mean, variance = min(max(found.mean, 0.0), 1.0), found.error**2
    alike = variance < _ROUNDING
    size = independent_examples(clusters) if alike else mean * (1 - mean) / variance
    square = _t_quantile(found.df, LEVEL) ** 2
    centre = (size * mean + square / 2) / (size + square)
    half = math.sqrt(square * size * mean * (1 - mean) + square**2 / 4) / (size + square)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(mean=mean, low=min(low, mean), high=max(high, mean))


def ratio(numerators: Floats, denominators: Floats) -> Estimate:
    """Ratio of two sums over independent units, such as windows of text, with its 95 % interval.

    The ratio is made a mean by linearisation (the delta method; Cochran 1977, section 6.3).
    """
    found = numerators.sum() / denominators.sum()
    values = found + (numerators - found * denominators) / denominators.mean()
    return effect(values[None, :], np.arange(len(values))).interval()


def paired_difference(scores: Floats, reference: Floats, clusters: Clusters) -> Effect:
    """Mean difference of two arms on the same examples.

    Where fewer than four clusters differ, the examples' variance is taken as if four did, each by
    a whole point (after the four pseudo-observations of Agresti and Coull 1998): equal answers do
    not give certainty.

    Args:
        scores: of the arm, between 0 and 1, shape (seeds, examples).
        reference: of the other arm, shape (seeds, examples); several rows are averaged.
        clusters: the cluster of each example.

    """
    differences = scores - reference.mean(axis=0)
    found = effect(differences, clusters)
    differing = len(set(cluster_index(clusters)[(differences != 0).any(axis=0)]))
    missing = max(_LEAST_DIFFERING - differing, 0) / independent_examples(clusters) ** 2
    return replace(found, examples_variance=found.examples_variance + missing)


def difference_interval(difference: Effect) -> Estimate:
    """A paired difference of scores with its 95 % interval, which ends at -1 and 1."""
    plain = difference.interval()
    return Estimate(mean=plain.mean, low=max(plain.low, -1.0), high=min(plain.high, 1.0))


@dataclass(frozen=True, slots=True)
class Tested:
    """A two-sided p-value of 'no difference' and the test that gave it."""

    p_value: float
    test: str


def difference_test(scores: Floats, reference: Floats, clusters: Clusters) -> Tested:
    """Test whether two arms differ, two-sided.

    One seed: exact McNemar where every score is 0 or 1 and every cluster a single example, else
    sign-flip permutation on clusters. Several seeds: sign-flip speaks only of the models trained,
    so the larger of its p-value and that of the interval (Student's t, seeds included) counts.

    Args:
        scores: of the arm, shape (seeds, examples).
        reference: of the other arm, shape (seeds, examples); several rows are averaged.
        clusters: the cluster of each example.

    """
    index, base = cluster_index(clusters), reference.mean(axis=0)
    difference = scores.mean(axis=0) - base
    single = int(index.max()) + 1 == len(index)
    binary = bool(np.isin(scores, (0, 1)).all() and np.isin(base, (0, 1)).all())
    if len(scores) == 1 and single and binary:
        return Tested(mcnemar(difference), "exact McNemar")
    flipped = sign_flip(_sums(difference, index))
    if len(scores) == 1:
        return flipped
    whole = paired_difference(scores, reference, clusters)
    by_t = min(1.0, 2 * min(whole.p_at_most(0), 1 - whole.p_at_most(0)))
    name = f"larger of {flipped.test} and t with {len(scores)} seeds"
    return Tested(max(flipped.p_value, by_t), name)


def mcnemar(difference: Floats) -> float:
    """Exact two-sided McNemar p-value from differences of -1, 0 and 1 (McNemar 1947)."""
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return min(1.0, 2 * float(special.bdtr(min(better, worse), better + worse, 0.5)))


def sign_flip(sums: Floats, seed: int = 0) -> Tested:
    """Two-sided sign-flip permutation test that the clusters' difference sums centre on 0.

    Exact over all sign patterns where few clusters differ; otherwise seeded Monte Carlo, in which
    the observed pattern counts as one draw (Phipson and Smyth 2010), so p is never 0.

    Args:
        sums: sum of the paired differences of each cluster, shape (clusters,).
        seed: of the Monte Carlo draws.

    """
    moving = sums[sums != 0]
    observed = abs(float(moving.sum())) - 1e-9 * float(np.abs(moving).sum())
    if len(moving) <= _ENUMERATE:
        patterns = np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving)) & 1
        share = float((np.abs((2 * patterns - 1) @ moving) >= observed).mean())
        return Tested(share, f"exact sign-flip on {len(sums):,} clusters")
    generator = np.random.default_rng(seed)
    extreme, total = 0, float(moving.sum())
    for draws in _chunks(_DRAWS, 1_000):
        chosen = _coins(generator, draws, len(moving))
        extreme += int((np.abs(2 * (chosen @ moving) - total) >= observed).sum())
    name = f"sign-flip on {len(sums):,} clusters ({_DRAWS + 1:,} draws)"
    return Tested((1 + extreme) / (1 + _DRAWS), name)


def _coins(generator: np.random.Generator, draws: int, coins: int) -> Floats:
    """Fair coins, 0 or 1, shape (draws, coins)."""
    raw = np.frombuffer(generator.bytes(draws * coins // 8 + 1), dtype=np.uint8)
    return np.unpackbits(raw, count=draws * coins).reshape(draws, coins).astype(np.float64)


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return adjusted


def holm_low(effects: Sequence[Effect], level: float = LEVEL) -> list[float]:
    """For each effect, the largest margin that it would clear under Holm's correction.

    The bound is above a margin exactly when Holm's adjusted p-value of 'at most that margin' is
    below `level`. It is the bound of a decision at one margin set beforehand; the bounds of
    several arms are not a simultaneous confidence region.
    """
    bounds, running = [0.0] * len(effects), math.inf
    waiting = list(range(len(effects)))
    while waiting:
        lows = {i: effects[i].low(level / len(waiting)) for i in waiting}
        best = max(waiting, key=lambda i: lows[i])
        running = min(running, lows[best])
        bounds[best] = running
        waiting.remove(best)
    return bounds


def non_inferior(loss: Estimate, tolerance: float) -> bool:
    """Whether a loss is proven to be within the tolerance: its upper end is.

    Several abilities that must all hold need no correction (intersection-union, Berger 1982).
    """
    return loss.high <= tolerance


@dataclass(frozen=True, slots=True)
class Needed:
    """The test that would prove a gain with a power of 80 %.

    Attributes:
        alone: test examples needed with the seeds there are; None where no number will do.
        seeds: seeds of the least work that will do, counted in graded answers; None where not even
            10 seeds and a million test examples will do.
        examples: test examples of the least work that will do; None likewise.

    """

    alone: int | None
    seeds: int | None
    examples: int | None


def detectable_gain(found: Effect, level: float = LEVEL) -> float:
    """How far above the margin a true gain must be to be found with 80 % power by this test."""
    return _reach(found, level) * found.error


def needed_to_decide(found: Effect, margin: float, level: float = LEVEL) -> Needed:
    """Size of the test that would prove, with 80 % power, a true gain equal to the one seen.

    Variances are those seen: discordance, correlation inside clusters and spread of the seeds.
    Where the spread of the seeds is what counts, more examples do not help and more seeds do.

    Args:
        found: the paired difference seen.
        margin: what the gain must exceed.
        level: one-sided error, already divided by the number of arms compared.

    """
    most = _MOST_SEEDS if found.seeds > 1 else 1
    plans = [(_fewest(found, margin, level, n), n) for n in range(found.seeds, most + 1)]
    able = [(examples * seeds, seeds, examples) for examples, seeds in plans if examples]
    _, seeds, examples = min(able, default=(0, None, None))
    return Needed(plans[0][0] if plans else None, seeds, examples)


def _fewest(found: Effect, margin: float, level: float, seeds: int) -> int | None:
    """The smallest test part that will do; more may not: few seeds then decide the bound."""
    if found.mean <= margin or math.isinf(found.error):
        return None
    for examples in _sizes(found.examples):
        planned = _resized(found, examples, seeds)
        if found.mean - margin >= detectable_gain(planned, level):
            return examples
    return None


def _sizes(examples: int) -> Iterator[int]:
    """Sizes of test part from this one to a million, each a tenth larger, in round numbers."""
    size = float(examples)
    while size <= _MOST_EXAMPLES:
        yield examples if size == examples else int(round(size, 1 - int(math.log10(size))))
        size *= 1.1


def _reach(found: Effect, level: float) -> float:
    """Standard errors between the margin and a gain that is found with 80 % power."""
    return _t_quantile(found.df, level) + _t_quantile(found.df, 1 - POWER)


def _resized(found: Effect, examples: int, seeds: int) -> Effect:
    """The effect as it would look with another number of examples and seeds."""
    shrink = found.examples / examples
    return replace(
        found,
        examples_variance=found.examples_variance * shrink,
        examples_df=max(found.examples_df / shrink, 1.0),
        seeds_variance=(found.training_variance + found.mixed_variance * shrink)
        * found.seeds
        / seeds,
        mixed_variance=found.mixed_variance * shrink * found.seeds / seeds,
        seeds=seeds,
        examples=examples,
    )
