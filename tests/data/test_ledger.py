"""The ledger counts every opening, also under concurrency and after a crash."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from metier.data.ledger import ledger_path, open_test
from metier.errors import DataError

A, B, C = "a" * 64, "b" * 64, "c" * 64
ROWS, OTHERS = ("a1", "a2", "a3"), ("b1", "b2")


def count(directory: Path, part: str, rows: Sequence[str], name: str = "t") -> tuple[int, int]:
    opening = open_test(directory, name, part, rows, "run")
    return opening.openings, opening.rows_seen


def test_openings_are_counted_per_test_part(tmp_path: Path) -> None:
    parts = {A: ROWS, B: OTHERS}
    counts = [count(tmp_path, part, parts[part]) for part in (A, A, B, A, B)]
    assert counts == [(1, 0), (2, 3), (1, 0), (3, 3), (2, 2)]
    assert count(tmp_path, A, ROWS, "other") == (1, 0)


def test_an_opening_counts_for_every_test_part_that_shares_a_row_with_it(tmp_path: Path) -> None:
    assert count(tmp_path, A, ROWS) == (1, 0)
    assert count(tmp_path, B, ROWS[1:]) == (2, 2), "a lower limit"
    assert count(tmp_path, C, (*OTHERS, ROWS[0], ROWS[0])) == (2, 2), "another seed; B holds no a1"
    assert count(tmp_path, "d" * 64, OTHERS[:1]) == (2, 1)
    assert count(tmp_path, "e" * 64, ("e1",)) == (1, 0)
    assert count(tmp_path, A, ROWS) == (4, 3)


def test_lines_without_rows_count_by_their_fingerprint(tmp_path: Path) -> None:
    line = json.dumps({"test": A, "time": "2025-01-01T00:00:00Z", "reason": "metier run"})
    ledger_path(tmp_path, "t").write_text(f"{line}\n{line}\n")
    assert count(tmp_path, B, ROWS[1:]) == (1, 0)
    assert count(tmp_path, A, ROWS) == (4, 3)


def test_the_rows_of_a_part_are_written_once(tmp_path: Path) -> None:
    rows = [f"{number:010x}" for number in range(3000)]
    for _ in range(20):
        open_test(tmp_path, "t", A, rows, "run")
    assert ledger_path(tmp_path, "t").stat().st_size < 40_000


def test_an_entry_says_when_what_and_why(tmp_path: Path) -> None:
    open_test(tmp_path, "t", A, ROWS, 'metier run "naïve"\nsecond line')
    (line,) = ledger_path(tmp_path, "t").read_text("utf-8").splitlines()
    entry = json.loads(line)
    assert entry["test"] == A
    assert entry["reason"] == 'metier run "naïve"\nsecond line'
    assert len(entry["time"]) == len("2025-01-01T00:00:00Z")


@pytest.mark.parametrize(("cut", "counted"), [(1, 3), (3, 3), (20, 3), (60, 2), (140, 2)])
def test_a_torn_last_line_spoils_nothing(tmp_path: Path, cut: int, counted: int) -> None:
    """A line torn before its fingerprint was never synced: that part stayed sealed."""
    for _ in range(3):
        open_test(tmp_path, "t", A, ROWS, "run")
    path = ledger_path(tmp_path, "t")
    path.write_bytes(path.read_bytes()[:-cut])
    assert count(tmp_path, A, ROWS) == (counted + 1, 3)
    assert count(tmp_path, A, ROWS) == (counted + 2, 3)
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["test"] for line in lines[-2:]] == [A, A]


def test_damaged_bytes_are_passed_over(tmp_path: Path) -> None:
    ledger_path(tmp_path, "t").write_bytes(b"\xff\xfe garbage\n[]\nnull\n\n")
    assert count(tmp_path, A, ROWS) == (1, 0)


def _open_often(directory: str, results: multiprocessing.Queue[int]) -> None:
    for _ in range(20):
        results.put(count(Path(directory), A, ROWS)[0])


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
    open_test(tmp_path, "t", A, ROWS, "run")
    numbers: list[int] = []
    second = threading.Thread(target=lambda: numbers.append(count(tmp_path, A, ROWS)[0]))
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
    open_test(tmp_path, "t", A, ROWS, "run")
    assert len(synced) == 2, "the file, then its directory"
    assert A.encode() in synced[0]


def test_a_ledger_that_cannot_be_written_keeps_the_part_sealed(tmp_path: Path) -> None:
    ledger_path(tmp_path, "t").mkdir()
    with pytest.raises(DataError, match="ledger cannot be written"):
        open_test(tmp_path, "t", A, ROWS, "run")
    with pytest.raises(DataError, match="ledger cannot be written"):
        open_test(tmp_path / "nowhere", "t", A, ROWS, "run")
