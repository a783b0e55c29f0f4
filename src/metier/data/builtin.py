"""Built-in tasks made at run time from the documentation that ships with every Python.

``stdlib``: which module of the standard library does what a description says? The text is the
docstring of a public function, class or method with the module's own name masked; the label is the
top-level module.

``extract``: signature and docstring to JSON. The truth is taken from the code by `ast`. A docstring
does not always tell what the code does, so a row is kept only where it does: the answer stands in
the input, and a row that nobody could answer without the body is left out.

Nothing is copied into the project: another interpreter gives slightly other rows, the same
interpreter always the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from metier.data.docstrings import (
    Contract,
    Documented,
    Function,
    contract,
    count_words,
    description,
    has_module,
    mask,
    modules,
    read_module,
    signature,
)
from metier.data.prepare import components, near_duplicate_clusters, normalise
from metier.errors import DataError
from metier.records import Example

# Modules of Python 3.11 to 3.14 with at least 25 documented public names in five classes or more.
MODULES = (
    "asyncio", "bdb", "calendar", "codecs", "collections", "configparser", "datetime", "decimal",
    "doctest", "email", "ftplib", "http", "imaplib", "importlib", "inspect", "io", "ipaddress",
    "logging", "mailbox", "multiprocessing", "os", "pathlib", "pydoc", "shutil", "smtplib",
    "socketserver", "ssl", "statistics", "symtable", "tarfile", "threading", "traceback", "typing",
    "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zipfile",
)  # fmt: skip
# Where a module's code stands in other files; some exist only in some versions of Python.
_TWINS = {
    "collections": ("_collections_abc",),
    "datetime": ("_pydatetime",),
    "decimal": ("_pydecimal",),
    "io": ("_pyio",),
    "os": ("posixpath", "ntpath", "genericpath"),
    "pathlib": ("pathlib._local", "pathlib._abc", "pathlib._os"),
}
# Caps that keep one large class or package from outweighing the rest.
_PER_CLASS = 20
_PER_MODULE = 150
_WORDS = 60
_FEWEST_WORDS = 5
_SAME = 0.8
_WORDS_OF_CONTRACT = 80
_CONTRACTS = 1200
# What is documented, the input made from it, the answer.
Triple = tuple[Documented, str, str]


def read(name: str) -> list[Example]:
    """The examples of a built-in data set, in a fixed order.

    Raises:
        DataError: there is no such set, or this Python lacks its own sources.

    """
    if name not in _READERS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        remedy = f"did you mean 'builtin:{close[0]}'?" if close else f"there are {', '.join(NAMES)}"
        raise DataError(f"builtin:{name}", "is no built-in data set", remedy)
    return _READERS[name]()


def topics() -> list[str]:
    """General English text: the topics of Python's language reference, by name."""
    from pydoc_data.topics import topics as texts

    return [text for _, text in sorted(texts.items())]


def _documented(module: str) -> Iterator[Documented]:
    for name in (module, *(twin for twin in _TWINS.get(module, ()) if has_module(twin))):
        yield from read_module(name)


def _example(item: Documented, text: str, answer: str, group: str, names: Counter[str]) -> Example:
    name = f"{item.module}.{item.name}"
    names[name] += 1
    copy = f"-{names[name]}" if names[name] > 1 else ""
    return Example(
        id=name + copy,
        messages=({"role": "user", "content": text}, {"role": "assistant", "content": answer}),
        group=group,
        source=name,
    )


def _examples(rows: Sequence[Triple]) -> list[Example]:
    """Examples whose group is the top-level class or function, merged with near-duplicates."""
    clusters = near_duplicate_clusters([text for _, text, _ in rows], _SAME)
    tops = [item.top for item, _, _ in rows]
    numbers = components([(f"t{t}", f"c{c}") for t, c in zip(tops, clusters, strict=True)])
    names: Counter[str] = Counter()
    return [
        _example(item, text, answer, tops[number], names)
        for (item, text, answer), number in zip(rows, numbers, strict=True)
    ]


def _unambiguous(rows: Iterable[Triple]) -> list[Triple]:
    """One row for each text; texts with different answers are left out, for nobody can tell."""
    answers: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Triple] = {}
    for row in rows:
        answers[normalise(row[1])].add(row[2])
        first.setdefault(normalise(row[1]), row)
    return [row for text, row in first.items() if len(answers[text]) == 1]


