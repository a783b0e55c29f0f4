"""Fresh processes: the peers' environment, and one measured piece of work in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from metier.runs import file_hash, fingerprint

BENCHMARKS = Path(__file__).resolve().parent.parent
_PINS = (BENCHMARKS / "peers.txt", BENCHMARKS.parent / "constraints.txt")


class NoResultError(Exception):
    """A process ended without a result."""


class Processes:
    """Starts one process at a time and returns what it measured.

    Args:
        work: directory of everything that is not a result.
        threads: of each process.

    """

    def __init__(self, work: Path, threads: int) -> None:
        self.work, self.threads = work, threads
        self._count = 0

    def ours(self, spec: dict[str, Any]) -> dict[str, Any]:
        """What our side measured.

        Raises:
            NoResultError: it ended with an error.

        """
        return self._run(sys.executable, "training.ours", spec)

    def peer(self, spec: dict[str, Any]) -> dict[str, Any]:
        """What the peers' side measured.

        Raises:
            NoResultError: it ended with an error.

        """
        return self._run(str(environment(self.work / "peers")), "training.peer", spec)

    def _run(self, python: str, module: str, spec: dict[str, Any]) -> dict[str, Any]:
        self._count += 1
        directory = self.work / "processes" / f"{os.getpid()}-{self._count:03}"
        directory.mkdir(parents=True)
        given, result = directory / "spec.json", directory / "result.json"
        spec = spec | {"threads": self.threads, "scratch": str(directory / "scratch")}
        given.write_text(json.dumps(spec), "utf-8")
        with (directory / "output.txt").open("wb") as output:
            command = [python, "-m", module, str(given), str(result)]
            started = time.time()
            done = subprocess.run(command, env=self._environment(), stdout=output, stderr=output)
        if done.returncode or not result.exists():
            said = (directory / "output.txt").read_text("utf-8", errors="replace").strip()
            raise NoResultError(f"{module} {spec['kind']}: {said[-2000:]} ({directory})")
        found: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return found | {"started": started}

    def _environment(self) -> dict[str, str]:
        """The same for both sides: as many threads, no network, no accelerator."""
        path = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(part for part in path if part),
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(self.work / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def environment(directory: Path) -> Path:
    """Python of the peers' environment, which is made where it is not there as pinned."""
    python = directory / "bin" / "python"
    state, wanted = directory / "pinned", fingerprint([file_hash(path) for path in _PINS])
    if state.exists() and state.read_text("utf-8") == wanted:
        return python
    print(f"setting up {directory} from benchmarks/peers.txt", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    pins, constraints = _PINS
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", constraints, "-r", pins], check=True)
    state.write_text(wanted, "utf-8")
    return python
