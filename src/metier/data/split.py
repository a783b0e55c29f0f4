"""Training, validation and sealed test part, such that nothing of the test part leaks.

1. Each group goes to a part by the hash of (seed, group) alone: neither the order of rows nor
   added rows move it.
2. Where rows of different parts are identical, near-duplicates or of one group, the row in the
   less protected part is removed: training gives way to validation, validation to test.
3. A label that a part lacks gets its smallest-hash unit moved there. This is the only rule by
   which a row can change its part.
4. Caps keep the rows with the smallest hashes, with all labels in proportion.

Everything left out is counted under a reason code.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from metier.data import prepare
from metier.data.labels import refuse_same
from metier.data.sources import read_examples
from metier.errors import DataError
from metier.graders.labels import labels_of
from metier.records import Example
from metier.runs import fingerprint
from metier.task import LABELLED, Kind, Task
from metier.task import Split as SplitConfig

Part = Literal["train", "validation", "test"]
# From the least to the most protected.
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_SMALLEST: dict[Part, int] = {"train": 5, "validation": 3, "test": 5}
_FEW_TEST = 100
_PASSAGE = 40


@dataclass(frozen=True, slots=True)
class Parts:
    """What a split gave.

    Attributes:
        train: what arms learn from.
        validation: what every choice is made on.
        test: the sealed part.
        clusters: for each row id of `test` and `validation`, the cluster of rows that are not
            independent of it (same group, or near-duplicates): the unit of all statistics.
        removed: rows left out, by reason code.
        warnings: what a reader must know about the data.

    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    clusters: dict[str, str]
    removed: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def test_fingerprint(self) -> str:
        """Names this very test part, whatever the order of its rows."""
        return fingerprint(sorted(fingerprint([row.messages, row.tools]) for row in self.test))

    @property
    def test_rows(self) -> tuple[str, ...]:
        """Short hash of each test row's input (40 bits), whatever its id, answer and part."""
        texts = [prepare.normalise(prepare.text_of(row)) for row in self.test]
        return tuple(_hash("row", text)[:10] for text in texts)


def read_parts(task: Task, base_dir: Path) -> Parts:
    """Read the data a task names and split it, or use its official parts.

    Args:
        task: the task.
        base_dir: the directory of task.yaml.

    Raises:
        DataError: a row is malformed, or a part would be too small.

    """
    data = task.data

    def read(file: str) -> list[Example]:
        rows = read_examples(file, task.kind, base_dir, data.format, data.columns)
        if task.labels:
            _refuse_unlisted(rows, task.labels, task.kind)
        return rows

    if data.file:
        return split(read(data.file), task.split, task.kind)
    return assemble(
        read(data.train or ""),
        read(data.validation) if data.validation else None,
        read(data.test) if data.test else None,
        task.split,
        task.kind,
    )


def _refuse_unlisted(rows: Sequence[Example], labels: Sequence[str], kind: Kind) -> None:
    known = set(labels)
    for row in rows:
        for label in labels_of(row.answer, kind):
            if label in known:
                continue
            close = difflib.get_close_matches(label, labels, n=1)
            hint = f" (is it '{close[0]}'?)" if close else ""
            raise DataError(
                row.source,
                f"the label '{label}' is not among the task's labels",
                f"mend the row{hint}, or add it to 'labels' in task.yaml",
            )


def split(examples: Sequence[Example], config: SplitConfig, kind: Kind) -> Parts:
    """Split one set of examples.

    Raises:
        DataError: there are too few examples for three parts.

    """
    return assemble(examples, None, None, config, kind)


