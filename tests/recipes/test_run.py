import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

from metier import recipes
from metier.errors import BudgetError, RunError
from metier.evaluation.schema import Verdict
from metier.recipes.experiment import read_verdict
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
    assert (finished / "run" / "report.html").read_text().startswith("<!doctype html>")


def test_a_second_run_repeats_nothing_and_opens_nothing(finished: Path) -> None:
    before = stages(finished / "run")
    began = time.monotonic()
    verdict = recipes.run(finished / "task.yaml", finished / "run")
    assert stages(finished / "run") == before
    assert verdict.data.test_openings == 1
    assert time.monotonic() - began < 30


def test_another_run_on_the_same_test_part_is_counted(
    finished: Path, tmp_path: Path, stories260k: Path
) -> None:
    shutil.copytree(finished, tmp_path / "again", ignore=shutil.ignore_patterns("run"))
    task = tmp_path / "again" / "task.yaml"
    verdict = recipes.run(task, tmp_path / "run", ["arms=[classical]"])
    assert verdict.data.test_openings == 2
    assert any("opened" in note for note in verdict.notes)


def test_training_goes_on_after_a_kill(tmp_path: Path, stories260k: Path) -> None:
    task = write_task(
        tmp_path,
        stories260k,
        arms=["classical", "lora"],
        training={
            "epochs": 1000,
            "patience": 0,
            "seeds": [0],
            "max_length": 128,
            "batch_tokens": 256,
        },
    )
    command = [Path(sys.executable).with_name("metier"), "run", task, "--out", "run"]
    run = tmp_path / "run"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as child:
        while not list(run.glob("unfinished/arm-lora-*/checkpoints/step-*")):
            assert child.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
        child.kill()
    made = {path: path.stat().st_mtime_ns for path in run.glob("arm-classical-*")}
    assert made
    verdict = recipes.run(task, run, ["training.epochs=1"])
    assert {path: path.stat().st_mtime_ns for path in run.glob("arm-classical-*")} == made
    assert not list(run.glob(".partial-*"))
    assert verdict.arms


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
