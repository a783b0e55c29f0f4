"""Accuracy of a base on BLiMP (Warstadt et al. 2020, arXiv 1912.00582): which sentence is likelier.

    python benchmarks/blimp.py [BASE] [--data DIRECTORY]

For each pair, the sum of log-probabilities of all tokens after the beginning-of-sequence token is
compared. Prints the accuracy of each paradigm and their mean, and writes
benchmarks/results/blimp.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from metier import runs
from metier.model.device import set_up_processor
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.text.template import Renderer

HERE = Path(__file__).parent
GOAL = 0.63


def accuracy(engine: Engine, path: Path) -> list[bool]:
    """Whether the good sentence of each pair is likelier."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    tokenizer = engine.renderer.tokenizer
    keys = ("sentence_good", "sentence_bad")
    sums = engine.logprobs(
        [([tokenizer.opening_id], tokenizer.encode(pair[key])) for pair in pairs for key in keys]
    )
    return [good > bad for good, bad in zip(sums[::2], sums[1::2], strict=True)]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default="starter")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data/blimp")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "blimp.json")
    arguments = parser.parse_args()
    set_up_processor()
    base = load_base(arguments.base)
    engine = Engine(base.model, Renderer(base.tokenizer, "plain"), max_new_tokens=1)
    paradigms = {}
    for path in sorted(arguments.data.glob("*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        paradigms[name] = float(np.mean(accuracy(engine, path)))
        print(f"{paradigms[name]:7.1%}  {name}", flush=True)
    mean = float(np.mean(list(paradigms.values())))
    # The paradigms are the units: their accuracies differ far more than chance within one.
    generator = np.random.default_rng(0)
    draws = generator.choice(list(paradigms.values()), size=(10_000, len(paradigms))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    print(f"{mean:7.1%}  mean of {len(paradigms)} paradigms ({low:.1%} to {high:.1%})")
    row = {
        "scenario": f"BLiMP, {len(paradigms)} paradigms, {arguments.base}",
        "against": "chance 50 %",
        "figure": "accuracy",
        "value": mean,
        "low": low,
        "high": high,
        "goal": GOAL,
        "holds": mean >= GOAL,
    }
    result = {"rows": [row], "paradigms": paradigms, "versions": runs.versions()}
    runs.write_atomic(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
