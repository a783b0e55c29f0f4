"""How often the verdict ships a tuned arm that it should not, and one that it should.

Simulates tasks whose truth is known and lets `metier.evaluation.verdict.decide` judge each: the
choice of the reference on validation, Holm's correction and the clustered, seed-aware intervals
are all in. Controls leave one of these out and must ship too often, or the figures mean nothing.

    python benchmarks/calibration.py [--tasks 2000]

How a task is made. Example i has a difficulty z_i; an arm answers it rightly when
``sqrt(r) z_i + noise`` is below a threshold that gives the arm its accuracy. ``r`` is solved so
that the best tuned arm and the best simpler arm disagree on the wanted share of examples. Seeds of
one tuned arm share part of the noise, so that two of them disagree half as often; each seed's own
accuracy is drawn around the arm's. An example copies the draws of its cluster with probability
sqrt(correlation), which makes the correlation of any two examples of a cluster exact, for scores
and for differences. Clusters have 1 to 5 examples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import optimize, stats

from metier.evaluation.comparison import Measured, choose_reference
from metier.evaluation.schema import DataSummary
from metier.evaluation.statistics import Floats
from metier.evaluation.verdict import decide
from metier.runs import versions, write_atomic
from metier.task import Arm, Data, Task

RESULTS = Path(__file__).parent / "results" / "calibration.json"
SIMPLER = ("prompt", "few-shot", "rag", "classical")
MOST_SHIPPED, LEAST_SHIPPED = 0.05, 0.80
_BEST_SIMPLER = 0.6


@dataclass(frozen=True, slots=True)
class Setting:
    """A kind of task.

    Attributes:
        gains: true gain of each tuned arm over the best simpler arm.
        behind: how far each simpler arm is behind the best one.
        discordance: share of examples on which the best tuned and the best simpler arm disagree.
        seed_sd: standard deviation of the accuracy of one training around that of its arm.
        correlation: of two examples of a cluster.
        churn: disagreement of two seeds of an arm, as a share of `discordance`.
        test: sealed test examples, a multiple of 15.
        validation: validation examples, likewise.
        seeds: trainings of each tuned arm.
        margin: what a gain must exceed.

    """

    gains: tuple[float, ...]
    behind: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    discordance: float = 0.2
    seed_sd: float = 0.015
    correlation: float = 0.3
    churn: float = 0.5
    test: int = 300
    validation: int = 150
    seeds: int = 3
    margin: float = 0.02


@dataclass(frozen=True, slots=True)
class Simulated:
    """One task as the verdict sees it."""

    arms: list[Measured]
    clusters: NDArray[np.intp]
    setting: Setting


def simulate(setting: Setting, tasks: int, seed: int) -> Iterator[Simulated]:
    """Draw tasks of one kind."""
    generator = np.random.default_rng(seed)
    tuned = _BEST_SIMPLER + np.array(setting.gains)
    simpler = _BEST_SIMPLER - np.array(setting.behind)
    shared = _shared_variance(_BEST_SIMPLER, tuned.max(), setting.discordance)
    within = _shared_variance(tuned.max(), tuned.max(), setting.churn * setting.discordance)
    for _ in range(tasks):
        drawn = generator.normal(tuned[:, None], setting.seed_sd, (len(tuned), setting.seeds))
        trained = drawn.clip(0.001, 0.999)
        parts = [
            _answers(generator, size, simpler, trained, (shared, max(within, shared)), setting)
            for size in (setting.test, setting.validation)
        ]
        (test, clusters), (validation, _) = parts
        names = [Arm(method=method) for method in SIMPLER[: len(simpler)]]
        names += [Arm(method="lora", base=str(number)) for number in range(len(tuned))]
        arms = [
            Measured(
                arm, on_test, on_validation, latency_mean=0.1, latency_p50=0.1, latency_p95=0.2
            )
            for arm, on_test, on_validation in zip(names, test, validation, strict=True)
        ]
        yield Simulated(arms, clusters, setting)


def _answers(
    generator: np.random.Generator,
    size: int,
    simpler: Floats,
    trained: Floats,
    variances: tuple[float, float],
    setting: Setting,
) -> tuple[list[Floats], NDArray[np.intp]]:
    """Scores of every arm, each of shape (seeds, size), and the cluster of each example."""
    shared, within = variances
    arms, seeds = trained.shape
    rows = 1 + len(simpler) + arms + arms * seeds
    draws, clusters = _clustered_normals(generator, rows, size, setting.correlation)
    difficulty, own, of_arm, of_seed = np.split(draws, np.cumsum([1, len(simpler), arms]))
    simple = np.sqrt(shared) * difficulty + np.sqrt(1 - shared) * own
    tuned = (
        np.sqrt(shared) * difficulty
        + np.sqrt(within - shared) * of_arm[:, None]
        + np.sqrt(1 - within) * of_seed.reshape(arms, seeds, size)
    )
    right = [row[None] for row in simple < stats.norm.ppf(simpler)[:, None]]
    right += list(tuned < stats.norm.ppf(trained)[:, :, None])
    return [one.astype(float) for one in right], clusters


def _clustered_normals(
    generator: np.random.Generator, rows: int, size: int, correlation: float
) -> tuple[Floats, NDArray[np.intp]]:
    clusters = np.repeat(np.arange(size // 3), np.resize([1, 2, 3, 4, 5], size // 3))
    of_cluster = generator.standard_normal((rows, size // 3))[:, clusters]
    copies = generator.random(size) < np.sqrt(correlation)
    return np.where(copies, of_cluster, generator.standard_normal((rows, size))), clusters


def _shared_variance(first: float, second: float, discordance: float) -> float:
    """The correlation at which two arms of these accuracies disagree on this share of examples."""
    thresholds = stats.norm.ppf([first, second])

    def excess(correlation: float) -> float:
        both = stats.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
        return float(first + second - 2 * both.cdf(thresholds) - discordance)

    return float(optimize.brentq(excess, 0.0, 0.99999))


def ships(task: Simulated) -> bool:
    """Whether the verdict ships a tuned arm."""
    found = decide(
        Task(name="task", kind="extraction", data=Data(file="-"), margin=task.setting.margin),
        task.arms,
        clusters=task.clusters,
        expected=[],
        labels=[],
        data=DataSummary(
            train=0,
            validation=task.setting.validation,
            test=task.setting.test,
            test_clusters=task.setting.test // 3,
        ),
    )
    return found.decision == "ship"


# Controls: the same path with one safeguard taken out.


def without_clusters(task: Simulated) -> bool:
    """Every example is taken for independent of the others."""
    return ships(replace(task, clusters=np.arange(len(task.clusters))))


def without_seeds(task: Simulated) -> bool:
    """The mean of the seeds is taken for one model: their variance is ignored."""
    arms = [replace(arm, scores=arm.scores.mean(axis=0, keepdims=True)) for arm in task.arms]
    return ships(replace(task, arms=arms))


def without_holm(task: Simulated) -> bool:
    """Every tuned arm is judged as if it were the only one."""
    simpler = [arm for arm in task.arms if arm.simpler]
    tuned = [arm for arm in task.arms if not arm.simpler]
    return any(ships(replace(task, arms=[*simpler, arm])) for arm in tuned)


def without_guard(task: Simulated) -> bool:
    """Of the simpler arms only the one chosen on validation is looked at on the test part."""
    simpler = [arm for arm in task.arms if arm.simpler]
    tuned = [arm for arm in task.arms if not arm.simpler]
    return ships(replace(task, arms=[choose_reference(simpler), *tuned]))


@dataclass(frozen=True, slots=True)
class Scenario:
    """One line of the table: a kind of task, what judges it, and what must come out."""

    name: str
    setting: Setting
    goal: str = ""
    judge: Callable[[Simulated], bool] = ships


NOT_MORE, NOT_LESS, TOO_OFTEN = "at most 0.05", "at least 0.80", "above 0.05"
AT_MARGIN, ABOVE = Setting((0.02,) * 3), Setting((0.12,) * 3)
ONE_SIMPLER = replace(AT_MARGIN, behind=(0.0,))
UNEQUAL = replace(AT_MARGIN, behind=(0.0, 0.07, 0.07, 0.07))


def main_scenarios() -> Iterable[Scenario]:
    """The setting of the goal, and the same with arms that disagree more."""
    for discordance in (0.2, 0.3, 0.4):
        null, strong = (replace(s, discordance=discordance) for s in (AT_MARGIN, ABOVE))
        yield Scenario(f"discordance {discordance}, gain = margin", null, NOT_MORE)
        goal = NOT_LESS if discordance == 0.2 else ""
        yield Scenario(f"discordance {discordance}, gain = margin + 10 points", strong, goal)


def other_scenarios() -> Iterable[Scenario]:
    """Harder kinds of task, and the controls."""
    yield Scenario("one tuned arm of three at margin + 10 points", Setting((0.12, 0.02, 0.02)))
    steady = replace(ABOVE, churn=0.1)
    yield Scenario("seeds nearly alike, gain = margin + 10 points", steady)
    yield Scenario("one simpler arm", ONE_SIMPLER, NOT_MORE)
    yield Scenario("three simpler arms 7 points behind", UNEQUAL, NOT_MORE)
    spread = replace(AT_MARGIN, behind=(0.0, 0.05, 0.1, 0.15))
    yield Scenario("simpler arms 5 points apart", spread, NOT_MORE)
    noisy = replace(ONE_SIMPLER, seed_sd=0.08)
    yield Scenario("one simpler arm, seed SD 8 points", noisy, NOT_MORE)
    alike = replace(ONE_SIMPLER, correlation=0.8)
    yield Scenario("one simpler arm, cluster correlation 0.8", alike, NOT_MORE)
    small = replace(ONE_SIMPLER, test=60, validation=60)
    yield Scenario("one simpler arm, 60 test examples", small, NOT_MORE)
    eight = replace(ONE_SIMPLER, gains=(0.02,) * 8, discordance=0.4, seeds=1, seed_sd=0.0)
    yield Scenario("one simpler arm, eight tuned ones of one seed", eight, NOT_MORE)
    yield Scenario("control: clusters ignored, correlation 0.8", alike, TOO_OFTEN, without_clusters)
    yield Scenario("control: seeds ignored, SD 8 points", noisy, TOO_OFTEN, without_seeds)
    yield Scenario("control: no Holm, eight tuned arms", eight, TOO_OFTEN, without_holm)
    yield Scenario("control: no guard, three 7 points behind", UNEQUAL, TOO_OFTEN, without_guard)


def measure(scenario: Scenario, tasks: int, seed: int = 0) -> dict[str, object]:
    """Share of tasks that ship, with its 95 % interval (Clopper and Pearson), against the goal."""
    shipped = sum(scenario.judge(task) for task in simulate(scenario.setting, tasks, seed))
    interval = stats.binomtest(shipped, tasks).proportion_ci(0.95)
    low, high = float(interval.low), float(interval.high)
    holds = {NOT_MORE: low <= MOST_SHIPPED, NOT_LESS: high >= LEAST_SHIPPED, TOO_OFTEN: low > 0.05}
    return {
        "scenario": scenario.name,
        "tasks": tasks,
        "against": "best simpler arm",
        "figure": "share of tasks in which a tuned arm is shipped",
        "value": shipped / tasks,
        "low": low,
        "high": high,
        "goal": scenario.goal,
        "holds": holds.get(scenario.goal, True),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all scenarios, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=2_000, help="per main scenario")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    start, rows = time.monotonic(), []
    plans = [(scenario, chosen.tasks) for scenario in main_scenarios()]
    plans += [(scenario, chosen.tasks // 2) for scenario in other_scenarios()]
    for scenario, tasks in plans:
        rows.append(row := measure(scenario, tasks))
        verdict = "" if row["holds"] else "  DOES NOT HOLD"
        print(
            f"{row['scenario']:45} {row['value']:6.3f} ({row['low']:.3f} to {row['high']:.3f})"
            f"  {row['goal']}{verdict}",
            flush=True,
        )
    result = {
        "command": f"python benchmarks/calibration.py --tasks {chosen.tasks}",
        "seconds": round(time.monotonic() - start),
        "versions": versions() | {"numpy": np.__version__, "scipy": scipy.__version__},
        "rows": rows,
    }
    write_atomic(chosen.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
