"""Run an arm over examples and grade what it answers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metier.errors import RunError
from metier.evaluation.schema import Sample
from metier.graders import Grader, LabelSet
from metier.graders.summary import same_labels
from metier.model.calibration import calibration_error
from metier.model.memory import give_back
from metier.progress import Progress, Silent
from metier.records import Chat, Completion, Example, Generator, Score, input_text, transcript
from metier.runs import write_atomic
from metier.task import Kind

FILE = "graded.jsonl"
_MOST_TIMED, _FEWEST_TIMED, _TIMED_SECONDS = 50, 12, 10.0
_CHUNK = 64
_LONGEST_CONVERSATION = 3000  # characters; of texts over 4,000 the report cuts the end


@dataclass(frozen=True, slots=True)
class Graded:
    """One example with what an arm answered and what that is worth."""

    example: Example
    completion: Completion
    score: Score


def evaluate(
    generator: Generator,
    examples: Sequence[Example],
    grader: Grader,
    progress: Progress | None = None,
    scratch: Path | None = None,
    done: Sequence[Graded] = (),
) -> list[Graded]:
    """Answer and grade every example, in order.

    Answers are asked for and graded in chunks, so that a grader that fails does so early.

    Args:
        generator: the arm; it sees no expected output.
        examples: what to answer.
        grader: gives the scores.
        progress: told of every example done; its stage is the caller's.
        scratch: directory that keeps finished chunks, for `unfinished`.
        done: what an interrupted start has answered, the first of the examples.

    Raises:
        MetierError: whatever the arm or the grader raises.

    """
    progress = progress or Silent()
    graded = list(done)
    progress.advance(len(graded))
    for start in range(len(graded), len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        completions = generator.generate([example.prompt for example in chunk])
        for example, completion in zip(chunk, completions, strict=True):
            graded.append(Graded(example, completion, grader.grade(completion.text, example)))
        if scratch:
            _append(scratch, graded[start:])
        give_back()
        progress.advance(len(chunk))
    return graded


def unfinished(scratch: Path, examples: Sequence[Example]) -> list[Graded]:
    """What an interrupted `evaluate` has answered of these examples: the first of them, in order.

    Lines from the first damaged one on are taken out of the file.
    """
    graded: list[Graded] = []
    path = scratch / FILE
    if not path.is_file():
        return graded
    with contextlib.suppress(ValueError, LookupError, TypeError):
        for line, example in zip(path.read_bytes().splitlines(True), examples, strict=False):
            item = _read_line(line.decode(), example)
            if not line.endswith(b"\n"):
                break
            graded.append(item)
    write_atomic(path, "".join(map(_line, graded)))
    return graded


def _append(scratch: Path, graded: Sequence[Graded]) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / FILE).open("a", encoding="utf-8") as file:
        file.writelines(map(_line, graded))
        file.flush()
        os.fsync(file.fileno())


def _line(item: Graded) -> str:
    row = {
        "id": item.example.id,
        "completion": dataclasses.asdict(item.completion),
        "score": dataclasses.asdict(item.score),
    }
    return json.dumps(row) + "\n"


def _read_line(line: str, example: Example) -> Graded:
    """Read what `_line` wrote for an example; a line that is not one raises one of many errors."""
    row = json.loads(line)
    if row["id"] != example.id:
        raise ValueError("was written for other examples")
    return Graded(example, Completion(**row["completion"]), Score(**row["score"]))


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds for one request alone.

    Attributes:
        mean: of the times measured; so many requests take so many times the mean.
        p50: their median.
        p95: their 95th percentile, interpolated: of few times it is near the slowest.
        requests: how many were timed.

    """

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    requests: int = 0


def measure_latency(generator: Generator, chats: Sequence[Chat]) -> Latency:
    """Time requests one at a time, each chat once; a first one warms up and does not count.

    At most 50 are timed; where they are slow it ends after 10 seconds, but not before 12.
    """
    generator.generate([chats[0]])
    seconds: list[float] = []
    for chat in chats[:_MOST_TIMED]:
        if len(seconds) >= _FEWEST_TIMED and sum(seconds) > _TIMED_SECONDS:
            break
        start = time.perf_counter()
        generator.generate([chat])
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(seconds, [50, 95])
    return Latency(float(np.mean(seconds)), float(p50), float(p95), len(seconds))


def latency_seconds(each: float) -> float:
    """About how long `measure_latency` takes at most, where a request takes `each` seconds."""
    return each + min(_MOST_TIMED * each, max(_FEWEST_TIMED * each, _TIMED_SECONDS + each))


