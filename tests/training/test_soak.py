"""The short form of `make soak`: kills of real processes, and what they must not change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
RANDOM = ("full", "lora", "pretrain")
SWEEPS = ("every change of a save, network", "every change of a publication, network")
CONTROLS = ("control: seed forgotten", "control: every change of a save, in place")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness found, itself a process: it forks before anything is computed."""
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    command = [sys.executable, SOAK, *RANDOM, *SWEEPS, *CONTROLS, "--kills", "12", "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    values: dict[str, Any] = json.loads(out.read_text())
    return values | {"rows": {row["scenario"]: row for row in values["rows"]}}


def swept(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of a scenario that may need what not every machine allows."""
    if name not in found["rows"]:
        pytest.skip("processes may not be traced here (ptrace)")
    row: dict[str, Any] = found["rows"][name]
    return row


@pytest.mark.parametrize("name", RANDOM)
def test_a_training_killed_at_random_ends_as_if_nobody_had(
    found: dict[str, Any], name: str
) -> None:
    row = found["rows"][name]
    assert row["identical"], row["differing"]
    assert row["kills"] == 4


def test_many_kills_fall_inside_a_save(found: dict[str, Any]) -> None:
    inside = sum(found["rows"][name]["inside_save"] for name in RANDOM)
    assert found["kills"] == 12
    assert found["inside_save"] == inside / 12 >= 0.3


@pytest.mark.parametrize("name", SWEEPS)
def test_a_kill_after_any_change_of_a_file_changes_nothing(
    found: dict[str, Any], name: str
) -> None:
    row = swept(found, name)
    assert row["identical"], row["differing"]
    assert row["kills"] >= 10


@pytest.mark.parametrize("name", CONTROLS)
def test_a_save_without_a_safeguard_is_found_out(found: dict[str, Any], name: str) -> None:
    assert swept(found, name)["differing"]
