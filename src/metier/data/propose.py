"""A task.yaml for a file nobody has described yet: every guess, and why it was made."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metier.data import prepare
from metier.data.files import Row, read_rows
from metier.data.formats import Layout, find_layout
from metier.data.sources import read_examples
from metier.errors import DataError
from metier.records import Example
from metier.task import Columns, Kind, Task

_NONE = Columns()
_GROUP_NAMES = ("group", "customer", "customer_id", "user", "user_id", "document", "document_id")
_SMALL = 200
_LONG = 2500
_MANY = 50_000
# Share of test rows on which two arms differ, in a typical comparison.
_DIFFERING = 0.2
_WORDING: dict[Kind, dict[str, str]] = {
    "classification": {
        "good": "The one label that fits the input, spelled exactly as in the list of labels.",
        "better": "The right label also where two labels are close.",
        "bad": "Another label, a name that is no label, or more than the label.",
        "instruction": "Name the label that fits the text.",
    },
    "extraction": {
        "good": "Exactly what the input says, in the form of the examples; nothing invented.",
        "better": "The same, also for inputs that are long, noisy or unusual.",
        "bad": "A value that is not in the input, a part left out, or another form.",
        "instruction": "Extract what is asked for from the text, in the form of the examples.",
    },
    "expansion": {
        "good": "True, complete, and in the style of the examples.",
        "better": "The same in fewer words.",
        "bad": "Wrong, off the subject, cut short, or in another style.",
        "instruction": "Answer as the examples do.",
    },
}


def propose(path: Path, task_dir: Path | None = None) -> str:
    """The text of a task.yaml for a data file, each guess explained in a comment.

    Args:
        path: the data file; where it is called ``train`` and ``test`` or ``validation`` files of
            the same type stand beside it, they become the official parts.
        task_dir: the directory task.yaml will stand in, by default that of the file; a file
            inside it is named relative to it.

    Raises:
        DataError: the file cannot be read, or its columns cannot be guessed.

    """
    rows = list(read_rows(path))
    layout, sure = _layout(rows)
    columns = _columns(rows, layout)
    examples = read_examples(str(path), "expansion", Path(), layout.format, columns)
    kind, reason = _kind(examples)
    text = _Text()
    text.add("name", _name(path), "From the file's name.")
    text.add("kind", kind, reason)
    parts = _official_parts(path, _file_name(path, task_dir or path.parent))
    text.add("data", {**parts, **_data(layout, columns)}, *_about_data(rows, layout, columns, sure))
    _add_words(text, kind, examples)
    _add_arms(text, kind, examples)
    _add_limits(text, examples, "test" in parts)
    Task.parse(text.values, f"proposal for {path}")
    return str(text)


@dataclass
class _Text:
    """A YAML text under construction, with a comment above each key."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, *comments: str) -> None:
        """Append a key with its value."""
        self.values[key] = value
        dumped = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=100)
        self.lines += [*(f"# {comment}" for comment in comments), dumped]

    def __str__(self) -> str:
        head = "# Proposed from the data. Read it, mend what was guessed wrong, then run it.\n\n"
        return head + "\n".join(self.lines)


def _name(path: Path) -> str:
    stem = path.name.split(".")[0]
    if stem in ("train", "data", "examples"):
        stem = path.absolute().parent.name or stem
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")
    return name[:64] or "task"


def _layout(rows: Sequence[Row]) -> tuple[Layout, bool]:
    """The layout, and whether a known format says it rather than a guess."""
    try:
        return find_layout(rows[0], "auto", _NONE), True
    except DataError as error:
        names = [name for name in rows[0].values if _usable(name, rows)]
        if len(names) < 2:
            raise error from None
    if len(names) == 2:
        return Layout("prompt-completion", *names), False
    lengths = {name: sum(len(str(row.values[name])) for row in rows) for name in names}
    longest = max(lengths, key=lambda name: lengths[name])
    output = next(name for name in reversed(names) if name != longest)
    return Layout("prompt-completion", longest, output), False


def _usable(name: str, rows: Sequence[Row]) -> bool:
    """Whether a column is no id and has a plain value in every row."""
    values = [row.values.get(name) for row in rows]
    plain = all(v not in (None, "") and not isinstance(v, (list, dict)) for v in values)
    return plain and name.lower() != "id"


