"""A task.yaml for a file nobody has described yet: every guess, and why it was made."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from metier.data import guess, limits, prepare
from metier.data.files import Row, read_rows
from metier.data.formats import Layout
from metier.data.labels import alike, refuse_same
from metier.data.sources import read_examples
from metier.data.split import read_parts
from metier.errors import DataError
from metier.graders import json_text
from metier.graders.asking import ask_for_keys
from metier.graders.labels import labels_of, read_labels
from metier.records import Example
from metier.task import LABELLED, Columns, Kind, Task

_FILE_NAMES = ("train", "trainset", "data", "dataset", "examples", "rows", "dev", "devset", "test")
_SMALL = 200
_LONGEST_LABEL = 80
# Share of rows without which next to nothing is left.
_NEARLY_ALL = 0.9
# Share of test rows on which two arms differ, in a typical comparison.
_DIFFERING = 0.2
# Standard errors by which a gain must pass the margin: 1.96 for the bound, 0.84 for 4 runs of 5.
_POWER = 2.8
_TAGGING = ("prompt", "few-shot", "rag", "lora", "lora/tags")
_ABOUT_TAGGING = (
    "lora writes the answer, lora/tags marks it in the text: compare them (docs/tags.md).",
)
_WORDING: dict[Kind, dict[str, str]] = {
    "classification": {
        "good": "The one label that fits the input, spelled exactly as in the list of labels.",
        "better": "The right label also where two labels are close.",
        "bad": "Another label, a name that is no label, or more than the label.",
        "instruction": "Name the label that fits the text.",
    },
    "multi-label": {
        "good": "All labels that fit the input and no other, spelled as in the list of labels.",
        "better": "The right labels also where one of them is only hinted at.",
        "bad": "A label that does not fit, one left out, a name that is no label, or other words.",
        "instruction": "Name all labels that fit the text, as a JSON list.",
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
        path: the data file; where its name says ``train`` and files of the same name that say
            ``test`` or ``validation`` stand beside it, they become the official parts.
        task_dir: the directory task.yaml will stand in, by default that of the file; a file
            inside it is named relative to it.

    Raises:
        DataError: the file cannot be read, or its columns cannot be guessed.

    """
    rows = list(read_rows(path))
    layout, sure = guess.guess_layout(path, rows)
    guess.refuse_empty(rows, layout)
    pair = guess.pair_of(layout)
    examples = read_examples(str(path), "expansion", Path(), layout.format, pair)
    kind, reason = _kind(examples)
    beside = _files_beside(path)
    held, refused = _read_held(path, beside, kind, layout, pair)
    tables = [rows, *(list(read_rows(path.with_name(beside[part]))) for part in held)]
    columns = pair.model_copy(update=guess.id_and_group(tables, layout))
    parts = _parts(_file_name(path, task_dir or path.parent), {p: beside[p] for p in held})
    text = _Text()
    text.add("name", _name(path), "From the file's name.")
    text.add("kind", kind, reason)
    about = [*_about_data(rows, layout, columns, sure), *_about_parts(parts), *refused]
    text.add("data", {**parts, **_data(layout, columns)}, *about)
    _add_words(text, kind, [*examples, *chain.from_iterable(held.values())])
    if layout.format == "tags":
        text.add("arms", list(_TAGGING), *_ABOUT_TAGGING)
    _add_arms(text, kind, examples)
    _add_limits(text, kind, examples, held)
    task = Task.parse(text.values, f"proposal for {path}")
    if _distinct(examples) < _SMALL:
        text.head += _unusable(task, task_dir or path.parent)
    return str(text)


def _distinct(examples: Sequence[Example]) -> int:
    """Number of different inputs."""
    return len({prepare.normalise(prepare.text_of(row)) for row in examples})


def _unusable(task: Task, task_dir: Path) -> list[str]:
    """What 'metier audit' would refuse the data for, if anything."""
    try:
        read_parts(task, task_dir)
    except DataError as error:
        return [
            f"CAREFUL: this task cannot be run yet. {error.place}: {error.cause}.",
            error.remedy,
        ]
    return []


