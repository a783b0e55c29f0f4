import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from metier import recipes
from metier.errors import BudgetError, ConfigError, ModelError, RemoteError, RunError
from metier.evaluation import runner
from metier.evaluation.classical import Classical
from metier.evaluation.schema import Verdict
from metier.progress import Progress, Silent
from metier.recipes import experiment, tuning
from metier.recipes.finished import read_verdict
from metier.recipes.stages import Stages
from metier.recipes.workbench import Workbench, open_workbench, read_task
from metier.records import Chat, Completion
from metier.runs import Run
from metier.task import Arm
from tests.recipes.conftest import write_task


def stages(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.is_dir()}


def test_the_verdict_is_complete_and_valid(finished: Path) -> None:
    values = json.loads((finished / "run" / "verdict.json").read_text())
    jsonschema.validate(values, Verdict.model_json_schema())
    verdict = read_verdict(finished / "run")
    assert {arm.arm for arm in verdict.arms} == {"prompt", "classical", "lora", "lora/head"}
    assert verdict.reference in {"prompt", "classical"}
    assert verdict.data.test_openings == 1
    lora = next(arm for arm in verdict.arms if arm.arm == "lora")
    assert [seed.seed for seed in lora.seeds] == [0, 1]
    assert len(lora.forgetting) == 2
    assert lora.training_seconds > 0
    assert lora.peak_memory > 10**8
    assert lora.latency_requests == min(50, verdict.data.validation)
    assert lora.cost_per_1000 == pytest.approx(lora.latency_mean / 3.6 * 0.1)
    assert (finished / "run" / "report.html").read_text().startswith("<!doctype html>")


def test_a_base_writes_once_for_all_that_may_forget_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(name.startswith("rehearsal-") for name in stages(finished / "run")) == 1
    given: dict[str, list[bool]] = {}

    def tune(_: Workbench, arm: Arm, __: int, rehearsed: object, *___: object) -> None:
        given.setdefault(arm.name, []).append(rehearsed is not None)

    monkeypatch.setattr(tuning, "tune", tune)
    for weight in (1.0, 0.0):
        task = read_task(finished / "task.yaml", [f"training.rehearsal={weight}"])
        bench = open_workbench(task, finished)
        with Run(tmp_path / str(weight)) as run:
            for arm in ("lora", "full", "lora/head"):
                Stages(bench, run, Silent()).make(Arm.of(arm), 0)
        written = [s for s in stages(tmp_path / str(weight)) if s.startswith("rehearsal-")]
        assert len(written) == (weight > 0)
    assert given == {"lora": [True, False], "full": [True, False], "lora/head": [False, False]}


def test_a_second_run_repeats_nothing_and_opens_nothing(finished: Path) -> None:
    before = stages(finished / "run")
    began = time.monotonic()
    verdict = recipes.run(finished / "task.yaml", finished / "run")
    assert stages(finished / "run") == before
    assert verdict.data.test_openings == 1
    assert time.monotonic() - began < 30


def test_the_budget_holds_only_for_what_is_to_come(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate knows which arms are made; a changed setting makes them anew."""
    asked: list[set[str]] = []

    def plan(bench: Workbench, progress: Progress, made: set[str]) -> None:
        asked.append(made)
        raise BudgetError("budget", "is not enough", "allow more")

    monkeypatch.setattr(experiment.planning, "plan", plan)
    for overrides in ([], ["training.epochs=1"]):
        with pytest.raises(BudgetError):
            recipes.run(finished / "task.yaml", finished / "run", overrides)
    assert asked == [{"prompt", "classical", "lora", "lora/head"}, {"prompt", "classical"}]


def test_another_run_on_rows_of_the_same_test_part_is_counted(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "again", ignore=shutil.ignore_patterns("run"))
    task = tmp_path / "again" / "task.yaml"
    data = recipes.run(task, tmp_path / "run", ["arms=[classical]"]).data
    assert (data.test_openings, data.test_rows_seen) == (2, data.test)
    verdict = recipes.run(task, tmp_path / "run", ["arms=[classical]", "split.max_test=10"])
    assert (verdict.data.test_openings, verdict.data.test_rows_seen) == (3, 10)
    assert any("opened 3 times" in note for note in verdict.notes)
    data = recipes.run(task, tmp_path / "run", ["arms=[classical]", "split.seed=1"]).data
    assert data.test_openings > 1
    assert 0 < data.test_rows_seen < data.test


KILLED_BEFORE_THE_THIRD_CHECKPOINT = """
import os, signal, sys
from pathlib import Path
from metier import recipes
from metier.model import checkpoint
from metier.training import sft

def save(directory, snapshot, step):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(directory, snapshot, step)

real, checkpoint.save, sft._CHECKPOINT_SECONDS = checkpoint.save, save, 0.0
recipes.run(Path("task.yaml"), Path("run"))
"""


class Told(Silent):
    """What a person is told, and which steps are trained."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total, self.trained = 0.0, 0

    def stage(self, name: str, total: float | None = None) -> None:
        self.lines.append(name)
        if name.startswith("train"):
            self.total = total or 0.0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, n: float = 1, **info: object) -> None:
        self.trained += "loss" in info


