"""The ledger counts every opening, also under concurrency and after a crash."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from metier.data.ledger import ledger_path, open_test
from metier.errors import DataError

A, B = "a" * 64, "b" * 64


def test_openings_are_counted_per_test_part(tmp_path: Path) -> None:
    counts = [open_test(tmp_path, "t", part, "run") for part in (A, A, B, A, B)]
    assert counts == [1, 2, 1, 3, 2]
    assert open_test(tmp_path, "other", A, "run") == 1


def test_an_entry_says_when_what_and_why(tmp_path: Path) -> None:
    open_test(tmp_path, "t", A, 'metier run "naïve"\nsecond line')
    (line,) = ledger_path(tmp_path, "t").read_text("utf-8").splitlines()
    entry = json.loads(line)
    assert entry["test"] == A
    assert entry["reason"] == 'metier run "naïve"\nsecond line'
    assert len(entry["time"]) == len("2025-01-01T00:00:00Z")


@pytest.mark.parametrize(("cut", "counted"), [(1, 3), (3, 3), (20, 3), (60, 2), (140, 2)])
def test_a_torn_last_line_spoils_nothing(tmp_path: Path, cut: int, counted: int) -> None:
    """A line torn before its fingerprint was never synced: that part stayed sealed."""
    for _ in range(3):
        open_test(tmp_path, "t", A, "run")
    path = ledger_path(tmp_path, "t")
    path.write_bytes(path.read_bytes()[:-cut])
    assert open_test(tmp_path, "t", A, "run") == counted + 1
    assert open_test(tmp_path, "t", A, "run") == counted + 2
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["test"] for line in lines[-2:]] == [A, A]


def test_damaged_bytes_are_passed_over(tmp_path: Path) -> None:
    ledger_path(tmp_path, "t").write_bytes(b"\xff\xfe garbage\n[]\nnull\n\n")
    assert open_test(tmp_path, "t", A, "run") == 1


def _open_often(directory: str, results: multiprocessing.Queue[int]) -> None:
    for _ in range(20):
        results.put(open_test(Path(directory), "t", A, "run"))


def test_processes_that_open_together_each_get_a_number_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    workers = [context.Process(target=_open_often, args=(str(tmp_path), results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    numbers = sorted(results.get(timeout=60) for _ in range(60))
    for worker in workers:
        worker.join()
    assert numbers == list(range(1, 61))


def test_an_opening_waits_for_the_one_before_it(tmp_path: Path) -> None:
    open_test(tmp_path, "t", A, "run")
    numbers: list[int] = []
    second = threading.Thread(target=lambda: numbers.append(open_test(tmp_path, "t", A, "run")))
    with ledger_path(tmp_path, "t").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second.start()
        second.join(timeout=0.3)
        assert numbers == []
    second.join(timeout=30)
    assert numbers == [2]


def test_an_entry_is_on_disk_before_the_part_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(ledger_path(tmp_path, "t").read_bytes())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    open_test(tmp_path, "t", A, "run")
    assert len(synced) == 2, "the file, then its directory"
    assert A.encode() in synced[0]


def test_a_ledger_that_cannot_be_written_keeps_the_part_sealed(tmp_path: Path) -> None:
    ledger_path(tmp_path, "t").mkdir()
    with pytest.raises(DataError, match="ledger cannot be written"):
        open_test(tmp_path, "t", A, "run")
    with pytest.raises(DataError, match="ledger cannot be written"):
        open_test(tmp_path / "nowhere", "t", A, "run")
