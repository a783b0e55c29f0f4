"""Write docs/reference.md: every field of the files that metier reads and writes, from their code.

python docs/write_reference.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metier.config import Config
from metier.evaluation.proof import Proof
from metier.evaluation.schema import Verdict
from metier.task import Task
from metier.training.pretrain_config import PretrainConfig

PAGE = Path(__file__).parent / "reference.md"
FILES: dict[str, type[Config]] = {
    "task.yaml": Task,
    "verdict.json": Verdict,
    "proof.json": Proof,
    "pre-training recipe": PretrainConfig,
}
_START = """# Reference

Every field of `task.yaml`, of `verdict.json`, of the `proof.json` of an export and of a
pre-training recipe, written from the code by `make reference`. A field without a default must be
given; an unknown one is refused. On the command line `--set a.b=value` overrides one.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")


def page() -> str:
    """The whole page."""
    explained: set[str] = set()
    lines = [line for name in FILES for line in file_section(name, explained)]
    return "\n".join([_START, *lines]) + "\n"


def file_section(name: str, explained: set[str]) -> Iterator[str]:
    """A file, and below it the parts that it is made of, but those explained before."""
    schema = FILES[name].model_json_schema()
    parts = schema["$defs"]
    yield from (f"## {name}", "", *table(schema, parts))
    for title in sorted(parts.keys() - explained):
        part = parts[title]
        explained.add(title)
        yield from (f"### {title}", "", part["description"], "", *table(part, parts))


def table(schema: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    """One row for each field; what a part means stands with the part."""
    required = schema.get("required", ())
    yield from ("| field | type | default | meaning |", "|---|---|---|---|")
    for name, field in schema["properties"].items():
        default = "" if name in required else f"`{json.dumps(field.get('default'))}`"
        if isinstance(field.get("default"), dict):
            default = ""  # those of its part, further down
        part = parts.get(str(field.get("$ref")).rpartition("/")[2], {})
        meaning = field.get("description") or part.get("description", "")
        meaning = " ".join(meaning.split()).replace("|", "\\|")
        yield f"| `{name}` | {kind(field)} | {default} | {meaning} |"
    yield ""


def kind(field: dict[str, Any]) -> str:
    """The type of a field in words, with its bounds."""
    if "anyOf" in field:
        return " or ".join(kind(option) for option in field["anyOf"])
    if "$ref" in field:
        part = str(field["$ref"]).rpartition("/")[2]
        return f"[{part}](#{part.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}))}"
    return f"{field.get('type', 'anything')}{bounds(field)}"


def bounds(field: dict[str, Any]) -> str:
    """Bounds of a number as they are written in mathematics."""
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    found = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f" ({', '.join(found)})" if found else ""


if __name__ == "__main__":
    main()
