"""A finished arm put to use: load it, answer a file, serve it."""

from __future__ import annotations

import json
from collections.abc import Generator as PyGenerator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier import runs
from metier.config import Config
from metier.data.sources import read_examples
from metier.errors import ConfigError, RunError
from metier.model.generate import Engine
from metier.progress import Progress
from metier.recipes import making, workbench
from metier.recipes.experiment import read_verdict
from metier.records import Chat, Completion, Generator
from metier.task import Arm, Task

_CHUNK = 64


@dataclass(frozen=True)
class Specialist:
    """An arm of a finished run, answering as it did in the evaluation.

    Attributes:
        name: what clients call it: the task, and the arm.
        task: what it was made for.
        generator: answers chats, greedily.
        engine: the language model behind it, if it has one of its own.

    """

    name: str
    task: Task
    generator: Generator
    engine: Engine | None

    def stream(
        self,
        chat: Chat,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> PyGenerator[str, None, Completion]:
        """Yield an answer piece by piece, and return the whole.

        A greedy answer is the one that was evaluated; an arm without a language model of its own
        has no other.
        """
        if self.engine is None or not isinstance(self.generator, making.WithinContext):
            completion = self.generator.generate([chat])[0]
            yield completion.text
            return completion
        return (yield from self.engine.stream(chat, max_new_tokens, temperature, top_p, seed, stop))


def load_specialist(run: Path, arm: str | None) -> Specialist:
    """Load an arm of a finished run; by default the one the verdict names.

    Raises:
        RunError: the run is not finished, or has no such arm.

    """
    verdict = read_verdict(run)
    wanted = arm or verdict.arm
    index = _read_index(run / "arms.json")
    if wanted not in index.arms:
        raise RunError(str(run), f"has no arm '{wanted}'", f"choose from {', '.join(index.arms)}")
    found = index.arms[wanted]
    directory, data = run / found.directory, run / index.data
    for path in (directory, data):
        runs.verify(path)
    bench = workbench.load(data)
    built = making.build(bench, found.arm, directory)
    return Specialist(f"{verdict.task}:{wanted}", bench.task, built.generator, built.engine)


class _Made(Config):
    """Where an arm lies in its run."""

    arm: Arm
    directory: str


class _Index(Config):
    """What `Experiment.publish` writes into arms.json."""

    data: str
    arms: dict[str, _Made]


def _read_index(path: Path) -> _Index:
    remedy = "run 'metier run' again: it writes this anew"
    try:
        return _Index.parse(json.loads(path.read_text("utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise RunError(str(path), f"cannot be read ({error})", remedy) from None
    except ConfigError as error:
        raise RunError(error.place, error.cause, remedy) from None


def predict(run: Path, file: Path, out: Path | None, arm: str | None, progress: Progress) -> Path:
    """Answer every input of a file; see `recipes.predict`."""
    target = out or file.with_name(f"{file.name.split('.')[0]}.answers.jsonl")
    if target.is_dir():
        raise RunError(str(target), "is a directory", "give the name of a file as --out")
    progress.stage("load the specialist")
    specialist = load_specialist(run, arm)
    task = specialist.task
    columns = task.data.columns.model_copy(update={"output": None})
    rows = read_examples(
        file.name, task.kind, file.parent, task.data.format, columns, answers=False
    )
    progress.stage("answer", len(rows))
    lines = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        answers = specialist.generator.generate([row.prompt for row in chunk])
        for row, answer in zip(chunk, answers, strict=True):
            line: dict[str, Any] = {"id": row.id, "output": answer.text}
            if answer.probability is not None:
                line["probability"] = round(answer.probability, 6)
            lines.append(json.dumps(line, ensure_ascii=False))
        progress.advance(len(chunk))
    runs.write_atomic(target, "".join(f"{line}\n" for line in lines))
    return target
