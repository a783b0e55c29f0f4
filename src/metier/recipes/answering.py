"""A finished arm put to use: load it, answer a file, serve it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Generator as PyGenerator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from metier import runs
from metier.errors import RequestError, RunError
from metier.evaluation import arms
from metier.model.generate import Engine
from metier.progress import Progress
from metier.recipes import making, workbench
from metier.recipes.finished import find
from metier.records import Chat, Completion, Example, Generator
from metier.task import Task

_CHUNK = 64
_UNSUPPORTED = "unsupported_parameter"
_TOO_LONG = "longer than the model's context allows"
_EMPTY = "the input is empty"


@dataclass(frozen=True)
class Specialist:
    """An arm of a finished run, answering as it did in the evaluation.

    Attributes:
        name: what clients call it: the task, and the arm.
        task: what it was made for.
        generator: answers chats, greedily.
        engine: the language model that writes its answers; None where they are chosen among
            labels or come from an endpoint.
        made: names of the directories it was built from, the arm's and the data's, each with
            the hash of what went into it.

    """

    name: str
    task: Task
    generator: Generator
    engine: Engine | None
    made: tuple[str, ...]

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

        With the defaults it is the answer that was evaluated. An arm whose answers no language
        model of its own writes has one answer only: seed, temperature and top_p change nothing.

        Args:
            chat: the request, ending with a user message.
            max_new_tokens: longest answer in tokens; the task's own limit holds as well.
            temperature: 0 is greedy.
            top_p: share of the probability mass that is sampled from.
            seed: makes a drawn answer repeatable.
            stop: texts that end the answer and are not part of it.

        Raises:
            RequestError: the request is longer than the context, or asks for what this arm
                cannot do.

        """
        if self.engine is None:
            completion = self._only_answer(chat, max_new_tokens, stop)
            yield completion.text
            return completion
        if isinstance(self.generator, arms.Composed):
            chat = self.generator.compose(chat)
        if not arms.room_in(self.engine)(chat):
            raise _too_long()
        longest = self.engine.max_new_tokens
        limit = min(max_new_tokens or longest, longest)
        return (yield from self.engine.stream(chat, limit, temperature, top_p, seed, stop))

    def _only_answer(self, chat: Chat, limit: int | None, stop: Sequence[str]) -> Completion:
        (completion,) = self.generator.generate([chat])
        if completion.refused:
            raise _too_long()
        if limit and completion.completion_tokens > limit:
            cause = f"is {limit}, and the answer has {completion.completion_tokens} tokens"
            raise RequestError(
                "max_tokens", cause, "this arm's answers cannot be cut: raise it", _UNSUPPORTED
            )
        return arms.ended(completion, stop)


def _too_long() -> RequestError:
    return RequestError(
        "messages",
        "are longer than the model's maximum context length, with room for an answer, allows",
        "shorten them",
        "context_length_exceeded",
    )


def load_specialist(run: Path, arm: str | None) -> Specialist:
    """Load an arm of a finished run; by default the one the verdict names.

    Raises:
        RunError: the run is not finished, has no such arm, or its verdict names none.

    """
    found = find(run, arm)
    bench = workbench.load(found.data)
    built = making.build(bench, found.arm, found.directory)
    engine = built.engine if found.arm.mode == "text" else None
    name = f"{found.verdict.task}:{found.arm.name}"
    made = (found.directory.name, found.data.name)
    return Specialist(name, bench.task, built.generator, engine, made)


