"""What may happen to a training while it runs: no room, a second process, data that changes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from metier import recipes
from metier.app.cli import app
from metier.model import checkpoint
from metier.progress import Silent
from metier.training import sft
from tests.recipes.conftest import write_task
from tests.training.test_pretrain import recipe

COMMANDS = {"train": ["train", "task.yaml", "lora"], "pretrain": ["pretrain", "tiny.yaml"]}
ROOM = 20_000
"""Bytes that are left: less than one file of a checkpoint."""


@pytest.fixture
def place(tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a task and a recipe, and the current one; a checkpoint after each step."""
    prepare(tmp_path, stories260k)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "_CHECKPOINT_SECONDS", 0.0)
    return tmp_path


def prepare(directory: Path, base: Path) -> None:
    training = {"epochs": 2, "seeds": [0], "max_length": 128, "batch_size": 16, "rehearsal": 0}
    write_task(directory, base, arms=["classical", "lora"], training=training)
    recipe(directory, checkpoint_seconds=1e-9, tokens=12 * 768)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, stories260k: Path
) -> dict[str, list[bytes]]:
    """Weights and logs of the commands."""
    directory, found = tmp_path_factory.mktemp("undisturbed"), {}
    prepare(directory, stories260k)
    for name, (command, file, *rest) in COMMANDS.items():
        done = call(command, directory / file, *rest, "--out", directory / name)
        assert done.exit_code == 0, done.output
        found[name] = made(directory / name)
    return found


def made(run: Path) -> list[bytes]:
    """Weights and log of what was trained in a directory."""
    (weights,) = [*run.glob("arm-lora-*/*.safetensors"), *run.glob("model-*/*.safetensors")]
    (log,) = [*run.glob("arm-lora-*/log.jsonl"), *run.glob("training-*/log.jsonl")]
    return [weights.read_bytes(), log.read_bytes()]


# --- no room