def _columns(rows: Sequence[Row], layout: Layout) -> Columns:
    values = {"input": layout.input, "output": layout.output} if _is_pair(layout) else {}
    free = {name.lower(): name for name in rows[0].values if name not in layout.columns}
    if "id" in free and _distinct(rows, free["id"]) == len(rows):
        values["id"] = free["id"]
    group = next((free[name] for name in _GROUP_NAMES if name in free), None)
    if group and _usable(group, rows) and 10 <= _distinct(rows, group) < len(rows):
        values["group"] = group
    return Columns(**values)


def _is_pair(layout: Layout) -> bool:
    """Whether two columns say everything, input and output."""
    return bool(layout.output) and not layout.context and layout.format != "alpaca"


def _distinct(rows: Sequence[Row], column: str) -> int:
    return len({str(row.values.get(column)) for row in rows})


def _file_name(path: Path, task_dir: Path) -> str:
    file, directory = path.absolute(), task_dir.absolute()
    inside = file.is_relative_to(directory)
    return file.relative_to(directory).as_posix() if inside else str(file)


def _official_parts(path: Path, file: str) -> dict[str, str]:
    stem, dot, suffix = path.name.partition(".")
    if stem != "train":
        return {"file": file}
    parts = {"train": file}
    for part, names in {
        "validation": ("validation", "valid", "validate", "val", "dev"),
        "test": ("test",),
    }.items():
        beside = next((n for n in names if path.with_name(n + dot + suffix).is_file()), None)
        if beside:
            parts[part] = str(Path(file).with_name(beside + dot + suffix))
    return parts if len(parts) > 1 else {"file": file}


def _data(layout: Layout, columns: Columns) -> dict[str, Any]:
    named = columns.model_dump(exclude_none=True)
    return {"format": layout.format, **({"columns": named} if named else {})}


def _about_data(rows: Sequence[Row], layout: Layout, columns: Columns, sure: bool) -> list[str]:
    said = f"{len(rows):,} rows with the columns {', '.join(rows[0].values)}."
    if sure:
        comments = [f"{said} They fit the format {layout.format}."]
    else:
        comments = [
            f"{said} No known format has them.",
            f"GUESS, please check: '{layout.input}' is the input, '{layout.output}' the output.",
        ]
    used = {*layout.columns, columns.id, columns.group}
    unused = [name for name in rows[0].values if name not in used and name != "tools"]
    if unused:
        comments.append(f"Not used: {', '.join(unused)}.")
    if columns.group:
        comments.append(f"Rows with the same '{columns.group}' stay in one part of the split.")
    else:
        comments.append("Name columns.group where rows belong together (a customer, a document).")
    return comments


def _kind(examples: Sequence[Example]) -> tuple[Kind, str]:
    answers = [row.answer.strip() for row in examples]
    labels = Counter(answers)
    short = all(len(label) <= 80 and "\n" not in label for label in labels)
    if _all_json(answers):
        return "extraction", "Every output is JSON."
    if short and 2 <= len(labels) <= len(answers) / 5:
        return "classification", f"There are only {len(labels)} different outputs, all short."
    found = sum(_inside(row) for row in examples) / len(examples)
    if found >= 0.7:
        return "extraction", f"{found:.0%} of the outputs stand word for word in their input."
    return "expansion", (
        f"{len(labels):,} different outputs in {len(answers):,} rows, "
        f"{found:.0%} of them in their input: free text."
    )


def _all_json(answers: Sequence[str]) -> bool:
    try:
        return all(isinstance(json.loads(answer), (dict, list)) for answer in answers)
    except ValueError:
        return False


def _inside(row: Example) -> bool:
    """Whether the answer is a part of the input, and a small one."""
    answer, text = prepare.normalise(row.answer), prepare.normalise(row.input)
    return answer in text and 2 * len(answer) <= len(text)


