"""Training, generation and start-up, side by side with the libraries that people use for them.

    python benchmarks/train.py [lora] [full] [pretrain] [generate] [start-up] [--quick]
    python benchmarks/train.py lora --ours-only --profile

Both sides get the same rows in the same order, the same weights and settings; they run in turn,
each time in a fresh process, the peers in an environment of their own (benchmarks/peers.txt). What
they compute is compared first. Prints the table and writes benchmarks/results/train.json, in
benchmarks/results/train-runs.jsonl every run behind it, and the table into docs/results.md.
benchmarks/README.md says what is compared and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import psutil  # noqa: E402
from training.answering import Answering  # noqa: E402
from training.bench import QUICK, Bench, Outcome, Scenario, Settings, speeds  # noqa: E402
from training.fine_tuning import FineTuning  # noqa: E402
from training.pretraining import Pretraining  # noqa: E402
from training.starting import StartUp  # noqa: E402

from metier.runs import versions, write_atomic  # noqa: E402
from training import figures  # noqa: E402
from training.processes import Processes  # noqa: E402

RESULTS, RUNS = HERE / "results" / "train.json", HERE / "results" / "train-runs.jsonl"
PAGE = HERE.parent / "docs" / "results.md"
BEGIN, END = "<!-- training -->\n", "<!-- /training -->"
BUSY = 0.5

SCENARIOS: dict[str, Callable[[Bench], Scenario]] = {
    "lora": lambda bench: FineTuning(bench, "lora"),
    "full": lambda bench: FineTuning(bench, "full"),
    "pretrain": Pretraining,
    "generate": Answering,
    "start-up": StartUp,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the scenarios named, or all."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    work = chosen.work.resolve()
    settings = QUICK if chosen.quick else Settings()
    bench = Bench(Processes(work, chosen.threads), settings, chosen.data.resolve())
    out = (work / "quick.json", work / "quick-runs.jsonl") if chosen.quick else (RESULTS, RUNS)
    for name in chosen.names or SCENARIOS:
        print(f"{name}:", flush=True)
        _warn_if_busy()
        scenario = SCENARIOS[name](bench)
        if chosen.ours_only:
            show(scenario.ours(chosen.profile), settings)
            continue
        began = time.time()
        outcome = scenario.compare()
        keep(name, outcome, about(settings, chosen.threads, began), *out)
        for peer, reasons in outcome.gates.items():
            print(f"  same work as {peer}: {'; '.join(reasons[:5]) or 'yes'}")
        print(figures.table(outcome.rows), flush=True)
    if not chosen.quick and not chosen.ours_only:
        write_table()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="a few steps, one round, kept nowhere")
    parser.add_argument("--ours-only", action="store_true", help="one run of our side, no figures")
    parser.add_argument("--profile", action="store_true", help="with --ours-only: its operators")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("runs/train"))
    cores = psutil.cpu_count(logical=False) or 1
    parser.add_argument("--threads", type=int, default=cores, help=f"of each side ({cores})")
    return parser


def _warn_if_busy() -> None:
    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f"  other programs keep {load:.1f} cores busy: figures will not mean much", flush=True
        )


def show(run: dict[str, Any], settings: Settings) -> None:
    """Figures of one run of ours."""
    if "losses" in run:
        steady = speeds(run)[settings.warmup :]
        print(f"  {statistics.median(steady):,.0f} tokens per second, last loss", end=" ")
        print(f"{run['losses'][-1]:.3f}")
    else:
        print(f"  {run['seconds']:.1f} seconds")
    print(f"  peak memory {run['peak_memory'] / 1e9:.2f} GB")
    print(run.get("profile", ""))


def about(settings: Settings, threads: int, began: float) -> dict[str, Any]:
    """Where, when and how figures were measured."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": f"python benchmarks/train.py {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seconds": round(time.time() - began),
        "commit": commit.stdout.strip(),
        "threads": threads,
        "settings": vars(settings),
        "versions": versions(),
    }


def keep(name: str, outcome: Outcome, measured: dict[str, Any], results: Path, runs: Path) -> None:
    """Put a scenario's figures into the results, in the place of those it had before."""
    found = json.loads(results.read_text("utf-8")) if results.exists() else {"measured": {}}
    peers = [run["versions"] for run in outcome.runs if "metier" not in run["versions"]]
    found["measured"][name] = measured | {
        "peer_versions": peers[0] if peers else {},
        "gates": outcome.gates,
        "variants": outcome.variants,
        "rows": outcome.rows,
    }
    done = [part for part in SCENARIOS if part in found["measured"]]
    rows = [row for part in done for row in found["measured"][part]["rows"]]
    text = json.dumps({"rows": rows, "measured": found["measured"]}, indent=1)
    write_atomic(results, text + "\n")
    old = runs.read_text("utf-8").splitlines() if runs.exists() else []
    lines = [line for line in old if json.loads(line)["scenario"] != name]
    lines += [json.dumps({"scenario": name} | run) for run in outcome.runs]
    write_atomic(runs, "".join(f"{line}\n" for line in lines))


def table() -> str:
    """The kept rows as a Markdown table."""
    if not RESULTS.exists():
        return "Not measured yet: `make bench-train`.\n"
    return figures.table(json.loads(RESULTS.read_text("utf-8"))["rows"])


def write_table() -> None:
    """Put the table into the page of results."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
