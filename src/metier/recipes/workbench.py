"""What all arms of a run share: the task, its parts, its labels, its grader, its passages."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from metier.data.sources import read_examples
from metier.data.split import Parts, corpus_overlap, not_looked_for, read_parts
from metier.errors import ConfigError, DataError, RunError
from metier.evaluation import arms
from metier.evaluation.arms import Neighbours
from metier.evaluation.forgetting import Material, load_material
from metier.graders import Grader, load_grader
from metier.graders.labels import labels_of
from metier.records import Example
from metier.retrieval.chunks import read_passages
from metier.retrieval.index import Index
from metier.retrieval.lexical import LexicalIndex
from metier.runs import fingerprint
from metier.task import LABELLED, TUNINGS, Arm, Task, resolve


@dataclass(frozen=True)
class Workbench:
    """What the arms of a task are made from.

    Attributes:
        task: the task, with the paths of its bases made absolute.
        base_dir: directory of task.yaml.
        parts: training, validation and sealed test part.
        labels: the closed label set, sorted; empty for kinds without one.
        passages: of the user's documents, for the rag arms.
        removed_passages: passages left out because they hold test examples, by reason.

    """

    task: Task
    base_dir: Path
    parts: Parts
    labels: tuple[str, ...]
    passages: tuple[str, ...]
    removed_passages: dict[str, int]

    @cached_property
    def grader(self) -> Grader:
        """What gives the scores."""
        answers = [example.answer for example in (*self.parts.train, *self.parts.validation)]
        return load_grader(self.task.grader, self.task.kind, answers, self.base_dir)

    @cached_property
    def material(self) -> Material:
        """What tuned arms must not have forgotten."""
        return load_material(self.task.forgetting, self.base_dir / "task.yaml")

    @cached_property
    def train_identity(self) -> str:
        """Hash of the training and validation part, in all that arms learn from."""
        rows = [[row.id, row.group, row.messages, row.tools] for row in self.parts.train]
        held = [[row.id, row.messages, row.tools] for row in self.parts.validation]
        return fingerprint([rows, held])

    @cached_property
    def shots(self) -> Neighbours[Example]:
        """What the few-shot arm looks up."""
        return arms.shots(self.parts.train, self._index, self.task.retrieval.shots)

    @cached_property
    def snippets(self) -> Neighbours[str]:
        """What the rag arms look up."""
        shown = self.task.retrieval.shots
        return arms.snippets(self.parts.train, self.passages, self._index, shown)

    def _index(self, texts: list[str]) -> Index:
        if self.task.retrieval.index == "bm25":
            return LexicalIndex(texts)
        from metier.retrieval.hybrid import HybridIndex

        return HybridIndex(texts, self.base_dir / ".metier-vectors")


def read_task(task_file: Path, overrides: Iterable[str] = ()) -> Task:
    """Load task.yaml; local bases become absolute paths."""
    task = Task.load(task_file, overrides)
    bases = [_absolute(name, task_file) for name in task.bases()]
    return task.model_copy(update={"base": bases[0] if len(bases) == 1 else tuple(bases)})


def _absolute(name: str, task_file: Path) -> str:
    path = resolve(name, task_file)
    return str(path.resolve()) if path.is_dir() else name


def only_arm(task: Task) -> Arm:
    """The only arm of a task, which is to be trained.

    Raises:
        ConfigError: it is not a tuned one, or the task names several bases.

    """
    (arm,) = task.chosen_arms()
    bases = task.bases()
    if len(bases) > 1:
        raise ConfigError(
            "base",
            f"names {len(bases)} bases, but one arm over one base is trained",
            f"choose one of {', '.join(bases)}, e.g. --set base={bases[0]}",
        )
    if not arm.tuned:
        raise ConfigError(f"arm '{arm.name}'", "is not trained", f"use {', '.join(TUNINGS)}")
    return arm


def open_workbench(task: Task, base_dir: Path) -> Workbench:
    """Read and split the data of a task, and check everything that needs no model.

    Raises:
        DataError: a row, file or split is wrong.
        ConfigError: the grader is wrong, or a weight is of no label.

    """
    parts = read_parts(task, base_dir)
    _refuse_tools([*parts.train, *parts.validation, *parts.test])
    labels: tuple[str, ...] = ()
    if task.kind in LABELLED:
        found = {label for row in parts.train for label in labels_of(row.answer, task.kind)}
        labels = task.labels or tuple(sorted(found))
    _check_weights(task, labels)
    documents = [resolve(path, base_dir / "task.yaml") for path in task.data.documents]
    passages = read_passages(documents)
    by_document = groupby(passages, key=lambda passage: passage.source)
    overlap = corpus_overlap([[p.text for p in found] for _, found in by_document], parts.test)
    if documents:
        warnings = (*parts.warnings, *not_looked_for(parts.test))
        parts = dataclasses.replace(parts, warnings=warnings)
    dropped = {index for indices in overlap.values() for index in indices}
    bench = Workbench(
        task=task,
        base_dir=base_dir,
        parts=parts,
        labels=labels,
        passages=tuple(p.text for index, p in enumerate(passages) if index not in dropped),
        removed_passages={f"passage-with-{k}": len(v) for k, v in overlap.items()},
    )
    _ = bench.grader  # what is wrong with it is refused before any work
    if any(arm.mode == "tags" for arm in task.chosen_arms()):
        from metier.training import tagging

        tagging.types_of([*parts.train, *parts.validation])
    if any(arm.tuned for arm in task.chosen_arms()):
        _ = bench.material
    return bench


def _check_weights(task: Task, labels: Sequence[str]) -> None:
    weights = task.training.class_weights
    unknown = sorted(set(weights) - set(labels)) if isinstance(weights, dict) else []
    if unknown:
        close = difflib.get_close_matches(unknown[0], labels, n=1)
        raise ConfigError(
            "training.class_weights",
            f"weighs '{unknown[0]}', which is none of the {len(labels)} labels",
            f"did you mean '{close[0]}'?" if close else f"labels are {', '.join(labels[:9])}",
        )


def _refuse_tools(examples: Iterable[Example]) -> None:
    """No arm is given tools when it answers, so none may learn with them."""
    for row in examples:
        for message in row.messages:
            if (
                row.tools
                or message.get("tool_calls")
                or message.get("role") in ("tool", "function")
            ):
                raise DataError(
                    row.place,
                    "uses tools, which no arm is offered when it answers",
                    "describe the tools in the text of the input and give the call as the text of "
                    "the answer, as examples/prepare.py does for bfcl",
                )


def save(bench: Workbench, directory: Path) -> None:
    """Write what a specialist needs later: the task, the training part, labels and passages."""
    about = {
        "task": bench.task.model_dump(mode="json"),
        "base_dir": str(bench.base_dir.resolve()),
        "labels": bench.labels,
        "passages": bench.passages,
    }
    (directory / "task.json").write_text(json.dumps(about, ensure_ascii=False), "utf-8")
    for name in ("train", "validation"):
        write_examples(directory / f"{name}.jsonl", getattr(bench.parts, name))


def load(directory: Path) -> Workbench:
    """Read what `save` wrote; the test part stays sealed.

    Raises:
        RunError: the files are missing or damaged.

    """
    try:
        about: dict[str, Any] = json.loads((directory / "task.json").read_text("utf-8"))
        train = read_rows(directory / "train.jsonl")
        validation = read_rows(directory / "validation.jsonl")
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            str(directory), f"is no finished run ({error})", "run 'metier run' to its end first"
        ) from None
    return Workbench(
        task=Task.parse(about["task"], str(directory / "task.json")),
        base_dir=Path(about["base_dir"]),
        parts=Parts(tuple(train), tuple(validation), (), {}, {}, ()),
        labels=tuple(about["labels"]),
        passages=tuple(about["passages"]),
        removed_passages={},
    )


def read_inputs(task: Task, file: Path) -> list[Example]:
    """Read requests from a file that is laid out as the task's data; outputs in it are ignored.

    Raises:
        DataError: the file or a row cannot be used.

    """
    columns = task.data.columns.model_copy(update={"output": None})
    return read_examples(
        file.name, task.kind, file.parent, task.data.format, columns, answers=False
    )


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(dataclasses.asdict(example)) + "\n")


def read_rows(path: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Example(**{**row, "messages": tuple(row["messages"]), "tools": tuple(row["tools"])})
        for row in rows
    ]
