"""The ledger of a sealed test part: every opening is counted, none is forgotten.

One JSON line per opening in ``<task name>.ledger.jsonl``, in the directory of task.yaml.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

from metier.errors import DataError
from metier.runs import sync_directory


def ledger_path(task_dir: Path, name: str) -> Path:
    """Where the ledger of a task stands."""
    return task_dir / f"{name}.ledger.jsonl"


def open_test(task_dir: Path, name: str, test_fingerprint: str, reason: str) -> int:
    """Record that a test part is opened, before it is.

    Args:
        task_dir: the directory of task.yaml.
        name: name of the task.
        test_fingerprint: `metier.data.split.Parts.test_fingerprint`.
        reason: why it is opened, for people.

    Returns:
        how often this very test part has been opened, this time included.

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
        # A line torn by a crash is ended first, so that it cannot swallow this one.
        start = b"\n" if content and not content.endswith(b"\n") else b""
        handle.write(start + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())
    sync_directory(task_dir)
    # Counted by its fingerprint, an opening counts even where a crash tore its line.
    return 1 + sum(test_fingerprint.encode() in line for line in content.splitlines())
