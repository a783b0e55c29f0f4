"""Every command of the README runs, on a small task in place of the reader's own."""

from __future__ import annotations

import csv
import http.client
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.conftest import rows

README = Path(__file__).resolve().parent.parent / "README.md"
METIER = Path(sys.executable).with_name("metier")
FEW_ARMS = ["--set", "arms=[classical,lora]"]
ONE_PASS = ["--set", "training.epochs=1", "--set", "training.seeds=[0]"]
QUICK = {"run": [*FEW_ARMS, *ONE_PASS], "plan": FEW_ARMS}


def commands() -> list[list[str]]:
    """The `metier ...` lines of the README's shell blocks, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("metier ")]


def metier(arguments: list[str], directory: Path, text: str = "") -> str:
    done = subprocess.run(
        [METIER, *arguments], cwd=directory, input=text, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory with tickets.csv and new.csv."""
    directory = tmp_path_factory.mktemp("desk")
    for name, columns in {"tickets.csv": ["text", "label"], "new.csv": ["text"]}.items():
        with (directory / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows())
    return directory


def test_the_readme_names_the_commands_in_order() -> None:
    names = [command[0] for command in commands()]
    assert names == ["init", "audit", "plan", "run", "predict", "chat", "serve"]


def test_every_command_runs_in_the_order_of_the_readme(desk: Path) -> None:
    for command in commands():
        name = command[0]
        if name == "serve":
            serve(command, desk)
        elif name == "chat":
            assert metier(command, desk, "Tom saw a big dog and was happy\n").strip()
        else:
            assert metier([*command, *QUICK.get(name, [])], desk).strip()
    answers = (desk / "new.csv.answers.jsonl").read_text().splitlines()
    assert len(answers) == len(list(rows()))
    assert (desk / "runs" / "tickets" / "report.html").is_file()


def serve(command: list[str], directory: Path) -> None:
    """Start the server on a free port, ask it whether it is well, and end it."""
    process = subprocess.Popen(
        [METIER, *command, "--port", "0"], cwd=directory, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            found = None
            while found is None:
                line = process.stdout.readline()
                assert line, "the server ended before it listened"
                found = re.search(r"127\.0\.0\.1:(\d+)", line)
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
        finally:
            process.terminate()