def assemble(
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    test: Sequence[Example] | None,
    config: SplitConfig,
    kind: Kind,
) -> Parts:
    """Take official parts as they are, and split what is missing off the training part.

    Rows of an official test part are never removed; what overlaps with them is, elsewhere.

    Raises:
        DataError: there are too few examples.

    """
    open_parts: list[Part] = ["train"]
    open_parts += ["validation"] if validation is None else []
    open_parts += ["test"] if test is None else []
    placed = [(row, _part_of(row.group, config, open_parts)) for row in train]
    placed += [(row, "validation") for row in validation or ()]
    placed += [(row, "test") for row in test or ()]
    placed = sorted(_with_own_ids(placed), key=lambda pair: pair[0].id)
    rows = [row for row, _ in placed]
    if kind == "classification":
        refuse_same(rows)
    part = {row.id: where for row, where in placed}

    cluster = _near_duplicates(rows, config.near_duplicate)
    removed = Counter(_remove_overlaps(rows, part, cluster))
    kept = [row for row in rows if row.id in part]
    units = _units(kept, cluster)
    repair = _Repair(kept, part, units, kind)
    repair.run(open_parts, config.seed)
    parts = {name: [row for row in kept if part[row.id] == name] for name in PARTS}
    limits = {"train": config.max_train, "test": config.max_test}
    limits["validation"] = config.max_validation
    for name in PARTS:
        parts[name], over = _cap(parts[name], name, limits[name], config.seed, kind)
        removed[f"over-max-{name}"] = over
    _refuse_unusable(parts, config, open_parts, kind)
    return Parts(
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        test=tuple(parts["test"]),
        clusters={row.id: units[row.id] for row in [*parts["validation"], *parts["test"]]},
        removed={reason: count for reason, count in sorted(removed.items()) if count},
        warnings=(
            *_conflicts(rows, kind),
            *_warn_labels(parts, kind, repair.moved),
            *_warn_size(parts, units),
        ),
    )


def _hash(*names: object) -> str:
    return hashlib.sha256("\0".join(map(str, names)).encode()).hexdigest()


def _part_of(group: str, config: SplitConfig, open_parts: Sequence[Part]) -> Part:
    draw = int(_hash("part", config.seed, group)[:15], 16) / 16**15
    test = config.test if "test" in open_parts else 0.0
    if draw < test:
        return "test"
    if "validation" in open_parts and draw < test + config.validation:
        return "validation"
    return "train"


def _with_own_ids(placed: Iterable[tuple[Example, Part]]) -> Iterator[tuple[Example, Part]]:
    """Rows with an id of their own, where two files use one id: the more protected keeps it."""
    taken: set[str] = set()
    for row, name in sorted(placed, key=lambda pair: PARTS.index(pair[1]), reverse=True):
        own = row if row.id not in taken else replace(row, id=f"{name}:{row.id}")
        taken.add(own.id)
        yield own, name


def _near_duplicates(rows: Sequence[Example], threshold: float) -> dict[str, str]:
    """Cluster of each row, named by the smallest id in it."""
    numbers = prepare.near_duplicate_clusters([prepare.text_of(row) for row in rows], threshold)
    return {row.id: rows[number].id for row, number in zip(rows, numbers, strict=True)}


def _remove_overlaps(
    rows: Sequence[Example], part: dict[str, Part], cluster: Mapping[str, str]
) -> Iterator[str]:
    """Take rows that overlap with a more protected part out of `part`; yield the reasons."""
    keys = {
        "duplicate": {row.id: prepare.normalise(prepare.text_of(row)) for row in rows},
        "near-duplicate": dict(cluster),
        "group": {row.id: row.group for row in rows},
    }
    for lower in ("validation", "train"):
        for reason, key in keys.items():
            above: dict[str, Part] = {}
            for name in PARTS[PARTS.index(lower) + 1 :]:
                above |= {key[row.id]: name for row in rows if part.get(row.id) == name}
            for row in rows:
                if part.get(row.id) == lower and key[row.id] in above:
                    del part[row.id]
                    yield f"{lower}-{reason}-of-{above[key[row.id]]}"


def _conflicts(rows: Sequence[Example], kind: Kind) -> list[str]:
    """Warn of identical inputs with different answers, unless answers are free text."""
    if kind == "expansion":
        return []
    answers = defaultdict(set)
    for row in rows:
        answers[prepare.normalise(prepare.text_of(row))].add(row.answer)
    count = sum(len(different) > 1 for different in answers.values())
    if not count:
        return []
    return [
        f"{count} inputs stand there with different answers: no arm can answer all of them; "
        "`metier audit` lists them"
    ]


def _units(rows: Sequence[Example], cluster: Mapping[str, str]) -> dict[str, str]:
    """Rows that are not independent: one group, or near-duplicates, or linked by such rows."""
    numbers = prepare.components([(f"g{row.group}", f"c{cluster[row.id]}") for row in rows])
    return {row.id: rows[number].id for row, number in zip(rows, numbers, strict=True)}


