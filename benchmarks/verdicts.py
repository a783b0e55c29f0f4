"""Run metier on real tasks from the file to the verdict, with the commands that a user would type.

    python benchmarks/verdicts.py [NAME...] [--data DIRECTORY]

Prints every command, keeps its files under runs/verdicts/NAME (a run that was interrupted goes on
from there), copies the verdict to benchmarks/results/verdicts/NAME.json and writes the table of all
verdicts into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from metier.evaluation.schema import ArmResult, Verdict

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "verdicts"
PAGE = HERE.parent / "docs" / "results.md"
WORK = Path("runs/verdicts")
BEGIN, END = "<!-- verdicts -->\n", "<!-- /verdicts -->"

INIT = "metier init {source} --out {work}/task.yaml --force"
RUN = "metier run {work}/task.yaml --out {work}/run --budget 240"
PREPARE = "python examples/prepare.py {name} {data}/{name} {work}"

TASKS = {
    "stdlib": ("metier demo stdlib --out {work}/run",),
    "extract": ("metier demo extract --out {work}/run",),
    "banking77": (
        INIT.format(source="{data}/banking77/train.csv", work="{work}"),
        f"{RUN} --set 'arms=[prompt, classical, full/head]' --set training.epochs=8",
    ),
    "snips": (PREPARE, INIT.format(source="{work}/train.jsonl", work="{work}"), RUN),
    "sroie": (INIT.format(source="{data}/sroie/receipts.jsonl", work="{work}"), RUN),
    "bfcl": (PREPARE, INIT.format(source="{work}/bfcl.jsonl", work="{work}"), RUN),
    "e2e_nlg": (INIT.format(source="{data}/e2e_nlg/devset.csv", work="{work}"), RUN),
    "lamini_docs": (
        "python examples/prepare.py lamini_docs {data}/lamini_docs/lamini_docs.jsonl.gz {work}",
        INIT.format(source="{work}/lamini_docs.jsonl", work="{work}"),
        RUN,
    ),
}
"""The commands of each task, to be run from the root of the repository."""


def main() -> None:
    """Run the tasks named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}")
    for name in arguments.names or TASKS:
        run(name, arguments.data)
        write_table()


def run(name: str, data: Path) -> None:
    """Run the commands of a task and keep its verdict."""
    work = WORK / name
    for template in TASKS[name]:
        command = template.format(name=name, data=data, work=work)
        print(f"$ {command}", flush=True)
        program, *rest = shlex.split(command)
        script = (
            [sys.executable] if program == "python" else [Path(sys.executable).parent / program]
        )
        subprocess.run([*script, *rest], check=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "run" / "verdict.json", RESULTS / f"{name}.json")


def table() -> str:
    """All verdicts kept, as a Markdown table."""
    lines = [
        "| task | rows: training / test | simpler arms | tuned arms | verdict | minutes |",
        "|---|---|---|---|---|---|",
    ]
    kept = [name for name in TASKS if (RESULTS / f"{name}.json").exists()]
    return "\n".join([*lines, *(row(name, read(name)) for name in kept)]) + "\n"


def read(name: str) -> Verdict:
    """The verdict kept of a task."""
    path = RESULTS / f"{name}.json"
    return Verdict.parse(json.loads(path.read_text("utf-8")), str(path))


def row(name: str, verdict: Verdict) -> str:
    """One line of the table: scores in %, the chosen arm in bold."""
    simpler = ", ".join(shown(arm, verdict) for arm in verdict.arms if not arm.tuned)
    tuned = ", ".join(shown(arm, verdict) for arm in verdict.arms if arm.tuned)
    size = f"{verdict.data.train:,} / {verdict.data.test:,}"
    decided = {"ship": "ship ", "use-simpler": "use ", "none": "nothing yet"}[verdict.decision]
    minutes = f"{verdict.seconds / 60:.0f}"
    return f"| `{name}` | {size} | {simpler} | {tuned} | {decided}{verdict.arm} | {minutes} |"


def shown(arm: ArmResult, verdict: Verdict) -> str:
    """An arm with its score; what the verdict chose is bold."""
    text = f"{arm.arm} {100 * arm.score.mean:.1f}"
    return f"**{text}**" if arm.arm == verdict.arm else text


def write_table() -> None:
    """Put the table into the page of results."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
