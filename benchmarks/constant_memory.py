"""Peak memory of pre-training on a corpus and on one ten times larger: tokenising and training.

    python benchmarks/constant_memory.py [--megabytes 40]

Text is drawn on the fly into a temporary directory, and a process of its own trains an adapter of
the starter for a few steps on each corpus. Writes benchmarks/results/constant_memory.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from metier import recipes, runs
from metier.progress import Silent

HERE = Path(__file__).parent
TIMES = 10
GOAL = 40.0
"""Megabytes by which the peak may grow: what the allocator makes of chance."""
RECIPE = {
    "name": "memory",
    "base": "starter",
    "adapter": {"rank": 4},
    "sources": [{"name": "words", "files": ["words.jsonl"]}],
    "tokens": 1024,
    "step_lengths": [128],
    "micro_tokens": 128,
    "evaluation_windows": 4,
}
_WORDS = 200


def write_corpus(directory: Path, megabytes: float) -> int:
    """Documents of random words, and the recipe that reads them; returns the bytes of text."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(4, 40))) for _ in range(5000)]
    size = 0
    with (directory / "words.jsonl").open("w") as file:
        while size < megabytes * 1e6:
            text = " ".join(draw.choices(words, k=_WORDS))
            size += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    (directory / "recipe.yaml").write_text(json.dumps(RECIPE))
    return size


class Peaks(Silent):
    """Keeps the peak memory of this process when tokenising is over."""

    tokenised = 0.0

    def stage(self, name: str, _total: float | None = None) -> None:
        """Look when the base is first read."""
        if name.startswith("measure"):
            self.tokenised = peak()


def peak() -> float:
    """Largest resident memory of this process so far, in megabytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 1e3 if sys.platform != "darwin" else kilobytes / 1e6


def train(directory: Path) -> dict[str, float]:
    """Follow the recipe in a directory; peaks in megabytes."""
    progress = Peaks()
    recipes.pretrain(directory / "recipe.yaml", directory / "out", progress=progress)
    return {"tokenised": progress.tokenised, "trained": peak()}


def measure(megabytes: float, command: list[str]) -> dict[str, Any]:
    """Peaks of a new process on a corpus of its own.

    Args:
        megabytes: of text.
        command: runs `train` on the directory that is put behind it, and prints what it gives.

    """
    with tempfile.TemporaryDirectory() as name:
        size = write_corpus(Path(name), megabytes)
        done = subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True)
    return {"text_megabytes": size / 1e6} | json.loads(done.stdout)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "constant_memory.json")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(arguments.train)))
        return
    command = [sys.executable, __file__, "--train"]
    small, large = (measure(arguments.megabytes * times, command) for times in (1, TIMES))
    rows = []
    for what in ("tokenised", "trained"):
        growth = large[what] - small[what]
        rows.append(
            {
                "scenario": f"peak memory when {what}, {large['text_megabytes']:,.0f} MB of text",
                "against": f"{small['text_megabytes']:,.0f} MB: {small[what]:,.0f} MB",
                "figure": "growth in MB",
                "value": growth,
                "goal": GOAL,
                "holds": growth <= GOAL,
            }
        )
        print(f"{what}: {small[what]:,.0f} MB, then {large[what]:,.0f} MB ({growth:+.1f})")
    result = {"rows": rows, "small": small, "large": large, "versions": runs.versions()}
    runs.write_atomic(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
