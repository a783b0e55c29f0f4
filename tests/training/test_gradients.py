"""However the work is cut, and whoever computes it, a step has one gradient and a run one course.

Oracle: plain Transformers reads one example after the other, unpadded, and autograd adds up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from metier.model.world import World
from metier.training import sft
from metier.training.batches import Row
from tests.training import processes
from tests.training.processes import CASES, DIES_AT, gradients, model_of, rows

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT on GPT-2
EXACT = 1e-9
ROOT = Path(__file__).resolve().parents[2]


def one_by_one(family: str, method: str, examples: list[Row]) -> dict[str, Tensor]:
    model = model_of(family, method)
    model.eval()
    weight = sum(sum(row.trained) for row in examples)
    for row in examples:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        trained = torch.tensor(row.trained[1:])
        targets = torch.tensor(row.ids[1:])[trained]
        (F.cross_entropy(logits[trained], targets, reduction="sum") / weight).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write; the last thing they do is die."""
    out = tmp_path_factory.mktemp("together")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [sys.executable, *launch, "-m", "tests.training.processes", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Signal 9 (SIGKILL)" in ended.stderr, ended.stderr[-3000:]
    return out


@pytest.mark.parametrize(("family", "method"), CASES)
@pytest.mark.parametrize("micro_tokens", [1, 64, 10**6])
def test_one_process_cuts_a_step_as_it_likes(family: str, method: str, micro_tokens: int) -> None:
    found = gradients(family, method, micro_tokens, World())
    assert furthest(found, one_by_one(family, method, rows())) < EXACT


@pytest.mark.parametrize(("family", "method"), CASES)
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_two_processes_share_a_step(together: Path, family: str, method: str, kind: str) -> None:
    found = load_file(together / f"{family}-{method}-{kind}.safetensors")
    assert furthest(found, one_by_one(family, method, rows())) < EXACT


def test_control_a_row_less_is_seen() -> None:
    found = gradients("llama", "lora", 64, World())
    assert furthest(found, one_by_one("llama", "lora", rows()[:-1])) > 1e6 * EXACT


def log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def furthest_loss(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """Of any step: what a last digit changes grows with every step, and gradients show it first."""
    assert [line["step"] for line in found] == list(range(len(expected)))
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process from the first step to the last."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "MICRO_TOKENS", 64)
        processes.train(out, World())
    return out


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_go_the_way_of_one(together: Path, alone: Path, sharded: bool) -> None:
    """With dropout, rehearsal and evaluation: what is drawn is a matter of the step alone."""
    assert furthest_loss(log(together / f"whole-{sharded}"), log(alone)) < EXACT


def test_control_other_draws_are_seen(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is drawn anew for every micro-batch, so others have other losses."""
    monkeypatch.setattr(sft, "MICRO_TOKENS", 1)
    processes.train(tmp_path, World())
    assert furthest_loss(log(tmp_path), log(alone)) > 1e4 * EXACT


def test_one_process_goes_on_where_one_of_two_was_killed(
    together: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two held a part of every layer each; the one goes on with whole layers."""
    killed = together / "killed-True"
    assert 1 <= len(log(killed)) < DIES_AT < len(log(alone))
    monkeypatch.setattr(sft, "MICRO_TOKENS", 64)
    state = processes.train(killed, World())
    assert state.step == len(log(alone))
    assert furthest_loss(log(killed), log(alone)) < EXACT