def _add_words(text: _Text, kind: Kind, examples: Sequence[Example]) -> None:
    words = _WORDING[kind]
    text.add("good", words["good"], "In words, for people and for prompted arms: make them yours.")
    text.add("better", words["better"])
    text.add("bad", words["bad"])
    text.add("instruction", words["instruction"], "What prompted arms tell the model to do.")
    if kind == "classification":
        counts = Counter(row.answer.strip() for row in examples)
        rare = sorted(label for label, count in counts.items() if count < 10)
        comments = ["The closed set of labels."]
        if rare:
            comments.append(f"Fewer than 10 rows: {json.dumps(rare[:10], ensure_ascii=False)}.")
        text.add("labels", sorted(counts), *comments)


def _add_arms(text: _Text, kind: Kind, examples: Sequence[Example]) -> None:
    text.add("base", "starter", "The base that ships with metier; or a path, a Hub name, a list.")
    framed = sum(bool(re.search(r"###\s*(Answer|Response)\b", row.input)) for row in examples)
    if framed > len(examples) / 2:
        text.add("template", "plain", "The inputs bring their own '### Answer:' frame.")
    else:
        text.add("template", "question-answer", "Use 'chat' with a base that has a chat template.")
    text.add("grader", *_grader(kind, [row.answer for row in examples]))


def _grader(kind: Kind, answers: Sequence[str]) -> tuple[str, str]:
    if kind == "classification":
        return "exact", "A label is right or wrong; macro-F1 is reported beside it."
    if _all_json(answers):
        return "fields", "The share of fields that are right; JSON validity is reported beside it."
    if kind == "extraction":
        return "token_f1", "Words shared with the expected span; 'exact' is stricter."
    return "rouge_l", "Longest common run of words; it sees wording, not truth. 'chrf' is another."


def _add_limits(text: _Text, examples: Sequence[Example], official_test: bool) -> None:
    split, comments = _split(examples)
    text.add("split", split, *comments)
    comments = ["The smallest gain over the best simpler arm that is worth shipping a tuned model."]
    test = min(round(len(examples) * split["test"]), split.get("max_test", len(examples)))
    if not official_test:
        gain = 100 * 1.96 * math.sqrt(_DIFFERING / max(test, 1))
        comments.append(
            f"About {test:,} test rows can prove a gain of {gain:.0f} points or more "
            f"where arms differ on {_DIFFERING:.0%} of them."
        )
    text.add("margin", 0.02 if official_test or test >= 100 else 0.05, *comments)
    text.add("budget", 60.0, "Minutes for the whole run; 'metier plan' estimates them.")
    long = [row for row in examples if len(row.input) + len(row.answer) > _LONG]
    if long:
        text.add(
            "training",
            {"too_long": "drop"},
            f"{len(long)} rows have more than {_LONG:,} characters, about 1,024 tokens: those that",
            "do not fit are left out of training and counted. 'refuse' stops instead.",
        )


def _split(examples: Sequence[Example]) -> tuple[dict[str, Any], list[str]]:
    total = len(examples)
    split: dict[str, Any] = {"test": 0.2, "validation": 0.1, "seed": 0, "near_duplicate": 0.8}
    comments = ["By group and near-duplicate cluster; the test part is sealed."]
    if total < _SMALL:
        split |= {"test": 0.3, "validation": 0.15}
        comments.append(
            f"SMALL: {total} rows. Verdicts on so few are rarely certain; "
            f"{_SMALL} or more are better, 1,000 good."
        )
    if total > _MANY:
        split |= {"max_train": 20_000, "max_validation": 1000, "max_test": 2000}
        comments.append("Caps keep the run short; raise them for the last points.")
    texts = [prepare.text_of(row) for row in examples]
    clusters = prepare.near_duplicate_clusters(texts, split["near_duplicate"])
    distinct = len(set(map(prepare.normalise, texts)))
    near = distinct - len(set(clusters))
    if near > distinct / 2:
        split["near_duplicate"] = 1.0
        comments += [
            f"{near:,} of {distinct:,} different inputs are near-duplicates at 0.8, as if",
            "made from a template: so only equal inputs count as the same case.",
        ]
    elif near > distinct / 5:
        comments += [
            f"{near:,} of {distinct:,} different inputs are near-duplicates of others: where that",
            "removes too many rows and they are different cases, raise near_duplicate towards 1.",
        ]
    return split, comments
