"""Stages of a run: what is whole is used again, what is not is made anew and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metier.errors import RunError
from metier.runs import MANIFEST, Run, publish, verify


@pytest.mark.parametrize("manifest", [{"files": []}, {"files": None}, {}, [], None, "files"])
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, manifest: object) -> None:
    with publish(tmp_path / "made") as directory:
        (directory / "a.txt").write_text("a")
    assert verify(tmp_path / "made")["files"].keys() == {"a.txt"}
    (tmp_path / "made" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="no readable manifest"):
        verify(tmp_path / "made")


def test_a_damaged_stage_is_kept_aside(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        for content in ("by hand", "by hand again"):
            path = run.stage("arm", {}, lambda p: (p / "a.txt").write_text("made") and None)
            (path / "a.txt").write_text(content)
        path = run.stage("arm", {}, lambda p: (p / "a.txt").write_text("made") and None)
    assert (path / "a.txt").read_text() == "made"
    aside = path.with_name(f"damaged-{path.name}")
    assert (aside / "a.txt").read_text() == "by hand again", "the newest is kept"