@dataclass
class _Text:
    """A YAML text under construction, with a comment above each key."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    head: list[str] = field(
        default_factory=lambda: [
            "Proposed from the data. Read it, mend what was guessed wrong, then run it."
        ]
    )

    def add(self, key: str, value: Any, *comments: str) -> None:
        """Append a key with its value."""
        self.values[key] = value
        dumped = _dump({key: value})
        self.lines += [*_comments(comments), dumped]

    def __str__(self) -> str:
        return "\n".join([*_comments(self.head), "", *self.lines])


def _comments(texts: Iterable[str]) -> list[str]:
    return [f"# {_one_line(text)}" for text in texts]


def _one_line(text: str) -> str:
    """Names of columns may hold line breaks and signs that YAML does not allow."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _name(path: Path) -> str:
    stem = path.name.split(".")[0]
    if stem in _FILE_NAMES:
        stem = path.absolute().parent.name or stem
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")
    return name[:64] or "task"


def _file_name(path: Path, task_dir: Path) -> str:
    file, directory = path.absolute(), task_dir.absolute()
    inside = file.is_relative_to(directory)
    return file.relative_to(directory).as_posix() if inside else str(file)


def _files_beside(path: Path) -> dict[str, str]:
    """Names of the held parts beside the file: its own with another word for train."""
    stem, dot, suffix = path.name.partition(".")
    parts = {}
    for part, names in {
        "validation": ("validation", "valid", "validate", "val", "dev", "devel"),
        "test": ("test",),
    }.items():
        beside = [re.sub(r"(^|[_-])train(?=$|[_-])", rf"\g<1>{n}", stem) for n in names]
        found = [n + dot + suffix for n in beside if n != stem]
        name = next((name for name in found if path.with_name(name).is_file()), None)
        if name:
            parts[part] = name
    return parts


def _read_held(
    path: Path, beside: Mapping[str, str], kind: Kind, layout: Layout, pair: Columns
) -> tuple[dict[str, list[Example]], list[str]]:
    """The held parts that can be read as the file is, and why others cannot."""
    held, refused = {}, []
    for part, name in beside.items():
        try:
            held[part] = read_examples(name, kind, path.parent, layout.format, pair)
        except DataError as error:
            refused.append(f"{name} beside it is not used as the {part} part: {error.cause}.")
    return held, refused


def _parts(file: str, held: Mapping[str, str]) -> dict[str, str]:
    if not held:
        return {"file": file}
    return {"train": file, **{part: str(Path(file).with_name(n)) for part, n in held.items()}}


def _data(layout: Layout, columns: Columns) -> dict[str, Any]:
    named = columns.model_dump(exclude_none=True)
    return {"format": layout.format, **({"columns": named} if named else {})}


def _about_data(rows: Sequence[Row], layout: Layout, columns: Columns, sure: bool) -> list[str]:
    filled = guess.filled(rows)
    longer = guess.longer_than_input(rows, layout)
    part = " in part" if longer else ""
    fit = f"They fit the format {layout.format}{part}" if sure else "No known format has them"
    comments = [f"{len(rows):,} rows with the columns {', '.join(filled)}. {fit}."]
    if layout.context:
        comments.append(f"The input is '{layout.input}' with '{layout.context}' below it.")
    if not sure or longer:
        comments.append(_guessed(rows, layout))
    used = {*layout.columns, columns.id, columns.group}
    unused = [name for name in filled if name not in used and name != "tools"]
    if unused:
        comments.append(f"Not used: {', '.join(unused)}.")
    if longer:
        comments.append(
            f"CAREFUL: there is more text in {', '.join(longer)} than in the input. Where the "
            "output depends on it, put it into the input."
        )
    if columns.group:
        count = len({str(row.values[columns.group]).strip() for row in rows})
        comments += [
            f"Rows with the same '{columns.group}' stay in one part of the split. Where they are",
            f"alike, a verdict is as sure as groups are many, not rows: {count:,} here.",
        ]
    else:
        comments.append("Name columns.group where rows belong together (a customer, a document).")
    return comments


