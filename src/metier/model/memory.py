"""The most memory a piece of work holds, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import TracebackType

import psutil
import torch

_INTERVAL = 0.05

# Of glibc's mallopt: free memory at the end of the heap, and the size of a block, from which on it
# goes back to the system at once.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_AT_ONCE = 1 << 28

SLACK = 1 << 29
"""Bytes that a long piece of work may gather before it gives memory back."""


class PeakMemory:
    """Measures the process's memory while it is entered, sampled twenty times a second.

    Attributes:
        peak: bytes held at most: resident memory of the process, and on a GPU the allocator's.

    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident())
            if self._stop.wait(_INTERVAL):
                return


def keep_freed() -> None:
    """Let freed memory of tensors be used again.

    By itself glibc returns each large one to the system, which then clears every page anew: a third
    of the time of an output head, a tenth of that of a whole training step (`docs/log.md`). What
    gathers so is bounded by `Thrift`. Other C libraries decide for themselves.
    """
    if sys.platform == "linux":
        option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
        option(_MMAP_THRESHOLD, _AT_ONCE)
        option(_TRIM_THRESHOLD, _AT_ONCE)


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps the pages of large tensors that were freed between others: a training on rows of
    many lengths came to hold five times what it used. Other C libraries return them themselves.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
        trim(0)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


class Thrift:
    """Gives memory back whenever the process has grown by `slack` bytes since it last did.

    Each time costs as much as fetching anew the pages that are still used in turn.
    """

    def __init__(self, slack: int = SLACK) -> None:
        self._slack = slack
        self._held = resident()

    def look(self) -> None:
        """Give back if it is time."""
        if resident() - self._held > self._slack:
            give_back()
            self._held = resident()