def predict(run: Path, file: Path, out: Path | None, arm: str | None, progress: Progress) -> Path:
    """Answer every input of a file; see `recipes.predict`.

    A line holds `row`, the number of the input in the file (the first is 1, a header does not
    count), `id`, `output` and `finished`, which is false where the answer was cut at the length
    limit; `error` where there is none; `probability` where the arm has one, and where an
    answer may name several labels, `probabilities` of them all. Until all are there,
    they stand in a `.partial` file beside the target, from which the same call goes on.

    Raises:
        RunError: the target is there and holds no answers, or is being written.

    """
    target = out or file.with_name(f"{file.name}.answers.jsonl")
    _check_target(target)
    progress.stage("load the specialist")
    specialist = load_specialist(run, arm)
    task = specialist.task
    rows = workbench.read_inputs(task, file)
    key = runs.fingerprint([*specialist.made, runs.file_hash(file)])
    partial = target.with_name(f"{target.name}.{key[:12]}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _own(partial) as handle:
            _answer(specialist.generator, rows, handle, progress)
            _count(partial, progress)
            partial.replace(target)
    except OSError as error:
        error.filename = error.filename or str(target)  # a full disk is reported without a name
        raise
    return target


def _check_target(target: Path) -> None:
    """Refuse to write over anything but answers."""
    if target.is_dir():
        raise RunError(str(target), "is a directory", "give the name of a file as --out")
    if not target.exists():
        return
    try:
        with target.open("rb") as handle:
            known = {"id", "output", "finished"} <= json.loads(handle.readline()).keys()
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise RunError(
            str(target), "exists and holds no answers of metier", "give another name as --out"
        )


@contextlib.contextmanager
def _own(partial: Path) -> Iterator[BinaryIO]:
    """Open a file for this process alone; after a failure it stays unless it is empty."""
    with partial.open("a+b") as handle:
        _lock(handle, partial)
        try:
            yield handle
        except BaseException:
            if not os.fstat(handle.fileno()).st_size:
                partial.unlink(missing_ok=True)
            raise


def _lock(handle: BinaryIO, partial: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it until now may have put it in place since it was opened here.
        ours = os.path.samestat(os.fstat(handle.fileno()), partial.stat())
    except OSError:
        ours = False
    if not ours:
        raise RunError(str(partial), "is being written by another process", "wait for it")


def _answer(
    generator: Generator, rows: Sequence[Example], handle: BinaryIO, progress: Progress
) -> None:
    """Append the answers that a file does not have yet, a chunk at a time."""
    done = _whole_lines(handle)
    if done:
        progress.say(f"{done} answers are there already: going on after them")
    progress.stage("answer", len(rows))
    progress.advance(done)
    for start in range(done, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        asked = [row for row in chunk if row.input.strip()]
        answers = generator.generate([row.prompt for row in asked]) if asked else []
        found = {row.id: answer for row, answer in zip(asked, answers, strict=True)}
        handle.writelines(
            _line(number, row.id, found.get(row.id)) for number, row in enumerate(chunk, start + 1)
        )
        handle.flush()
        progress.advance(len(chunk))
    os.fsync(handle.fileno())


def _whole_lines(handle: BinaryIO) -> int:
    """Count the whole lines of a file and drop the torn one that an interruption leaves."""
    handle.seek(0)
    content = handle.read()
    handle.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")


def _line(number: int, name: str, answer: Completion | None) -> bytes:
    """A row's line; an empty input has no answer."""
    error = _EMPTY if answer is None else _TOO_LONG if answer.refused else ""
    answer = answer or Completion("", finished=False)
    line: dict[str, Any] = {"row": number, "id": name}
    line |= {"output": answer.text, "finished": answer.finished}
    if error:
        line["error"] = error
    if answer.probability is not None:
        line["probability"] = round(answer.probability, 6)
    if answer.probabilities:
        line["probabilities"] = {name: round(p, 6) for name, p in answer.probabilities.items()}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _count(answers: Path, progress: Progress) -> None:
    """Say how many answers are not whole."""
    total = cut = 0
    errors: Counter[str] = Counter()
    with answers.open("rb") as handle:
        for line in map(json.loads, handle):
            total += 1
            if "error" in line:
                errors[line["error"]] += 1
            else:
                cut += not line["finished"]
    if cut:
        progress.say(f"{cut} of {total} answers were cut at the length limit")
    for error, count in errors.items():
        progress.say(f"{count} of {total} inputs are not answered: {error}")