def _guessed(rows: Sequence[Row], layout: Layout) -> str:
    other = guess.runner_up(rows, layout)
    doubt = f" (or is it '{other}'?)" if other else ""
    return (
        f"GUESS, please check: '{layout.input}' is the input, '{layout.output}' the output{doubt}."
    )


def _about_parts(parts: Mapping[str, str]) -> list[str]:
    if "train" not in parts:
        return []
    if "test" in parts:
        return ["Official parts, found beside the file: the test file is the sealed part."]
    return ["Official parts, found beside the file; the sealed test part is split off train."]


def _kind(examples: Sequence[Example]) -> tuple[Kind, str]:
    answers = [row.answer.strip() for row in examples]
    labels = Counter(answers)
    short = all(len(label) <= _LONGEST_LABEL and "\n" not in label for label in labels)
    if number := _listed_labels(answers):
        return "multi-label", f"Every output is a list of some of {number} labels."
    if _all_json(answers):
        return "extraction", "Every output is JSON."
    if short and 2 <= len(labels) <= len(answers) / 5:
        if lists := _separated(labels):
            return "multi-label", lists
        return "classification", f"There are only {len(labels)} different outputs, all short."
    found = sum(_inside(row) for row in examples) / len(examples)
    if found >= 0.7:
        return "extraction", f"{found:.0%} of the outputs stand word for word in their input."
    return "expansion", (
        f"{len(labels):,} different outputs in {len(answers):,} rows, "
        f"{found:.0%} of them in their input: free text."
    )


def _listed_labels(answers: Sequence[str]) -> int:
    """How many labels lists of short texts share; 0 where outputs are no such lists."""
    if not _all_json(answers):
        return 0
    try:
        labels = {label for answer in answers for label in read_labels(answer)}
    except json_text.NotJson:
        return 0
    short = all(len(label) <= _LONGEST_LABEL for label in labels)
    return len(labels) if short and 2 <= len(labels) <= len(answers) / 5 else 0


def _separated(counts: Counter[str]) -> str:
    """Why outputs are several labels in one text; empty where they are not."""
    for sign in ",;|":
        lists = [
            name
            for name in counts
            if sign in name and all(part.strip() in counts for part in name.split(sign))
        ]
        rows = sum(counts[name] for name in lists)
        if rows > sum(counts.values()) / 50:
            return (
                f"{rows:,} rows have several labels, such as '{lists[0]}'. Where such a text is "
                "one label, set kind: classification."
            )
    return ""


def _all_json(answers: Sequence[str]) -> bool:
    try:
        return all(isinstance(json_text.parse(answer), dict | list) for answer in answers)
    except json_text.NotJson:
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
    asked = ask_for_keys([row.answer for row in examples]) or words["instruction"]
    text.add("instruction", asked, "What prompted arms tell the model to do.")
    if kind in LABELLED:
        if kind == "classification":
            refuse_same(examples)
        counts = Counter(label for row in examples for label in labels_of(row.answer.strip(), kind))
        rare = sorted(label for label, count in counts.items() if count < 10)
        comments = [
            "The closed set of labels.",
            *(f"CAREFUL: {text}." for text in alike(counts)),
        ]
        if rare:
            comments.append(f"Fewer than 10 rows: {json.dumps(rare[:10], ensure_ascii=False)}.")
        text.add("labels", sorted(counts), *comments)


def _add_arms(text: _Text, kind: Kind, examples: Sequence[Example]) -> None:
    about = ["The base that ships with metier; or a path, a Hub name, a list."]
    long = _too_long(examples)
    if long > _NEARLY_ALL * len(examples):
        about += [
            f"CAREFUL: {long:,} of {len(examples):,} rows are longer than the {limits.CONTEXT:,} "
            "tokens the starter reads:",
            "name a base with a longer context here, and raise training.max_length: the longest "
            f"row has about {max(map(_tokens, examples)):,} tokens.",
        ]
    if kind == "expansion":
        about.append("It is very small: for free text, name a larger one if you have one.")
    text.add("base", "starter", *about)
    framed = sum(bool(re.search(r"###\s*(Answer|Response)\b", row.input)) for row in examples)
    if framed > len(examples) / 2:
        text.add("template", "plain", "The inputs bring their own '### Answer:' frame.")
    else:
        text.add("template", "question-answer", "Use 'chat' with a base that has a chat template.")
    text.add("grader", *_grader(kind, [row.answer for row in examples]))