def save_graded(directory: Path, graded: Sequence[Graded]) -> None:
    """Write graded answers into a stage's directory, one JSON line per example, by its id."""
    with (directory / FILE).open("w", encoding="utf-8") as file:
        file.writelines(map(_line, graded))


def load_graded(directory: Path, examples: Sequence[Example]) -> list[Graded]:
    """Read what `save_graded` wrote for these examples.

    Raises:
        RunError: the file is missing or damaged, or was written for other examples.

    """
    path = directory / FILE
    remedy = "delete this directory; the run makes it again"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) != len(examples):
            raise ValueError("was written for other examples")
        return [_read_line(line, example) for line, example in zip(lines, examples, strict=True)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(str(path), f"cannot be read ({error})", remedy) from None


def confusion(labels: Sequence[str], graded: Sequence[Graded]) -> tuple[tuple[int, int, int], ...]:
    """Counts of (place of the true label, place of the answered label), as `ArmDetails` has them.

    A place is an index into `labels`; ``len(labels)`` stands for an answer that is no label.
    """
    label_set = LabelSet(labels)
    counts = Counter(
        (label_set.row(item.example.answer), label_set.row(item.completion.text)) for item in graded
    )
    return tuple((true, answered, counts[true, answered]) for true, answered in sorted(counts))


def calibration(kind: Kind, labels: Sequence[str], graded: Sequence[Graded]) -> dict[str, float]:
    """`ece`, and `ece_uncalibrated` where the arm was calibrated; empty without probabilities.

    Requests that were refused have no answer whose probability could be right.
    """
    label_set = LabelSet(labels)

    def is_right(item: Graded) -> bool:
        if kind == "multi-label":
            return same_labels(item.completion.text, item.example.answer)
        place = label_set.row(item.example.answer)
        return place == label_set.row(item.completion.text) != len(labels)

    asked = [item for item in graded if item.completion.probability is not None]
    right = [is_right(item) for item in asked]
    names = {"ece": "probability", "ece_uncalibrated": "uncalibrated"}
    given = {name: [getattr(i.completion, field) for i in asked] for name, field in names.items()}
    return {
        name: calibration_error(values, right)
        for name, values in given.items()
        if values and None not in values
    }


def won_and_lost(
    graded: Sequence[Graded], reference: Sequence[Graded], limit: int = 10
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Examples that an arm answers better, and those it answers worse, than the reference.

    The largest differences come first. Among equal ones the choice is by a hash of the id: the
    same in every run, and not the first rows of the file. While there are enough, no two are of
    one group.

    Args:
        graded: of the arm.
        reference: of the reference, for the same examples in the same order.
        limit: how many of each at most.

    """
    pairs = [
        (item.score.value - other.score.value, item, other)
        for item, other in zip(graded, reference, strict=True)
    ]
    won = [(margin, item, other) for margin, item, other in pairs if margin > 0]
    lost = [(-margin, item, other) for margin, item, other in pairs if margin < 0]
    return _choose(won, limit), _choose(lost, limit)


def _choose(pairs: list[tuple[float, Graded, Graded]], limit: int) -> tuple[Sample, ...]:
    """Largest margins first; a second one of a group only when the groups run out."""
    pairs = sorted(pairs, key=lambda pair: (-pair[0], _shuffle_key(pair[1].example.id)))
    first_of_group: dict[str, int] = {}
    for place, (_, item, _) in enumerate(pairs):
        first_of_group.setdefault(item.example.group or f"id {item.example.id}", place)
    firsts = set(first_of_group.values())
    by_preference = sorted(range(len(pairs)), key=lambda place: (place not in firsts, place))
    return tuple(_sample(*pairs[place][1:]) for place in sorted(by_preference[:limit]))


def _shuffle_key(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _sample(item: Graded, other: Graded) -> Sample:
    return Sample(
        id=item.example.id,
        input=_shown(item.example.prompt),
        expected=item.example.answer,
        answer=item.completion.text,
        score=item.score.value,
        explanation=item.score.explanation,
        reference_answer=other.completion.text,
        reference_score=other.score.value,
    )


def _shown(prompt: Chat) -> str:
    """The input for readers; a long conversation keeps its first and its last turns."""
    text = transcript(prompt)
    left_out = len(text) - _LONGEST_CONVERSATION
    if left_out <= 0 or text == input_text(prompt):
        return text
    half = _LONGEST_CONVERSATION // 2
    return f"{text[:half]}\n[{left_out:,} characters are left out here]\n{text[-half:]}"