def test_training_goes_on_after_a_kill(tmp_path: Path, stories260k: Path) -> None:
    """Of the third step nothing was kept: it is trained again, and no other."""
    training = {"epochs": 2, "seeds": [0], "max_length": 128, "batch_size": 16}
    task = write_task(tmp_path, stories260k, arms=["classical", "lora"], training=training)
    killed = [sys.executable, "-c", KILLED_BEFORE_THE_THIRD_CHECKPOINT]
    assert subprocess.run(killed, cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    run = tmp_path / "run"
    made = {path: path.stat().st_mtime_ns for path in run.glob("*/manifest.json")}
    assert {path.parent.name.rsplit("-", 1)[0] for path in made} == {
        "arm-classical",
        "rehearsal",
        "validation-classical",
    }
    told = Told()
    verdict = recipes.run(task, run, progress=told)
    assert "going on after step 2" in told.lines
    assert told.trained == told.total - 2 > 1
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert not list(run.glob(".partial-*"))
    assert not list(run.glob("unfinished/*"))
    assert [seed.steps for arm in verdict.arms for seed in arm.seeds] == [told.total]


def test_seconds_are_those_of_the_work_whenever_it_was_done(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {
        path.parent.name: json.loads(path.read_text())["seconds"]
        for path in (finished / "run").glob("*/manifest.json")
    }
    assert all(value > 0 for value in seconds.values())
    verdict = recipes.run(finished / "task.yaml", finished / "run")
    assert verdict.seconds == pytest.approx(sum(seconds.values()), rel=0.01)
    trained = [seed.seconds for arm in verdict.arms for seed in arm.seeds]
    assert len(trained) == 4
    assert sum(trained) < verdict.seconds
    assert not any("budget" in note for note in verdict.notes)
    monkeypatch.setattr(experiment.planning, "hold", lambda *_: None)
    verdict = recipes.run(finished / "task.yaml", finished / "run", budget=0.001)
    assert any("of a budget of" in note for note in verdict.notes)


def test_answers_go_on_after_an_endpoint_has_failed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "task")
    task, run = tmp_path / "task" / "task.yaml", tmp_path / "task" / "run"
    before = json.loads((run / "verdict.json").read_text())
    (graded,) = run.glob("test-classical-*")
    whole = (graded / "graded.jsonl").read_bytes()
    shutil.rmtree(graded)
    monkeypatch.setattr(runner, "_CHUNK", 4)
    answered: list[int] = []

    def generate(self: Classical, chats: list[Chat]) -> list[Completion]:
        if sum(answered) >= 8 and len(answered) == 2:
            answered.append(0)
            raise RemoteError("remote", "answered 503", "try again later; what is finished is kept")
        answered.append(len(chats))
        return real(self, chats)

    real = Classical.generate
    monkeypatch.setattr(Classical, "generate", generate)
    with pytest.raises(RemoteError):
        recipes.run(task, run)
    assert list(run.glob("unfinished/test-classical-*/graded.jsonl"))
    recipes.run(task, run)
    assert sum(answered) == len(whole.splitlines()) == before["data"]["test"]
    assert (graded / "graded.jsonl").read_bytes() == whole
    assert not list(run.glob("unfinished/test-*"))


def test_no_verdict_stands_beside_the_files_of_another(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "task")
    task, run = tmp_path / "task" / "task.yaml", tmp_path / "task" / "run"
    assert read_verdict(run).margin == 0.02

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "write_report", fail)
        with pytest.raises(OSError, match="full"):
            recipes.run(task, run, ["margin=0.5"])
    with pytest.raises(RunError, match=r"verdict\.json"):
        read_verdict(run)
    recipes.run(task, run, ["margin=0.5"])
    assert read_verdict(run).margin == 0.5


def test_one_arm_is_trained_over_one_base(tmp_path: Path, stories260k: Path) -> None:
    task = write_task(tmp_path, stories260k)
    bases = f"base=['{stories260k}', starter]"
    with pytest.raises(ConfigError, match="names 2 bases") as caught:
        recipes.train(task, "lora", tmp_path / "run", [bases])
    assert f"--set base={stories260k.resolve()}" in caught.value.remedy
    assert not (tmp_path / "run").exists()
    training = ["training.epochs=1", f"base={stories260k}"]
    assert (recipes.train(task, "lora", tmp_path / "run", training) / "training.json").is_file()


def test_arms_without_a_base_run_without_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "task", ignore=shutil.ignore_patterns("run"))
    task = tmp_path / "task" / "task.yaml"
    recipes.run(task, tmp_path / "run", ["arms=[classical]", "base=/nowhere"])
    with pytest.raises(ModelError, match="/nowhere"):
        recipes.run(task, tmp_path / "other", ["arms=[classical,prompt]", "base=/nowhere"])


def test_work_beyond_the_budget_is_refused_before_it_starts(
    tmp_path: Path, stories260k: Path
) -> None:
    task = write_task(tmp_path, stories260k)
    with pytest.raises(BudgetError, match="would take about") as caught:
        recipes.run(task, tmp_path / "run", budget=0.0001)
    assert "--budget" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_two_processes_cannot_write_one_run(finished: Path) -> None:
    from metier.runs import Run

    with Run(finished / "run"), pytest.raises(RunError, match="in use"):
        recipes.run(finished / "task.yaml", finished / "run")


def test_a_damaged_stage_is_made_again(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    answers = next((copy / "run").glob("test-classical-*")) / "graded.jsonl"
    good = answers.read_bytes()
    answers.write_bytes(good.replace(b'"value": 1.0', b'"value": 0.0', 1))
    recipes.run(copy / "task.yaml", copy / "run")
    assert answers.read_bytes() == good
