"""A sweep over a real model: who wins, that nobody else's work is lost, and the seal."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from metier import recipes
from metier.data.ledger import ledger_path
from metier.errors import ConfigError, DivergedError, RunError
from metier.model.world import World
from metier.progress import Silent
from metier.recipes import planning, sweeping, tuning
from metier.recipes.sweeping import Sweep, parts, read_sweep, trainings
from metier.recipes.workbench import open_workbench, read_task
from metier.runs import Run
from metier.task import Arm
from tests.recipes.conftest import write_task

TRAINING = {
    "epochs": 8, "seeds": [0], "max_length": 128, "batch_size": 16, "patience": 0, "rehearsal": 0,
    "learning_rate": 9e-4,
}  # fmt: skip
ABSURD = (1e-6, 1.0, 1e3)
"""Nothing is learned at the first rate, and everything lost at the last."""


@pytest.fixture
def task(tmp_path: Path, stories260k: Path) -> Path:
    return write_task(tmp_path, stories260k, training=TRAINING)


def without_seconds(sweep: Sweep) -> dict[str, Any]:
    found = sweep.model_dump()
    for trial in found["trials"]:
        for rung in trial["rungs"]:
            rung.pop("seconds")
    return found


def weights(path: Path) -> bytes:
    (file,) = path.glob("*.safetensors")
    return file.read_bytes()


def test_absurd_rates_lose_in_the_first_rung(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "RATES", ABSURD)
    path = recipes.train(task, "full", tmp_path / "run", sweep=True)
    found = read_sweep(tmp_path / "run")
    winner, *losers = found.trials
    assert (winner.learning_rate, winner.rank, winner.overrides) == (9e-4, None, ())
    assert {trial.learning_rate for trial in losers} == {9e-10, 0.9}
    assert [len(trial.rungs) for trial in found.trials] == [2, 1, 1]
    assert [rung.steps for rung in winner.rungs] == [16, 32], "half of 8 passes of 4 steps, and all"
    first = {trial.learning_rate: trial.rungs[0] for trial in found.trials}
    assert all(first[9e-4].order < rung.order for rate, rung in first.items() if rate != 9e-4)
    assert winner.rungs[1].validation_mistakes < 0.3 < first[9e-10].validation_mistakes
    facts = tuning.read_facts(path)
    assert (facts.steps, facts.validation_loss) == (32, winner.rungs[1].validation_loss)


def swept(task: Path, arm: str, out: Path, progress: Silent | None = None) -> Path:
    """What the command does after it has looked at the budget."""
    bench = open_workbench(read_task(task, [f"arms=[{arm}]"]), task.parent)
    with Run(out) as run:
        return sweeping.sweep(bench, Arm.of(arm), 0, run, progress or Silent())


def test_the_winner_is_the_arm_that_its_settings_give(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, and a run with them finds it made; the test part is never opened."""
    path = swept(task, "lora", tmp_path / "run")
    found = read_sweep(tmp_path / "run")
    assert not ledger_path(tmp_path, "things").exists()
    assert path == tmp_path / "run" / found.directory
    assert {(trial.learning_rate, trial.rank) for trial in found.trials} == set(
        product((0.00027, 9e-4, 0.0027), (8, 16, 32))
    )
    reached = [len(trial.rungs) for trial in found.trials]
    assert reached == [4, 3, 2, 2, 1, 1, 1, 1, 1]
    for number in range(3):
        there = [trial for trial in found.trials if len(trial.rungs) > number]
        stood = [trial.rungs[number].order for trial in there]
        kept = sum(rungs > number + 1 for rungs in reached)
        assert max(stood[:kept]) <= min(stood[kept:]), "who goes on was no worse"
    assert not list((tmp_path / "run" / "unfinished").iterdir()), "no checkpoints are left"
    monkeypatch.setattr(planning, "hold", lambda *_: None)
    monkeypatch.setattr(planning, "plan_training", lambda *_: None)
    overrides = list(found.trials[0].overrides)
    alone = recipes.train(task, "lora", tmp_path / "alone", overrides)
    assert alone.name == path.name
    assert weights(alone) == weights(path)
    assert (alone / "log.jsonl").read_bytes() == (path / "log.jsonl").read_bytes()


