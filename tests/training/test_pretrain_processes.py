"""Two processes of torchrun pre-train what one does, and one goes on where two stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metier import recipes
from metier.model import checkpoint
from metier.progress import Silent
from tests.training import dying_pretraining
from tests.training.dying_pretraining import DIES_AT
from tests.training.test_pretrain import recipe

STEPS = 12
SMALL = {"tokens": STEPS * 768, "checkpoint_seconds": 1e-9, "evaluate_every": 4}


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def trained(run: Path) -> tuple[list[Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Losses of all steps, weights and facts."""
    (log,), (model,) = run.glob("training-*/log.jsonl"), run.glob("model-*")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    facts = json.loads((model / "training.json").read_text())
    return lines, load_file(model / "model.safetensors"), facts


def assert_same(first: Path, second: Path) -> None:
    """But for the order in which float32 numbers are added up, which Muon's bfloat16 makes more of.

    Both optimisers forget the scale of a gradient: it is the norm that shows it.
    """
    (lines, weights, facts), (others, theirs, also) = trained(first), trained(second)
    assert [line["step"] for line in lines] == list(range(STEPS))
    for one, two in zip(lines, others, strict=True):
        assert one == pytest.approx(two, rel=5e-3 if one["step"] else 1e-5)
    assert weights.keys() == theirs.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, theirs[name], rtol=2e-2, atol=2e-3)
    assert [point["step"] for point in facts["curve"]] == [4, 8, 12]
    for one, two in zip(facts["curve"], also["curve"], strict=True):
        assert one == pytest.approx(two, rel=5e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recipe, and what one process makes of it in ``run``."""
    directory = tmp_path_factory.mktemp("alone")
    recipes.pretrain(recipe(directory, **SMALL), directory / "run")
    return directory


def test_two_processes_train_what_one_does(alone: Path, tmp_path: Path) -> None:
    command = ["-m", "metier", "pretrain", alone / "tiny.yaml", "--out", tmp_path / "run", "--json"]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    (model,) = (tmp_path / "run").glob("model-*")
    assert json.loads(done.stdout) == {"path": str(model)}, "the first process alone speaks"
    (expected,) = (alone / "run").glob("model-*")
    assert model.name == expected.name
    assert_same(alone / "run", tmp_path / "run")
    again = torchrun(*command)
    assert (again.returncode, again.stdout) == (0, done.stdout), "finished, it is found"


def test_one_process_goes_on_where_two_stopped(alone: Path, tmp_path: Path) -> None:
    done = torchrun(dying_pretraining.__file__, alone / "tiny.yaml", tmp_path / "run")
    assert done.returncode != 0
    (scratch,) = (tmp_path / "run").glob("training-*")
    found, problems = checkpoint.load_newest(scratch / "checkpoints")
    assert found
    assert (found.state["step"], problems) == (DIES_AT, ())
    recipes.pretrain(alone / "tiny.yaml", tmp_path / "run", progress=Silent())
    assert_same(alone / "run", tmp_path / "run")
