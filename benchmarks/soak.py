"""Kill trainings and look whether they end as if nobody had.

    python benchmarks/soak.py [--kills 200] [SCENARIO...]

Each scenario trains a tiny Llama by the same road as the commands do. A process that trains is
killed with SIGKILL at random moments, every second time while it writes a checkpoint, and started
again until it is done. Then its loss log and its weights must be, byte for byte, those of a run
that nobody disturbed. A kill counts as inside a save if it left a half-written checkpoint behind.

Sweeps leave nothing to chance: they trace one save (or one publication of a result) with ptrace
and kill it after every system call that changed a file, one after the other. Controls take one
safeguard out and must be found to differ. Writes benchmarks/results/soak.json.

Processes are forked from this one, which has loaded the libraries but computed nothing: loading
takes seconds, and a kill should not cost that much.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # loaded before the fork
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from metier.model import checkpoint
from metier.model.load import load_base
from metier.progress import Silent
from metier.recipes import tuning
from metier.recipes.experiment import Experiment
from metier.recipes.workbench import open_workbench, read_task
from metier.runs import Run, versions, write_atomic
from metier.task import Arm
from metier.text import bpe
from metier.training import pretrain, rehearsal, sft
from metier.training.loop import Loop, Plan, cosine

WORDS = ("the", "a", "big", "old", "dog", "cat", "bird", "tree", "saw", "liked", "and", "it", "was")
RESULTS = Path(__file__).parent / "results" / "soak.json"
LABELS = ("animal", "place", "thing")
SHAPE = {
    "vocabulary": 300, "hidden": 64, "layers": 2, "heads": 2, "intermediate": 96, "context": 128,
}  # fmt: skip
RECIPE = {
    "name": "tiny",
    "sources": [{"name": "corpus", "files": ["corpus.jsonl"], "held_out": 0.1}],
    "shape": SHAPE,
    "tokens": 30 * 768,
    "step_lengths": [16, 64, 128],
    "micro_tokens": 256,
    "evaluate_every": 10,
    "evaluation_windows": 4,
    "warmup_steps": 3,
    "checkpoint_seconds": 1e-9,
}
TASK = {
    "name": "tiny",
    "kind": "classification",
    "data": {"file": "rows.jsonl"},
    "base": "base",
    "template": "plain",
    "split": {"near_duplicate": 1.0},
    "max_new_tokens": 8,
    "training": {"epochs": 4, "max_length": 128, "lora": {"rank": 4, "dropout": 0.2}},
}
LEAST_INSIDE = 0.3
"""Share of the random kills that must fall inside a save."""
_TELL_SECONDS = 5.0
_KILLS_A_RUN = 5
"""At most: then a run is left in peace, and compared."""
_SAVE_SECONDS = 0.005
"""Kills are spread over so much of a save."""


# --- what is trained


def prepare(inputs: Path) -> None:
    """Write a corpus with its recipe, a task with its rows, and a base of random weights."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(120)]
    _write_lines(inputs / "corpus.jsonl", ({"text": text} for text in texts))
    rows = [(" ".join(draw.choices(WORDS, k=9)), LABELS[number % 3]) for number in range(110)]
    _write_lines(inputs / "rows.jsonl", ({"text": text, "label": label} for text, label in rows))
    (inputs / "pretrain.yaml").write_text(yaml.safe_dump(RECIPE))
    (inputs / "task.yaml").write_text(yaml.safe_dump(TASK))
    wait(start(lambda: _write_base(inputs / "base", texts), inputs / "told.txt"))
    load_base(str(inputs / "base"))  # and with it what every process needs that is forked later


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_base(directory: Path, texts: list[str]) -> None:
    """A process of its own does it: the tokenizer's trainer starts threads."""
    directory.mkdir()
    bpe.train_bpe(iter(texts), SHAPE["vocabulary"], directory)
    config = LlamaConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["intermediate"],
        max_position_embeddings=SHAPE["context"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def train_base(inputs: Path, out: Path) -> None:
    """Pre-train from random weights."""
    config = pretrain.PretrainConfig.load(inputs / "pretrain.yaml")
    pretrain.pretrain(config, inputs, out)


def train_base_compiled(inputs: Path, out: Path) -> None:
    """Pre-train as for a corpus that is worth compiling for."""
    pretrain._WORTH_COMPILING = 0
    train_base(inputs, out)


def tune(arm: str) -> Callable[[Path, Path], None]:
    """Tune with rehearsal, several micro-batches a step and a checkpoint after each."""

    def train(inputs: Path, out: Path) -> None:
        sft._CHECKPOINT_SECONDS, sft.MICRO_TOKENS = 0.0, 128
        rehearsal.TEXTS, rehearsal._SIDE_BY_SIDE, rehearsal.LENGTH = 32, 32, 16
        bench = open_workbench(read_task(inputs / "task.yaml"), inputs)
        with Run(out) as run:
            Experiment(bench, run, Silent()).make(Arm.of(arm), 0)

    return train


@dataclass(frozen=True)
class _Noise:
    """Data of the network that stands alone, a function of the step."""

    seed: int = 0
    weight: float = 8.0
    tokens: int = 8

    def step(self, index: int) -> list[_Noise]:
        return [_Noise(2 * index), _Noise(2 * index + 1)]


def train_network(_: Path, out: Path) -> None:
    """A small network with dropout in the loop alone: for sweeps, as it takes milliseconds."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1)]
    model = torch.nn.Sequential(*layers)

    def loss(part: _Noise) -> torch.Tensor:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(part.seed))
        found: torch.Tensor = ((model(x) - x.sum(1, keepdim=True)) ** 2).sum()
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plan = Plan(6, cosine(6, 0.1), checkpoint_seconds=0.0)
    with Run(out) as run:
        Loop(model, loss, _Noise(), [optimizer], plan, directory=run.path / "training-alone").run()
        run.stage("model", {}, lambda path: _save(model, path))


def _save(model: torch.nn.Module, directory: Path) -> None:
    """A result of several files, one of them in a directory of its own."""
    checkpoint.save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "more").mkdir()
    (directory / "more" / "about.json").write_text("{}")


def forget_the_optimizer() -> None:
    """Control: its moments are not restored."""
    checkpoint._unflatten = lambda _, numbers: [{} for _ in numbers]


def forget_the_seed() -> None:
    """Control: random numbers go on from the start of the process, not from the step."""
    torch.manual_seed = lambda _: torch.default_generator


def save_in_place() -> None:
    """Control: checkpoints have their names while they are written, and nobody looks at hashes."""

    def save(directory: Path, snapshot: checkpoint.Checkpoint, step: int) -> Path:
        path = directory / f"step-{step:09d}"
        path.mkdir(parents=True, exist_ok=True)
        tensors, numbers = checkpoint._flatten(snapshot.optimizers)
        state = {"state": dict(snapshot.state), "optimizers": numbers}
        (path / "state.json").write_text(json.dumps(state))
        checkpoint._write(path / "optimizer.safetensors", tensors)
        checkpoint._write(path / "best.safetensors", snapshot.best)
        checkpoint._write(path / "model.safetensors", snapshot.tensors)
        return path

    checkpoint.save = save
    checkpoint.runs.verify = lambda _: {}


@dataclass(frozen=True)
class Scenario:
    """What is trained, and the safeguard that a control takes out."""

    train: Callable[[Path, Path], None]
    broken: Callable[[], None] | None = None
    share: float = 1.0
    """Of the kills at random; where a run takes long, less than others."""


SCENARIOS = {
    "full": Scenario(tune("full")),
    "lora": Scenario(tune("lora")),
    "pretrain": Scenario(train_base),
    "pretrain, compiled": Scenario(train_base_compiled, share=0.3),
    "control: optimizer forgotten": Scenario(tune("full"), forget_the_optimizer),
    "control: seed forgotten": Scenario(tune("lora"), forget_the_seed),
}
SWEEPS = {
    "every change of a save, network": (Scenario(train_network), (Loop, "_save", 3)),
    "every change of a publication, network": (Scenario(train_network), (Run, "stage", 1)),
    "every change of a save, lora": (SCENARIOS["lora"], (Loop, "_save", 3)),
    "every change of a publication, lora": (SCENARIOS["lora"], (tuning, "_write", 1)),
    "every change of a save, pretrain": (SCENARIOS["pretrain"], (Loop, "_save", 3)),
    "control: every change of a save, in place": (
        Scenario(train_network, save_in_place),
        (Loop, "_save", 3),
    ),
}
"""Each traces the n-th call of a function, up to the next call of it or to the end."""


# --- processes


def start(work: Callable[[], None], told: Path) -> int:
    """Fork a process that does some work; what it tells goes to a file."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with told.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Exit status of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until(process: int, reached: Callable[[], bool]) -> bool:
    """Wait for a moment. False: the process ended before it."""
    while not reached():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0003)
    return True