class Killer(Silent):
    """Interrupts in a stage, after so many reports."""

    def __init__(self, stage: str, after: int) -> None:
        self._stage, self._left, self._here = stage, after, False

    def stage(self, name: str, total: float | None = None) -> None:
        self._here = name.startswith(self._stage)

    def advance(self, n: float = 1, **info: object) -> None:
        self._left -= self._here
        if not self._left:
            raise KeyboardInterrupt


def test_an_interrupted_sweep_goes_on(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every rung; what is finished is found, and the table is that of a sweep left alone."""
    trained: list[float] = []
    tune = tuning.tune

    def counted(*given: Any) -> Any:
        state = tune(*given)
        trained.append(given[-1])
        return state

    monkeypatch.setattr(sweeping, "RANKS", (0.5, 1.0))
    monkeypatch.setattr(sweeping, "RATES", (0.3, 1.0))
    monkeypatch.setattr(tuning, "tune", counted)
    whole = swept(task, "lora", tmp_path / "whole")
    expected = [1 / 4] * 4 + [1 / 2] * 2 + [1.0]
    assert trained == expected
    trained.clear()
    for stage, after in (("rung 1", 14), ("rung 2", 4), ("train lora", 3)):
        with pytest.raises(KeyboardInterrupt):
            swept(task, "lora", tmp_path / "cut", Killer(stage, after))
        assert not (tmp_path / "cut" / "sweep.json").exists()
    cut = swept(task, "lora", tmp_path / "cut")
    assert trained == expected, "each once, whatever came between"
    first, second = (read_sweep(tmp_path / name) for name in ("whole", "cut"))
    assert without_seconds(first) == without_seconds(second)
    assert weights(whole) == weights(cut)
    assert (swept(task, "lora", tmp_path / "cut"), trained) == (cut, expected)


def test_a_setting_that_diverges_is_out(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune, bad = tuning.tune, {0.0027}

    def breaking(bench: Any, *given: Any) -> Any:
        if bench.task.training.learning_rate in bad:
            raise DivergedError("step 3", "was no number", "")
        return tune(bench, *given)

    monkeypatch.setattr(tuning, "tune", breaking)
    swept(task, "full", tmp_path / "run")
    last = read_sweep(tmp_path / "run").trials[-1]
    assert last.learning_rate == 0.0027
    assert last.rungs[0].failed == "step 3: was no number"
    bad |= {9e-4, 0.00027}
    with pytest.raises(DivergedError, match="every setting failed; this one: step 3") as caught:
        swept(task, "full", tmp_path / "none")
    assert "training.learning_rate" in caught.value.remedy


def test_the_bar_of_a_rung_counts_settings() -> None:
    """A training that goes on counts its earlier steps again; one may end early."""
    shown: list[float] = []

    class Told(Silent):
        def advance(self, n: float = 1, **info: object) -> None:
            shown.append(n)

    bar = sweeping._Bar(Told())
    bar.begin(1 / 4, 1 / 2)
    bar.stage("train", 40)
    for n in (10, 1, 1):  # those before the rung, and two of its ten
        bar.advance(n)
    assert shown == [0, 0.1, 0.1]
    bar.end()
    assert sum(shown) == pytest.approx(1)


def test_rungs_and_work() -> None:
    assert parts(9) == [(9, 1 / 8), (4, 1 / 4), (2, 1 / 2), (1, 1)]
    assert parts(3) == [(3, 1 / 2), (1, 1)]
    assert parts(1) == [(1, 1)]
    assert trainings(9) == 9 / 8 + 4 / 8 + 2 / 4 + 1 / 2
    assert trainings(3) == 2


@pytest.mark.parametrize(
    ("setting", "cause"),
    [("training.learning_rate=0.5", "less than 1"), ("training.lora.rank=512", "or equal to 512")],
)
def test_a_grid_beyond_what_can_be_set_is_refused(
    task: Path, tmp_path: Path, setting: str, cause: str
) -> None:
    with pytest.raises(ConfigError, match=f"sweep, learning rate .*{cause}"):
        recipes.train(task, "lora", tmp_path / "run", [setting], sweep=True)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="work of one process"):
        sweeping._refuse_helpers(World(0, 2))


def test_a_sweep_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps([]))
    with pytest.raises((RunError, ConfigError)):
        read_sweep(tmp_path)