@contextmanager
def limited(_: Path) -> Iterator[Callable[[], None]]:
    """Gives what makes files of this process end after some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(run: Path) -> Iterator[Callable[[], None]]:
    """Gives what fills the file system of a directory but for some bytes."""

    def fill() -> None:
        about = os.statvfs(run)
        (run / "filler").write_bytes(b"\0" * (about.f_bavail * about.f_bsize - ROOM))

    yield fill
    (run / "filler").unlink()


@pytest.fixture
def tmpfs(place: Path) -> Iterator[None]:
    """A file system of 16 MB as the run directory."""
    run = place / "run"
    run.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(run)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield
    # Lazily: weights read from there may be mapped until their last tensor is gone.
    subprocess.run(["umount", "--lazy", str(run)], check=True)


def end_in_full(
    arguments: list[str], disk: Any, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the room end at the third save; what was saved before must be whole."""
    run, real, calls = Path("run"), checkpoint.save, iter(range(1, 100))

    with disk(run) as end, monkeypatch.context() as patch:

        def save(*given: Any) -> Path:
            if next(calls) == 3:
                end()
            return real(*given)

        patch.setattr(checkpoint, "save", save)
        done = call(*arguments, "--out", run, "--json")
        assert done.exit_code == 2, done.output
        error = json.loads(done.stdout)["error"]
        assert error["place"].endswith("checkpoints/step-000000003"), error
        assert error["cause"] == cause
        assert error["remedy"].startswith("make room there, then give the same command again")
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.output
        assert not list(run.rglob(".partial-*"))
        (checkpoints,) = run.rglob("checkpoints")
        found, problems = checkpoint.load_newest(checkpoints)
        assert found
        assert (found.state["step"], problems) == (2, ())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_training_without_room_goes_on_when_there_is_some(
    place: Path,
    undisturbed: dict[str, list[bytes]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end_in_full(COMMANDS[name], limited, "File too large", monkeypatch)
    done = call(*COMMANDS[name], "--out", "run")
    assert done.exit_code == 0, done.output
    assert "going on after step 2\n" in done.stderr
    assert made(place / "run") == undisturbed[name]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("tmpfs")
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(
    place: Path,
    undisturbed: dict[str, list[bytes]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end_in_full(COMMANDS[name], small_disk, "No space left on device", monkeypatch)
    done = call(*COMMANDS[name], "--out", "run")
    assert done.exit_code == 0, done.output
    assert "going on after step 2\n" in done.stderr
    assert made(place / "run") == undisturbed[name]


# --- two processes


HOLD = """
import json, os, signal, sys
import peft, torch, transformers  # once for all of them
from metier.app import cli, terminal

def stage(self, name, total=None):
    global stopped
    real(self, name, total)
    if not stopped and name.startswith(("train", "fit", "answer")):
        stopped = True
        os.kill(os.getpid(), signal.SIGSTOP)

stopped, real, terminal.TerminalProgress.stage = False, terminal.TerminalProgress.stage, stage
processes = []
for command in json.loads(sys.argv[1]):
    processes.append(os.fork())
    if not processes[-1]:
        os.dup2(os.open("told.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        sys.argv = ["metier", *command]
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code or 0)
print([os.WIFSTOPPED(os.waitpid(one, os.WUNTRACED)[1]) for one in processes], flush=True)
sys.stdin.readline()
for one in processes:
    os.kill(one, signal.SIGCONT)
print([os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in processes], flush=True)
"""


def test_a_second_process_is_refused_and_the_first_is_not_disturbed(
    place: Path, undisturbed: dict[str, list[bytes]]
) -> None:
    """The first ones are stopped in the midst of their work until the second ones were refused."""
    recipes.run(place / "task.yaml", place / "done", ["arms=[classical]"])
    commands = [
        [*COMMANDS["train"], "--out", "tuned"],
        [*COMMANDS["pretrain"], "--out", "base"],
        ["demo", "--set", "arms=[classical]", "--out", "demo"],
        ["predict", "done", "rows.jsonl", "--out", "answers.jsonl"],
    ]
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, json.dumps(commands)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with first:
        assert first.stdout
        assert first.stdout.readline() == "[True, True, True, True]\n"
        for command in commands:
            done = call(*command, "--json")
            assert done.exit_code == 2, done.output
            error = json.loads(done.stdout)["error"]
            assert error["place"].startswith(command[-1])
            assert error["cause"].endswith("by another process")
            assert error["remedy"].startswith("wait for it")
        told, errors = first.communicate("go on\n")
    assert told == "[0, 0, 0, 0]\n", errors
    assert made(place / "tuned") == undisturbed["train"]
    assert made(place / "base") == undisturbed["pretrain"]
    assert len((place / "answers.jsonl").read_text().splitlines()) == 90
    assert (place / "demo" / "verdict.json").is_file()


# --- data that changes


class AtStep(Silent):
    """Does something after a step of the training, and keeps what is said."""

    def __init__(self, step: int = 0, act: Callable[[], object] = list) -> None:
        self.step, self.act = step, act
        self.steps = 0
        self.lines: list[str] = []

    def advance(self, n: float = 1, **info: object) -> None:
        self.steps += "loss" in info
        if "loss" in info and self.steps == self.step:
            self.act()

    def say(self, text: str) -> None:
        self.lines.append(text)


def edit(rows: Path) -> None:
    rows.write_text(rows.read_text().replace("happy", "sad"))


def interrupt() -> None:
    raise KeyboardInterrupt


def test_rows_that_change_while_they_are_learned_change_nothing(
    place: Path, undisturbed: dict[str, list[bytes]]
) -> None:
    """They were read before; what was made of them is not taken for a result of the new ones."""
    change = AtStep(3, lambda: edit(place / "rows.jsonl"))
    path = recipes.train(place / "task.yaml", "lora", place / "run", progress=change)
    assert made(place / "run") == undisturbed["train"]
    assert recipes.train(place / "task.yaml", "lora", place / "run") != path


def test_rows_that_change_after_an_interruption_begin_anew(
    place: Path, undisturbed: dict[str, list[bytes]]
) -> None:
    task, run = place / "task.yaml", place / "run"
    with pytest.raises(KeyboardInterrupt):
        recipes.train(task, "lora", run, progress=AtStep(4, interrupt))
    (begun,) = (run / "unfinished").iterdir()
    shutil.copytree(run, place / "copy")
    edit(place / "rows.jsonl")
    again = AtStep()
    path = recipes.train(task, "lora", run, progress=again)
    told = f"{path.name} begins anew: {begun} is of other data, settings or code"
    assert [line for line in again.lines if line.startswith(told)]
    recipes.train(task, "lora", place / "new")
    assert made(run) == made(place / "new") != undisturbed["train"]

    (place / "rows.jsonl").write_text((place / "rows.jsonl").read_text().replace("sad", "happy"))
    put_back = AtStep()
    recipes.train(task, "lora", place / "copy", progress=put_back)
    assert made(place / "copy") == undisturbed["train"]
    assert "going on after step 3" in put_back.lines
    assert not any("begins anew" in line for line in put_back.lines)