def half_written(out: Path) -> bool:
    """Whether a checkpoint or its log is being written, or was when its process was killed."""
    return any(
        name.startswith(".partial-")
        and (directory.endswith("/checkpoints") or name.endswith("-log.jsonl"))
        for directory, names, files in os.walk(out)
        for name in (*names, *files)
    )


def result(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: every step's loss, the weights, the stages there are.

    Empty where there is no result.
    """
    kept = [*out.glob("*/log.jsonl"), *out.glob("arm-*/*.safetensors")]
    kept += out.glob("model-*/*.safetensors")
    found = {str(path.relative_to(out)): path.read_bytes() for path in kept}
    names = sorted(str(path.relative_to(out)) for path in out.glob("**/.partial-*"))
    names += sorted(path.name for path in out.iterdir())
    return found | {"names": "\n".join(names).encode()}


# --- kills at random


@dataclass
class Tally:
    """What the kills of a scenario came to."""

    kills: int = 0
    inside: int = 0
    runs: int = 0
    differing: str = ""
    """What was not as in the run that nobody disturbed; empty: nothing."""


class Soak:
    """One scenario, the result of a run of it that nobody disturbed, and a place to disturb it."""

    def __init__(self, scenario: Scenario, inputs: Path, place: Path) -> None:
        self._scenario, self._inputs, self._place = scenario, inputs, place
        place.mkdir()
        self._told = place / "told.txt"
        began = time.monotonic()
        if wait(start(partial(scenario.train, inputs, place / "expected"), self._told)):
            raise SystemExit(self._told.read_text())
        self._seconds = time.monotonic() - began
        self._expected = result(place / "expected")

    def kill(self, kills: int, draw: random.Random, tell: Callable[[Tally], None]) -> Tally:
        """Disturb runs until there were so many kills, or a result differs."""
        tally = Tally()
        while tally.kills < kills and not tally.differing:
            out, most = self._fresh(), min(kills, tally.kills + _KILLS_A_RUN)
            while tally.kills < most and self._killed(out, tally, draw):
                tell(tally)
            tally.differing = tally.differing or self._finish(out)
            tally.runs += 1
        return tally

    def sweep(self, traced: tuple[Any, str, int], tell: Callable[[Tally], None]) -> Tally:
        """Kill at every change of a file in one call of a function."""
        tally = Tally()
        while not tally.differing:
            out = self._fresh()
            process = start(partial(self._train_traced, out, traced), self._told)
            if not kill_at_change(process, out, tally.kills + 1):
                break
            tally.kills, tally.inside = tally.kills + 1, tally.inside + 1
            tally.differing = self._finish(out)
            tally.runs += 1
            tell(tally)
        return tally

    def _fresh(self) -> Path:
        out = self._place / "out"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def _train(self, out: Path) -> None:
        if self._scenario.broken:
            self._scenario.broken()
        self._scenario.train(self._inputs, out)

    def _train_traced(self, out: Path, traced: tuple[Any, str, int]) -> None:
        stop_at(*traced)
        self._train(out)

    def _killed(self, out: Path, tally: Tally, draw: random.Random) -> bool:
        """Train and kill. False: it ended before."""
        process = start(lambda: self._train(out), self._told)
        began = time.monotonic()
        at = began + draw.uniform(0, self._seconds / 2)
        reached = wait_until(process, lambda: time.monotonic() >= at)
        if reached and tally.inside <= tally.kills / 2:
            wait_until(process, lambda: half_written(out))
            time.sleep(draw.uniform(0, _SAVE_SECONDS))
        os.kill(process, signal.SIGKILL)
        if (status := wait(process)) != -signal.SIGKILL:
            tally.differing = self._failure() if status else ""
            # What is compiled is kept: the next one may be quicker.
            self._seconds = min(self._seconds, time.monotonic() - began)
            return False
        tally.kills += 1
        tally.inside += half_written(out)
        return True

    def _finish(self, out: Path) -> str:
        """Let a run end in peace. Returns what differs from the undisturbed one."""
        if wait(start(lambda: self._train(out), self._told)):
            return self._failure()
        found = result(out)
        names = found.keys() | self._expected.keys()
        return next((n for n in sorted(names) if found.get(n) != self._expected.get(n)), "")

    def _failure(self) -> str:
        """What the last process told at its end."""
        return self._told.read_text().strip().splitlines()[-1]


# --- kills at a system call


_TRACE_ME, _SYSCALL, _SET_OPTIONS = 0, 24, 0x4200
_MARKED, _STOPPED_BY_CALL = 1, signal.SIGTRAP | 0x80


def _ptrace(request: int, process: int = 0, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, process, None, data):
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")


def may_trace() -> bool:
    """Whether a process may be traced on this machine."""
    with tempfile.NamedTemporaryFile() as told:
        return wait(start(partial(_ptrace, _TRACE_ME), Path(told.name))) == 0


def stop_at(owner: Any, name: str, call: int) -> None:
    """Let this process stop, traced by its parent, at a call of a function and at the next one."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*given: Any, **named: Any) -> Any:
        number = next(calls)
        if number == call:
            _ptrace(_TRACE_ME)
        if number in (call, call + 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*given, **named)

    setattr(owner, name, wrapper)


def kill_at_change(process: int, place: Path, change: int) -> bool:
    """Kill a process of `stop_at` after the n-th system call that changed a file.

    Between two changes a kill at any moment leaves the same files. False: there are fewer changes.
    """
    os.waitpid(process, 0)
    _ptrace(_SET_OPTIONS, process, _MARKED)
    before, changed = _look(place), False
    while not changed:
        _ptrace(_SYSCALL, process)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSTOPPED(status):
            return False
        if os.WSTOPSIG(status) != _STOPPED_BY_CALL:
            break
        if (now := _look(place)) != before:
            before, change = now, change - 1
            changed = change == 0
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return changed


def _look(place: Path) -> list[tuple[str, int, int, int]]:
    """Everything below a directory that a system call may change."""
    found = []
    for directory, names, files in os.walk(place):
        for name in (*names, *files):
            about = os.lstat(os.path.join(directory, name))
            path = os.path.join(directory, name)
            found.append((path, about.st_ino, about.st_size, about.st_mtime_ns))
    return found


# --- all of it


@dataclass
class Teller:
    """Says every few seconds how far a scenario is."""

    name: str
    kills: int = 0
    """How many there will be; 0: not known."""
    began: float = 0.0
    told: float = 0.0

    def __call__(self, tally: Tally) -> None:
        """Tell of what the kills came to so far."""
        now = time.monotonic()
        self.began = self.began or now
        if now - self.told < _TELL_SECONDS:
            return
        self.told = now
        left = (now - self.began) / tally.kills * (self.kills - tally.kills)
        share = f" of {self.kills}, about {left:.0f} s left" if self.kills else ""
        print(f"  {self.name}: {tally.kills}{share}", flush=True)


def disturb(name: str, kills: int, seed: int, inputs: Path, place: Path) -> dict[str, Any]:
    """Row of a scenario, killed at random, or of a sweep."""
    began = time.monotonic()
    if name in SWEEPS:
        scenario, traced = SWEEPS[name]
        soak = Soak(scenario, inputs, place)
        tally = soak.sweep(traced, Teller(name))
    else:
        soak = Soak(SCENARIOS[name], inputs, place)
        tally = soak.kill(kills, random.Random(f"{seed} {name}"), Teller(name, kills))
    return {
        "scenario": name,
        "against": "the same run undisturbed",
        "figure": "loss log and weights identical, byte for byte",
        "identical": not tally.differing,
        "differing": tally.differing,
        "kills": tally.kills,
        "inside_save": tally.inside,
        "runs": tally.runs,
        "seconds": round(time.monotonic() - began),
        "goal": "differs" if _is_control(name) else "identical",
        "holds": bool(tally.kills) and bool(tally.differing) == _is_control(name),
    }


def _is_control(name: str) -> bool:
    return name.startswith("control")


def measure(names: Sequence[str], kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of scenarios; `kills` are shared out among those killed at random."""
    shares = {n: SCENARIOS[n].share for n in names if n in SCENARIOS and not _is_control(n)}
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        place = Path(directory)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place / "compiled")
        prepare(place)
        for number, name in enumerate(names):
            share = shares[name] / sum(shares.values()) if name in shares else 1
            row = disturb(name, math.ceil(kills * share), seed, place, place / str(number))
            print(
                f"{name:45} {row['kills']:4} kills, {row['inside_save']:4} inside a save, "
                f"{'identical' if row['identical'] else 'differs: ' + row['differing']}"
                f"{'' if row['holds'] else '  DOES NOT HOLD'}",
                flush=True,
            )
            yield row


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, print, write; exit code 1 where anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = [*SCENARIOS, *SWEEPS]
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="; ".join(every))
    parser.add_argument("--kills", type=int, default=200, help="at random, over all scenarios")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - set(every):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    chosen.names = chosen.names or every
    if set(chosen.names) & set(SWEEPS) and not may_trace():
        print("sweeps are left out: processes may not be traced here (ptrace)")
        chosen.names = [name for name in chosen.names if name not in SWEEPS]
    began = time.monotonic()
    rows = list(measure(chosen.names, chosen.kills, chosen.seed))
    random_rows = [r for r in rows if r["scenario"] in SCENARIOS and r["goal"] == "identical"]
    kills = sum(row["kills"] for row in random_rows)
    share = sum(row["inside_save"] for row in random_rows) / kills if kills else 1.0
    print(f"{kills} kills at random, {share:.0%} of them inside a save")
    outcome = {
        "command": " ".join(["python benchmarks/soak.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
        "kills": kills,
        "inside_save": share,
        "rows": rows,
    }
    write_atomic(chosen.out, json.dumps(outcome, indent=1) + "\n")
    if share < LEAST_INSIDE or not all(row["holds"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
