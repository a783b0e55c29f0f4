"""The ledger of a sealed test part: every opening is counted, none is forgotten.

One JSON line per opening in ``<task name>.ledger.jsonl``, in the directory of task.yaml. The first
line of a test part also holds a short hash of each of its rows (11 bytes a row), so that they are
known again when another split, limit or data file puts them into another test part.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from metier.config import Config
from metier.errors import DataError
from metier.runs import sync_directory


class Opening(Config):
    """What the ledger says when a test part is opened."""

    openings: int
    """How often a test part with rows of this one has been opened, this time included."""
    rows_seen: int = 0
    """Rows of this one that stood in a test part opened before."""


def ledger_path(task_dir: Path, name: str) -> Path:
    """Where the ledger of a task stands."""
    return task_dir / f"{name}.ledger.jsonl"


def open_test(
    task_dir: Path, name: str, test_fingerprint: str, rows: Sequence[str], reason: str
) -> Opening:
    """Record that a test part is opened, before it is.

    Args:
        task_dir: the directory of task.yaml.
        name: name of the task.
        test_fingerprint: `metier.data.split.Parts.test_fingerprint`.
        rows: `metier.data.split.Parts.test_rows`.
        reason: why it is opened, for people.

    Raises:
        DataError: the ledger cannot be written.

    """
    path = ledger_path(task_dir, name)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise DataError(
            str(path),
            f"the ledger cannot be written ({error.strerror})",
            "the sealed test part is opened only where that is recorded: make it writable",
        ) from None
    with os.fdopen(descriptor, "r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        content = handle.read()
        entry = {
            "test": test_fingerprint,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "reason": reason,
        }
        known = _rows_of_parts(content)
        if test_fingerprint not in known:
            entry["rows"] = " ".join(sorted(set(rows)))
        # A line torn by a crash is ended first, so that it cannot swallow this one.
        start = b"\n" if content and not content.endswith(b"\n") else b""
        handle.write(start + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    sync_directory(task_dir)
    known[test_fingerprint] = set(rows)
    return _count(content, known, rows)


def _rows_of_parts(content: bytes) -> dict[str, set[str]]:
    """The rows of each test part; lines that are damaged, or older than row hashes, have none."""
    found = {}
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "rows" in entry:
            found[str(entry.get("test"))] = set(str(entry["rows"]).split())
    return found


def _count(content: bytes, known: Mapping[str, set[str]], rows: Sequence[str]) -> Opening:
    """Count the lines of test parts that share rows.

    Counted by its fingerprint, an opening counts even where a crash tore its line.
    """
    shared = {part.encode(): kept for part, kept in known.items() if not kept.isdisjoint(rows)}
    opened = [part for line in content.splitlines() for part in shared if part in line]
    seen = set().union(*(shared[part] for part in opened))
    return Opening(openings=1 + len(opened), rows_seen=sum(row in seen for row in rows))
