"""What every measured process shares: settings come in as JSON, figures go out as JSON.

Both sides import this module, each in its own environment: nothing here may need metier or TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Spec = Mapping[str, Any]
_PACKAGES = ("metier", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


class Steps:
    """Figures of a training, step by step.

    Attributes:
        seconds: wall time of each step, what lies between it and the one before included.
        losses: mean over the trained tokens of each step.
        tokens: real tokens that were read, padding excluded.
        trained: tokens that the loss looked at.
        contents: digest of the rows of each step, in any order, and of what is trained in them.

    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.trained: list[int] = []
        self.contents: list[int] = []
        self._read = self._trained = self._content = 0
        self._since = time.perf_counter()

    def begin(self) -> None:
        """The first step begins now; what was read before was only tried."""
        self._read = self._trained = self._content = 0
        self._since = time.perf_counter()

    def count(self, tokens: int, trained: int) -> None:
        """So many tokens of the step are read."""
        self._read += tokens
        self._trained += trained

    def row(self, ids: Sequence[int], targets: Sequence[int]) -> None:
        """A row of the step is read.

        Args:
            ids: all but its last.
            targets: the id that follows each where it is trained, else a negative number.

        """
        wanted = [target if target >= 0 else -1 for target in targets]
        self.count(len(ids) + 1, sum(target >= 0 for target in wanted))
        self._content += zlib.crc32(array("q", [*ids, -2, *wanted]).tobytes())

    def end(self, loss: float) -> None:
        """The step is over."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self.losses.append(loss)
        self.tokens.append(self._read)
        self.trained.append(self._trained)
        self.contents.append(self._content)
        self._read = self._trained = self._content = 0
        self._since = now

    def figures(self) -> dict[str, Any]:
        """All of them, for JSON."""
        names = ("seconds", "losses", "tokens", "trained", "contents")
        return {name: getattr(self, name) for name in names}


def peak_memory() -> int:
    """Bytes this process held in memory at most.

    ``ru_maxrss`` would do, but on Linux it begins with what the parent held when it started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if os.uname().sysname == "Darwin" else most * 1024


def versions() -> dict[str, str]:
    """Of the packages that matter, as far as they are installed here."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def serve(work: Mapping[str, Callable[[Spec], dict[str, Any]]]) -> None:
    """Do the one piece of work that the command line asks for.

    Args:
        work: by the spec's ``kind``.

    """
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    spec = json.loads(arguments.spec.read_text("utf-8"))
    result = work[spec["kind"]](spec)
    load = os.getloadavg()[0]
    result |= {"peak_memory": peak_memory(), "versions": versions(), "load": load}
    arguments.out.write_text(json.dumps(result), "utf-8")