class _Repair:
    """Moves units so that every part that may change has every label.

    Rows without labels count as one label: no part stays without rows.
    """

    def __init__(
        self, rows: Sequence[Example], part: dict[str, Part], units: Mapping[str, str], kind: Kind
    ) -> None:
        self.rows: dict[str, list[Example]] = defaultdict(list)
        self.labels: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            self.rows[units[row.id]].append(row)
            self.labels[units[row.id]].update(labels_of(row.answer, kind) or ("",))
        self.part = part
        self.moved = 0

    def where(self, unit: str) -> Part:
        """The part a unit lies in."""
        return self.part[self.rows[unit][0].id]

    def run(self, open_parts: Sequence[Part], seed: int) -> None:
        """Give each label to each part, as far as it has units enough."""
        holders = defaultdict(list)
        for unit in sorted(self.rows, key=lambda name: _hash("move", seed, name)):
            for label in self.labels[unit]:
                holders[label].append(unit)
        for label in sorted(holders):
            units = [unit for unit in holders[label] if self.where(unit) in open_parts]
            order: tuple[Part, ...] = ("train", "test", "validation")
            wanted = [name for name in order if name in open_parts][: len(units)]
            for name in wanted:
                if all(self.where(unit) != name for unit in units):
                    self._move(label, name, wanted, holders, open_parts)

    def _move(
        self,
        label: str,
        to: Part,
        wanted: Sequence[Part],
        holders: Mapping[str, Sequence[str]],
        open_parts: Sequence[Part],
    ) -> None:
        """Move one unit with a label from where it is least missed; none, where all are needed."""
        for source in sorted(open_parts, key=lambda name: (name in wanted, PARTS.index(name))):
            here = [unit for unit in holders[label] if self.where(unit) == source]
            if source in wanted and len(here) < 2:
                continue
            for unit in here:
                if all(self._spared(unit, other, holders) for other in self.labels[unit] - {label}):
                    for row in self.rows[unit]:
                        self.part[row.id] = to
                    self.moved += 1
                    return

    def _spared(self, unit: str, label: str, holders: Mapping[str, Sequence[str]]) -> bool:
        """Whether the part of a unit keeps a label when the unit leaves it."""
        others = [other for other in holders[label] if other != unit]
        return not others or any(self.where(other) == self.where(unit) for other in others)


def _warn_labels(parts: Mapping[Part, Sequence[Example]], kind: Kind, moved: int) -> list[str]:
    if kind not in LABELLED:
        return []
    warnings = []
    if moved:
        warnings.append(f"{moved} groups changed their part so that rare labels occur in every one")
    found = {
        name: {label for row in rows for label in labels_of(row.answer, kind)}
        for name, rows in parts.items()
    }
    for name, own in found.items():
        lacking = sorted(set().union(*found.values()) - own)
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            warnings.append(
                f"the {name} part lacks the labels {', '.join(map(repr, lacking[:5]))}{more}: each "
                "needs at least 3 independent groups; add examples or merge rare labels"
            )
    return warnings


def _cap(
    rows: list[Example], name: Part, limit: int | None, seed: int, kind: Kind
) -> tuple[list[Example], int]:
    """The rows with the smallest hashes, every label in its share and at least once.

    Of a row with several labels the rarest counts.
    """
    if limit is None or len(rows) <= limit:
        return rows, 0
    by_label: dict[str, list[Example]] = defaultdict(list)
    counts = Counter(label for row in rows for label in labels_of(row.answer, kind))
    for row in sorted(rows, key=lambda row: _hash("cap", seed, row.id)):
        labels = labels_of(row.answer, kind) or ("",)
        by_label[min(labels, key=lambda label: (counts[label], label))].append(row)
    if limit < len(by_label):
        raise DataError(
            f"split.max_{name}",
            f"{limit} rows cannot hold all {len(by_label)} labels",
            f"allow at least {len(by_label)}",
        )
    # The first row of each label ranks 0, later ones by how much of the label stands before them.
    ranked = [
        (rank / len(group), _hash("cap", seed, row.id), row)
        for group in by_label.values()
        for rank, row in enumerate(group)
    ]
    kept = {row.id for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:limit]}
    return [row for row in rows if row.id in kept], len(rows) - limit


