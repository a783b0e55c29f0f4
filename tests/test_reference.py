"""docs/reference.md says what the code reads and writes."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_script(DOCS / "write_reference.py")


def test_the_page_is_up_to_date(reference: ModuleType) -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "run 'make reference'"


def test_every_field_is_explained(reference: ModuleType) -> None:
    rows = [line for line in reference.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_links_lead_to_one_heading(reference: ModuleType) -> None:
    headings = re.findall(r"^### (\w+)$", reference.page().lower(), re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(re.findall(r"\(#(\w+)\)", reference.page())) <= set(headings)