def _grader(kind: Kind, answers: Sequence[str]) -> tuple[str, str]:
    if kind == "classification":
        return "exact", "A label is right or wrong; macro-F1 is reported beside it."
    if kind == "multi-label":
        return "fields", "F1 of the labels of a row; micro-F1, macro-F1 and exact stand beside it."
    if _all_json(answers):
        return "fields", "The share of fields that are right; JSON validity is reported beside it."
    if kind == "extraction":
        return "token_f1", "Words shared with the expected span; 'exact' is stricter."
    if all(re.search(r"#### \S", answer) for answer in answers):
        return "regex:#### (.+)", "Compares the results after '####'; the way to them is free."
    return "rouge_l", "Longest common run of words; it sees wording, not truth. 'chrf' is another."


def _add_limits(
    text: _Text, kind: Kind, examples: Sequence[Example], held: Mapping[str, Sequence[Example]]
) -> None:
    split, comments = _split(examples)
    sizes = limits.part_sizes(len(examples), split, {p: len(rows) for p, rows in held.items()})
    caps = limits.caps(kind, examples, sizes)
    if caps:
        comments += [
            f"max_*: all {sum(sizes.values()):,} rows would take more than the budget with the",
            "starter on two cores. Raise them with the budget, or on a faster machine.",
        ]
    shown = {key: value for key, value in split.items() if key not in held}
    text.add("split", shown | caps, *comments)
    _add_margin(text, held.get("test", examples), caps.get("max_test", sizes["test"]))
    text.add("budget", limits.BUDGET, "Minutes for the whole run; 'metier plan' estimates them.")
    long = _too_long(examples)
    if 0 < long <= _NEARLY_ALL * len(examples):
        text.add(
            "training",
            {"too_long": "drop"},
            f"{long:,} rows may be longer than the {limits.CONTEXT:,} tokens the starter reads:",
            "those are left out of training and counted. 'refuse' stops instead.",
        )


def _add_margin(text: _Text, source: Sequence[Example], rows: int) -> None:
    """The margin, and the gain that so many test rows from a source can find."""
    different = max(1, round(rows * _distinct(source) / len(source)))
    margin = 0.02 if different >= 100 else 0.05
    gain = 100 * (margin + _POWER * math.sqrt(_DIFFERING / different))
    text.add(
        "margin",
        margin,
        "The smallest gain over the best simpler arm that is worth shipping a tuned model.",
        f"About {different:,} different test inputs find a gain of {gain:.0f} points in 4 of 5 "
        f"runs, where arms differ on {_DIFFERING:.0%} of them.",
    )


def _tokens(row: Example) -> int:
    return limits.tokens(row.input) + limits.tokens(row.answer)


def _too_long(examples: Sequence[Example]) -> int:
    """Rows that the starter may not be able to read."""
    return sum(_tokens(row) > 0.9 * limits.CONTEXT for row in examples)


def _split(examples: Sequence[Example]) -> tuple[dict[str, Any], list[str]]:
    total = len(examples)
    split: dict[str, Any] = {"test": 0.2, "validation": 0.1, "seed": 0, "near_duplicate": 0.8}
    comments = [
        "By group; near-duplicates of rows in another part are left out. The test part is sealed."
    ]
    if total < _SMALL:
        split |= {"test": 0.3, "validation": 0.15}
        comments.append(
            f"SMALL: {total} rows. Verdicts on so few are rarely certain; "
            f"{_SMALL} or more are better, 1,000 good."
        )
    texts = [prepare.text_of(row) for row in limits.sample(examples)]
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


def _dump(values: dict[str, Any]) -> str:
    dumped: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    if yaml.safe_load(dumped) == values:
        return dumped
    # To YAML, U+0085 and its like are ends of lines: a blank when read again, unless escaped.
    escaped: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=100)
    return escaped