def _smallest(rows: Sequence[Triple], limit: int, key: Callable[[Triple], str]) -> list[Triple]:
    """At most so many rows for each key, those with the smallest hashes of their text."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(row[1].encode()).digest())
    taken: Counter[str] = Counter()
    kept = set()
    for row in ordered:
        taken[key(row)] += 1
        if taken[key(row)] <= limit:
            kept.add(row[1])
    return [row for row in rows if row[1] in kept]


def _stdlib() -> list[Example]:
    rows = []
    for module in MODULES:
        for item in _documented(module):
            text = mask(description(item.docstring, _WORDS), (module, *_TWINS.get(module, ())))
            if count_words(text) >= _FEWEST_WORDS:
                rows.append((item, text, module))
    rows = _smallest(_unambiguous(rows), _PER_CLASS, lambda row: row[0].top)
    return _examples(_smallest(rows, _PER_MODULE, lambda row: row[2]))


_EXCEPTION = re.compile(
    r"\b(?:[A-Z]\w*(?:Error|Exception|Exit|Interrupt)|StopIteration|Empty|Full)\b"
)
_YIELDS = re.compile(r"\b(?:yield|generat|iterat)", re.IGNORECASE)
_RETURNS = re.compile(r"\breturn", re.IGNORECASE)


def _extract() -> list[Example]:
    rows = []
    for module in modules():
        for item in read_module(module, private=True):
            text = description(item.docstring, _WORDS_OF_CONTRACT)
            if isinstance(item.node, Function) and count_words(text) >= _FEWEST_WORDS:
                truth = contract(item.node)
                if truth.parameters and _tells(text, truth):
                    answer = json.dumps(asdict(truth), separators=(",", ":"), ensure_ascii=False)
                    rows.append((item, f"{signature(item.node)}\n{text}", answer))
    rows = _smallest(_unambiguous(rows), _PER_CLASS, lambda row: row[0].top)
    rich = [row for row in rows if _is_rich(row[2])]
    poor = [row for row in rows if not _is_rich(row[2])]
    rows = [*rich, *_smallest(poor, max(0, _CONTRACTS - len(rich)), lambda _: "")]
    return _examples(sorted(rows, key=lambda row: (row[0].module, row[0].name, row[1])))


def _is_rich(answer: str) -> bool:
    """Whether there is more to find than one parameter."""
    truth = json.loads(answer)
    return len(truth["parameters"]) > 1 or bool(truth["defaults"]) or bool(truth["raises"])


def _tells(text: str, truth: Contract) -> bool:
    """Whether a docstring says just what the code does: what it returns and what it raises."""
    says = "iterator" if _YIELDS.search(text) else "value" if _RETURNS.search(text) else "none"
    return says == truth.returns and set(_EXCEPTION.findall(text)) == set(truth.raises)


_READERS: dict[str, Callable[[], list[Example]]] = {"stdlib": _stdlib, "extract": _extract}
NAMES = tuple(_READERS)


def task_values(name: str) -> dict[str, Any]:
    """The content of task.yaml for a built-in data set."""
    common = {
        "name": name,
        "data": {"file": f"builtin:{name}"},
        "base": "starter",
        "template": "question-answer",
        "split": {"max_train": 1500, "max_validation": 250, "max_test": 400},
        "margin": 0.02,
        # So that the whole demo ends within minutes on two cores.
        "training": {"epochs": 4},
        "budget": 30.0,
    }
    return common | _WORDING[name]


_WORDING: dict[str, dict[str, Any]] = {
    "stdlib": {
        "kind": "classification",
        "instruction": "Name the module of Python's standard library that does what the text says.",
        "good": "The name of the one top-level module that the described code belongs to.",
        "better": "The right module even where two modules do similar things.",
        "bad": "Another module, a submodule, a name that is no label, or more than the name.",
        "labels": list(MODULES),
        "grader": "exact",
    },
    "extract": {
        "kind": "extraction",
        "instruction": (
            "Write the function's contract as JSON with four keys: parameters (names in order, "
            "without self, cls and asterisks), defaults (parameter to default, as source text), "
            "returns (value, none, or iterator) and raises (names of the exceptions it raises)."
        ),
        "good": "Valid JSON with the four keys, every field as the code has it.",
        "better": "The same, also for long signatures and several exceptions.",
        "bad": "Text that is no JSON, an invented parameter, a default or exception left out.",
        "grader": "fields",
    },
}
