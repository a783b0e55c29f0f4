import json
from pathlib import Path
from typing import Any

import pytest

from metier.errors import DataError
from metier.recipes.workbench import open_workbench, read_task
from tests.recipes.conftest import rows, write_task

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def write_chats(directory: Path, base: Path, change: dict[str, Any]) -> Path:
    """The task of `write_task` as chats, the fifth row changed."""
    lines = []
    for number, row in enumerate(rows()):
        messages = [
            {"role": "user", "content": row["text"]},
            {"role": "assistant", "content": row["label"]},
        ]
        lines.append({"messages": messages} | (change if number == 4 else {}))
    task = write_task(directory, base, kind="extraction", arms=["prompt", "lora"])
    (directory / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return task


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [TOOL]},
        {
            "messages": [
                {"role": "user", "content": "call it"},
                {"role": "assistant", "content": "I call f", "tool_calls": [CALL]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "call it"},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "c"},
                {"role": "assistant", "content": "four"},
            ]
        },
    ],
)
def test_tools_that_no_arm_is_offered_are_refused(
    tmp_path: Path, stories260k: Path, change: dict[str, Any]
) -> None:
    task = write_chats(tmp_path, stories260k, {})
    assert len(open_workbench(read_task(task), tmp_path).parts.train) > 50, "control"
    task = write_chats(tmp_path, stories260k, change)
    with pytest.raises(DataError, match="uses tools") as caught:
        open_workbench(read_task(task), tmp_path)
    assert caught.value.place.endswith("rows.jsonl:5")
    assert "describe the tools in the text" in caught.value.remedy


def test_passages_with_a_test_row_are_left_out_and_counted(
    tmp_path: Path, stories260k: Path
) -> None:
    """The test row stands across a cut; the document before it has passages of its own."""
    task = write_task(
        tmp_path, stories260k, data={"file": "rows.jsonl", "documents": ["one.md", "two.md"]}
    )
    lines = [row | {"text": f"{row['text']} for all of a long and sunny day"} for row in rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "one.md").write_text("Nothing stands here. " * 90)
    (tmp_path / "two.md").write_text("Nor here.")
    clean = open_workbench(read_task(task), tmp_path)
    assert clean.removed_passages == {}
    start, end = clean.parts.test[0].input.split(" big ")
    (tmp_path / "two.md").write_text(f"{'Nor here. ' * 56}{start} big\n{end}. {'Nor here. ' * 150}")
    bench = open_workbench(read_task(task), tmp_path)
    assert bench.removed_passages == {"passage-with-test-input": 2}
    assert len(bench.passages) == len(clean.passages) + 1
    assert not any(start in passage or end in passage for passage in bench.passages)
    (warning,) = [text for text in bench.parts.warnings if "not looked for" in text]
    assert warning.startswith(f"{len(bench.parts.test)} of {len(bench.parts.test)} test answers")
