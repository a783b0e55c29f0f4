"""The figures that the documentation quotes are those in the files beside the benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
CARD = ROOT / "src" / "metier" / "model" / "starter" / "README.md"


RELIABILITY = ROOT / "docs" / "reliability.md"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script(ROOT / "benchmarks" / "soak.py")


@pytest.fixture(scope="module")
def verdicts() -> ModuleType:
    return load_script(ROOT / "benchmarks" / "verdicts.py")


def test_the_table_of_verdicts_is_that_of_the_files(verdicts: ModuleType) -> None:
    page = PAGE.read_text("utf-8")
    assert verdicts.BEGIN + verdicts.table() + verdicts.END in page


def test_every_kept_verdict_follows_the_schema_and_belongs_to_a_task(verdicts: ModuleType) -> None:
    kept = sorted(path.stem for path in verdicts.RESULTS.glob("*.json"))
    assert set(kept) <= set(verdicts.TASKS)
    for name in kept:
        verdict = verdicts.read(name)
        assert verdict.command.startswith("metier ")
        assert {"metier", "torch", "processor", "cores"} <= verdict.versions.keys()


def test_a_changed_score_is_noticed(verdicts: ModuleType) -> None:
    verdict = verdicts.read("stdlib")
    best = verdict.arms[0]
    other = best.model_copy(update={"score": best.score.model_copy(update={"mean": 0.123})})
    changed = verdict.model_copy(update={"arms": (other, *verdict.arms[1:])})
    assert verdicts.row("stdlib", changed) not in PAGE.read_text("utf-8")


def test_a_verdict_that_would_ship_nothing_names_no_arm(verdicts: ModuleType) -> None:
    changes = {"decision": "none", "arm": "", "seconds": 60.0}
    line = verdicts.row("stdlib", verdicts.read("stdlib").model_copy(update=changes))
    assert line.endswith("| nothing yet | 1 |")


@pytest.mark.parametrize("document", [PAGE, CARD], ids=lambda path: path.name)
def test_blimp_is_quoted_as_measured(document: Path) -> None:
    (row,) = json.loads((ROOT / "benchmarks/results/blimp.json").read_text("utf-8"))["rows"]
    quoted = re.search(r"BLiMP.*?([0-9]+\.[0-9]) %", document.read_text("utf-8"))
    assert quoted
    assert float(quoted[1]) == round(100 * row["value"], 1)


def test_the_soak_is_quoted_as_it_went(soak: ModuleType) -> None:
    outcome = json.loads(soak.RESULTS.read_text("utf-8"))
    assert soak.BEGIN + soak.block(outcome) + soak.END in RELIABILITY.read_text("utf-8")
    assert all(row["holds"] for row in outcome["rows"])
    assert outcome["inside_save"] >= soak.LEAST_INSIDE
    assert {row["scenario"] for row in outcome["rows"]} == {*soak.SCENARIOS, *soak.SWEEPS}
    assert {"metier", "torch", "processor", "cores"} <= outcome["versions"].keys()
    wrong = outcome["rows"][0] | {"identical": False, "holds": False, "differing": "log.jsonl"}
    assert "WHICH IT MUST NOT (log.jsonl)" in soak.line(wrong)


def test_memory_is_quoted_as_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/constant_memory.json").read_text("utf-8"))["rows"]
    quoted = re.search(r"peak memory.*?\+(\d+) MB when.*?\+(\d+) MB at", PAGE.read_text("utf-8"))
    assert quoted
    assert [int(found) for found in quoted.groups()] == [round(row["value"]) for row in rows]
    assert all(row["holds"] for row in rows)
