"""Kill trainings and look whether they end as if nobody had.

    python benchmarks/soak.py [--kills 200] [SCENARIO...]

Each scenario trains a tiny Llama by the same road as the commands do. A process that trains is
killed with SIGKILL at random moments, about every second time while it writes a checkpoint, and
started again until it is done. Then its loss log and its weights must be, byte for byte, those of a
run that nobody disturbed. A kill counts as inside a save if it left a half-written checkpoint.

Sweeps leave nothing to chance: they trace one save (or one publication of a result) with ptrace
and kill it after every system call that changed a file, one after the other. Controls take one
safeguard out and must be found to differ. Writes benchmarks/results/soak.json, and what is printed
into docs/reliability.md.

Processes are forked from this one, which has loaded the libraries but computed nothing: loading
takes seconds, and a kill should not cost that much.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from soaking.processes import kill_at_change, may_trace, start, stop_at, wait, wait_until
from soaking.trainings import SCENARIOS, SWEEPS, Scenario, half_written, prepare, result

from metier.runs import versions, write_atomic

RESULTS = Path(__file__).parent / "results" / "soak.json"
PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- soak -->\n", "<!-- /soak -->"
LEAST_INSIDE = 0.3
"""Share of the random kills that must fall inside a save."""
_TELL_SECONDS = 5.0
_KILLS_A_RUN = 5
"""At most: then a run is left in peace, and compared."""
_SAVE_SECONDS = 0.005
"""Kills are spread over so much of a save."""


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
        if wait(start(partial(self._train, place / "expected"), self._told)):
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
            wait_until(process, lambda: half_written(out, process))
            time.sleep(draw.uniform(0, _SAVE_SECONDS))
        os.kill(process, signal.SIGKILL)
        if (status := wait(process)) != -signal.SIGKILL:
            tally.differing = self._failure() if status else ""
            # What is compiled is kept: the next one may be quicker.
            self._seconds = min(self._seconds, time.monotonic() - began)
            return False
        tally.kills += 1
        tally.inside += half_written(out, process)
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


@dataclass
class Teller:
    """Says every few seconds how far a scenario is."""

    name: str
    kills: int = 0
    """How many there will be; 0: not known."""
    began: float = field(default_factory=time.monotonic)
    told: float = 0.0

    def __call__(self, tally: Tally) -> None:
        """Tell of what the kills came to so far."""
        now = time.monotonic()
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
        "differing": tally.differing.replace(f"{place}/", ""),
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
            print(line(row), flush=True)
            yield row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    text = f"{row['scenario']:42} {row['kills']:3} kills, {row['inside_save']:3} inside a save: "
    text += "identical" if row["identical"] else "differs"
    return text if row["holds"] else f"{text}, WHICH IT MUST NOT ({row['differing']})"


def last_line(outcome: dict[str, Any]) -> str:
    """What all of it came to."""
    share = f"{outcome['inside_save']:.0%} of them inside a save"
    minutes = outcome["seconds"] / 60
    return f"{outcome['kills']} kills at random, {share}; {minutes:.0f} minutes"


def block(outcome: dict[str, Any]) -> str:
    """What the program printed, for the page."""
    lines = [f"$ {outcome['command']}", *map(line, outcome["rows"]), last_line(outcome)]
    return "\n".join(["```", *lines, "```", ""])


def write_page(outcome: dict[str, Any]) -> None:
    """Put it into the page on reliability."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + block(outcome) + END + rest.split(END)[1], "utf-8")


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
    chosen.names = chosen.names or every
    if set(chosen.names) & set(SWEEPS) and not may_trace():
        print("sweeps are left out: processes may not be traced here (ptrace)")
        chosen.names = [name for name in chosen.names if name not in SWEEPS]
    began = time.monotonic()
    rows = list(measure(chosen.names, chosen.kills, chosen.seed))
    random_rows = [r for r in rows if r["scenario"] in SCENARIOS and r["goal"] == "identical"]
    kills = sum(row["kills"] for row in random_rows)
    share = sum(row["inside_save"] for row in random_rows) / kills if kills else 1.0
    some = [shlex.quote(name) for name in chosen.names] if chosen.names != every else []
    outcome = {
        "command": " ".join(["python benchmarks/soak.py", *some, f"--kills {chosen.kills}"]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.monotonic() - began),
        "versions": versions(),
        "kills": kills,
        "inside_save": share,
        "rows": rows,
    }
    print(last_line(outcome))
    write_atomic(chosen.out, json.dumps(outcome, indent=1) + "\n")
    if chosen.out == RESULTS:
        write_page(outcome)
    if share < LEAST_INSIDE or not all(row["holds"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
