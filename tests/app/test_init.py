"""`metier init` where the task is to stand in another directory than its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metier.app.cli import app


@pytest.mark.parametrize("relative", [True, False])
def test_a_task_elsewhere_finds_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part, count in (("train", 200), ("test", 40)):
        rows = [
            {"text": f"{part} {i} is about {'cats' if i % 2 else 'dogs'}", "label": "ab"[i % 2]}
            for i in range(count)
        ]
        file = tmp_path / "data" / f"{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = Path() if relative else tmp_path
    file, task = start / "data" / "train.jsonl", start / "tasks" / "task.yaml"
    assert CliRunner().invoke(app, ["init", str(file), "--out", str(task)]).exit_code == 0
    done = CliRunner().invoke(app, ["audit", str(task), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["parts"]["test"] == 40
