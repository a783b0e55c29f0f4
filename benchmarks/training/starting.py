"""Time from the command to the first optimiser step, when it is given a second time."""

from __future__ import annotations

from metier.task import Lora
from training import bench
from training.bench import OURS, Bench, Outcome, Run
from training.figures import Goal

_RATE = 1e-4


class StartUp:
    """Both sides have trained on the data before, with another learning rate."""

    def __init__(self, where: Bench) -> None:
        self._bench, self._given = where, 0
        self._path = where.material("task", where.settings.rows)

    def ours(self, profile: bool = False) -> Run:
        """Run our side once."""
        return self._start(ours=True)

    def _start(self, *, ours: bool) -> Run:
        self._given += 1
        processes = self._bench.processes
        spec = {"kind": "start-up", "learning_rate": _RATE * (1 + self._given / 100)}
        if ours:
            run = processes.work / f"start-up-{self._bench.settings.rows}"
            task = {"task": str(self._path / "task.yaml"), "run": str(run)}
            found = processes.ours(spec | task)
        else:
            base, pairs = str(self._path.parent / "base"), str(self._path / "pairs.jsonl")
            lora = {"method": "lora", "lora": Lora().model_dump()}
            found = processes.peer(spec | {"base": base, "pairs": pairs} | lora)
        return found | {"seconds": found["first_step"] - found["started"]}

    def compare(self) -> Outcome:
        """Measure both sides and judge; the first time of each does not count."""
        sides = {OURS: self.ours, "TRL": lambda: self._start(ours=False)}
        first = [run() | {"side": name, "round": -1} for name, run in sides.items()]
        found = self._bench.rounds(sides)
        outcome = Outcome(runs=[*first, *(run for runs in found.values() for run in runs)])
        pairs = [
            ([1 / ours["seconds"]], [1 / theirs["seconds"]])
            for ours, theirs in zip(found[OURS], found["TRL"], strict=False)
        ]
        name = (
            f"from command to first step, {self._bench.settings.rows:,} rows, second time, "
            f"{self._bench.processes.threads} cores"
        )
        outcome.gates["TRL"] = [] if pairs else ["the peer gave no result"]
        row = bench.row(name, "TRL", "speed", Goal(3), pairs, outcome.gates["TRL"])
        outcome.rows.append(row)
        return outcome
