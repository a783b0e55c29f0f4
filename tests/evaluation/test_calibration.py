"""The calibration benchmark on fewer tasks, and its controls: broken verdicts must be found out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.scripts import load_script

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration.py"


@pytest.fixture(scope="module")
def calibration():
    return load_script(BENCHMARK)


def shipped(calibration, setting, tasks, judge=None):
    judge = judge or calibration.ships
    return sum(judge(task) for task in calibration.simulate(setting, tasks, seed=11))


def too_often(count, tasks):
    """Whether more than 5 % ship, beyond what luck would do in 1 of 100 such tests."""
    return stats.binomtest(count, tasks, 0.05, alternative="greater").pvalue < 0.01


def test_at_a_gain_of_the_margin_at_most_5_percent_ship(calibration):
    assert not too_often(shipped(calibration, calibration.AT_MARGIN, 200), 200)


def test_at_10_points_above_the_margin_at_least_80_percent_ship(calibration):
    count = shipped(calibration, calibration.ABOVE, 100)
    assert stats.binomtest(count, 100, 0.8, alternative="less").pvalue > 0.01


@pytest.mark.parametrize("control", ["clusters ignored", "seeds ignored", "no Holm", "no guard"])
def test_the_control_ships_too_often(calibration, control):
    scenario = next(s for s in calibration.other_scenarios() if control in s.name)
    assert too_often(shipped(calibration, scenario.setting, 150, scenario.judge), 150)


def test_tasks_are_as_their_setting_says(calibration):
    setting = calibration.Setting((0.12, 0.02), seed_sd=0.03)
    tasks = list(calibration.simulate(setting, 400, seed=12))
    right = {arm.arm.name: [] for arm in tasks[0].arms}
    disagree, alike, spread = [], [], []
    for task in tasks:
        for arm in task.arms:
            right[arm.arm.name].append(arm.scores.mean())
        simple, best = task.arms[3].scores[0], task.arms[4].scores
        disagree.append((simple != best[0]).mean())
        pairs = np.flatnonzero(np.diff(task.clusters) == 0)
        alike.append(np.corrcoef(simple[pairs], simple[pairs + 1])[0, 1])
        spread.append(best.mean(axis=1).var(ddof=1))
    assert np.mean(right["classical"]) == pytest.approx(0.6, abs=0.01)
    assert np.mean(right["lora@0"]) == pytest.approx(0.72, abs=0.01)
    assert np.mean(disagree) == pytest.approx(0.2, abs=0.01)
    assert np.mean(alike) == pytest.approx(0.3, abs=0.03)
    assert 0.03**2 < np.mean(spread) < 0.04**2


def test_the_command_writes_rows_with_their_goals(calibration, tmp_path, capsys):
    calibration.main(["--tasks", "2", "--out", str(tmp_path / "calibration.json")])
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert {"command", "seconds", "versions", "rows"} <= set(found)
    for row in found["rows"]:
        assert row["low"] <= row["value"] <= row["high"]
        assert isinstance(row["holds"], bool)
    assert found["rows"][0]["goal"] == "at most 0.05"
    assert len(capsys.readouterr().out.splitlines()) == len(found["rows"])