def _refuse_unusable(
    parts: Mapping[Part, Sequence[Example]],
    config: SplitConfig,
    open_parts: Sequence[Part],
    kind: Kind,
) -> None:
    total = sum(map(len, parts.values()))
    shares = {"validation": config.validation, "test": config.test}
    shares["train"] = 1 - sum(shares[name] for name in open_parts if name != "train")
    for name, rows in parts.items():
        if len(rows) >= _SMALLEST[name]:
            continue
        needed = 2 * math.ceil(_SMALLEST[name] / shares[name])  # parts vary by chance
        remedy = (
            f"give about {needed} independent examples in all"
            if name in open_parts
            else f"give a {name} file with more examples"
        )
        raise DataError(
            f"{name} part",
            f"{len(rows)} rows of {total} are too few: at least {_SMALLEST[name]} are needed",
            remedy,
        )
    labels = {label for row in parts["train"] for label in labels_of(row.answer, kind)}
    if kind in LABELLED and len(labels) < 2:
        raise DataError(
            "training part",
            f"all {len(parts['train'])} rows have the same label, or none",
            "two labels or more are needed; is the right column named as output?",
        )


def _warn_size(parts: Mapping[Part, Sequence[Example]], units: Mapping[str, str]) -> list[str]:
    test = parts["test"]
    clusters = len({units[row.id] for row in test})
    if clusters >= _FEW_TEST:
        return []
    return [
        f"the test part has only {len(test)} rows in {clusters} independent clusters: "
        "only large differences between arms can be shown"
    ]


def corpus_overlap(
    documents: Sequence[Sequence[str]], test: Sequence[Example]
) -> dict[str, list[int]]:
    """Which passages of a retrieval corpus hold a test input or test answer, or part of one.

    Texts are looked for word for word in whole documents, normalised and without blanks, so that
    they are found wherever the document is cut. Those under 40 characters are left out, for they
    occur by chance: `not_looked_for` counts them.

    Args:
        documents: the passages of each document, in order.
        test: the test part.

    Returns:
        for the reasons ``test-input`` and ``test-answer``, the indices of the passages that such a
        text touches, counted through all documents.

    """
    squeezed = [[_squeeze(passage) for passage in passages] for passages in documents]
    starts = [0, *accumulate(map(len, documents))]
    found: dict[str, list[int]] = {}
    for reason, texts in {
        "test-input": {text for row in test for text in (prepare.text_of(row), row.input)},
        "test-answer": {row.answer for row in test},
    }.items():
        needles = {_squeeze(text) for text in texts if not _short(text)}
        touched = [_touched(passages, needles) for passages in squeezed]
        hits = [start + i for start, here in zip(starts, touched, strict=False) for i in here]
        if hits:
            found[reason] = hits
    return found


def not_looked_for(test: Sequence[Example]) -> list[str]:
    """What `corpus_overlap` leaves out, in words."""
    short = {
        "inputs": sum(_short(prepare.text_of(row)) for row in test),
        "answers": sum(_short(row.answer) for row in test),
    }
    return [
        f"{count} of {len(test)} test {what} are shorter than {_PASSAGE} characters: they were "
        "not looked for in data.documents"
        for what, count in short.items()
        if count
    ]


def _short(text: str) -> bool:
    return len(prepare.normalise(text)) < _PASSAGE


def _squeeze(text: str) -> str:
    """Passages drop the blanks at which they are cut, and only those."""
    return prepare.normalise(text).replace(" ", "")


def _touched(passages: Sequence[str], needles: Iterable[str]) -> list[int]:
    """Indices of the passages that a needle touches where it stands in all of them joined."""
    document, ends = "".join(passages), list(accumulate(map(len, passages)))
    found: set[int] = set()
    for needle in needles:
        at = document.find(needle)
        while at >= 0:
            last = bisect_left(ends, at + len(needle))
            found.update(range(bisect_right(ends, at), last + 1))
            at = document.find(needle, at + 1)
    return sorted(found)
