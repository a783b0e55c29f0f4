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
