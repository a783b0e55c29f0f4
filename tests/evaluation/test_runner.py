from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from metier.errors import ConfigError, RunError
from metier.evaluation import runner
from metier.evaluation.runner import (
    Graded,
    calibration,
    confusion,
    evaluate,
    latency_seconds,
    load_graded,
    measure_latency,
    save_graded,
    unfinished,
    won_and_lost,
)
from metier.graders import load_grader
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.records import Completion, Example, Score
from metier.text.template import Renderer


def example(name: str, answer: str = "yes", group: str = "") -> Example:
    messages = ({"role": "user", "content": f"question {name}"},)
    return Example(name, (*messages, {"role": "assistant", "content": answer}), group)


class Echo:
    """Answers with the last word of the request, and remembers every call."""

    def __init__(self) -> None:
        self.calls: list[list] = []

    def generate(self, chats):
        self.calls.append(list(chats))
        return [Completion(chat[-1]["content"].split()[-1], prompt_tokens=2) for chat in chats]


class Counted:
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.done = 0.0

    def stage(self, name, total=None): ...

    def advance(self, n=1, **info):
        self.done += n

    def say(self, text): ...


def test_every_example_is_answered_without_its_answer_and_graded_in_order():
    examples = [example(str(i), answer="7") for i in range(150)]
    arm, progress = Echo(), Counted()
    grader = load_grader("exact", "classification", ["7"], Path())
    graded = evaluate(arm, examples, grader, progress)
    assert [item.example.id for item in graded] == [str(i) for i in range(150)]
    assert [item.completion.text for item in graded] == [str(i) for i in range(150)]
    assert [i for i, item in enumerate(graded) if item.score.value == 1] == [7]
    assert progress.done == 150
    assert len(arm.calls) > 1
    assert all(len(chat) == 1 and chat[0]["role"] == "user" for c in arm.calls for chat in c)


def test_a_grader_that_fails_stops_the_run_early(tmp_path):
    (tmp_path / "g.py").write_text("def grade(o, e): return 1 / 0\n")
    grader = load_grader("python:g.py:grade", "expansion", ["x"], tmp_path)
    arm = Echo()
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        evaluate(arm, [example(str(i)) for i in range(1_000)], grader)
    assert len(arm.calls) == 1


class Failing(Echo):
    """An endpoint that fails at its third call."""

    def generate(self, chats):
        if len(self.calls) == 2:
            raise ConnectionError
        return super().generate(chats)


@pytest.mark.parametrize("torn", [b"", b'{"id": "128", "comp', b'{"id": "128"}', b"\xff\n"])
def test_an_interrupted_evaluation_goes_on(tmp_path, torn):
    examples = [example(str(i), answer="7") for i in range(150)]
    grader = load_grader("exact", "classification", ["7"], Path())
    whole = evaluate(Echo(), examples, grader)
    assert unfinished(tmp_path, examples) == []
    with pytest.raises(ConnectionError):
        evaluate(Failing(), examples, grader, None, tmp_path)
    with (tmp_path / "graded.jsonl").open("ab") as file:
        file.write(torn)
    done = unfinished(tmp_path, examples)
    assert done == whole[:128], "two chunks, and no torn line"
    arm, progress = Echo(), Counted()
    assert evaluate(arm, examples, grader, progress, tmp_path, done) == whole
    assert [len(call) for call in arm.calls] == [22]
    assert progress.done == 150
    assert unfinished(tmp_path, examples) == whole, "what follows a torn line is read again"


def test_answers_to_other_examples_are_not_gone_on_with(tmp_path):
    examples = [example(str(i)) for i in range(3)]
    grader = load_grader("exact", "classification", ["7"], Path())
    evaluate(Echo(), examples, grader, None, tmp_path)
    assert len(unfinished(tmp_path, examples)) == 3, "control"
    assert unfinished(tmp_path, examples[::-1]) == []


def test_a_real_model_can_be_evaluated(stories260k):
    base = load_base(str(stories260k))
    engine = Engine(base.model, Renderer(base.tokenizer, "plain"), max_new_tokens=8)
    grader = load_grader("rouge_l", "expansion", ["x"], Path())
    graded = evaluate(engine, [example("a", "Once upon a time"), example("b", "there was")], grader)
    assert [item.completion.completion_tokens for item in graded] == [8, 8]
    assert all(0 <= item.score.value <= 1 for item in graded)
    assert measure_latency(engine, [graded[0].example.prompt]).p50 > 0


class Sleeper(Echo):
    """Takes the seconds that stand in the request."""

    def generate(self, chats):
        time.sleep(float(chats[0][-1]["content"]))
        return super().generate(chats)


def sleeps(seconds):
    return [[{"role": "user", "content": str(each)}] for each in seconds]


def test_latency_is_of_one_request_alone_after_a_warm_up():
    found = measure_latency(arm := Sleeper(), sleeps([0.3, 0.001, 0.3, 0.3, 0.3] + [0.001] * 60))
    assert [len(call) for call in arm.calls] == [1] * 51
    assert found.requests == 50
    assert 0.001 <= found.p50 < 0.2 < found.p95
    assert found.p50 < (1.2 + 46 * 0.001) / 50 <= found.mean


def test_slow_requests_are_timed_for_some_seconds_only(monkeypatch):
    monkeypatch.setattr(runner, "_TIMED_SECONDS", 0.2)
    assert measure_latency(Sleeper(), sleeps([0.05] * 60)).requests == 12
    assert 12 < measure_latency(Sleeper(), sleeps([0.012] * 60)).requests < 50
    assert measure_latency(Sleeper(), sleeps([0.05] * 3)).requests == 3


def test_the_time_that_timing_takes_is_bounded_as_it_is_measured():
    assert latency_seconds(0.1) == pytest.approx(51 * 0.1)
    assert latency_seconds(0.5) == pytest.approx(10 + 2 * 0.5)
    assert latency_seconds(9.0) == pytest.approx(13 * 9.0)


SCORES = st.builds(
    Score,
    st.floats(0, 1),
    st.text(max_size=9),
    st.text(max_size=9),
    st.dictionaries(st.sampled_from(["p", "r"]), st.floats(0, 1)),
)
COMPLETIONS = st.builds(
    Completion,
    st.text(max_size=20) | st.just("a\u2028b\r\nc\ud800"),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    st.none() | st.floats(0, 1),
)


@settings(max_examples=50)
@given(rows=st.lists(st.tuples(COMPLETIONS, SCORES), max_size=5))
def test_what_is_saved_is_loaded_again(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("stage")
    examples = [example(str(i)) for i in range(len(rows))]
    graded = [Graded(e, c, s) for e, (c, s) in zip(examples, rows, strict=True)]
    save_graded(folder, graded)
    assert load_graded(folder, examples) == graded


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[Example]]:
    examples = [example(str(i)) for i in range(3)]
    save_graded(tmp_path, [Graded(e, Completion("a"), Score(1, "a", "")) for e in examples])
    return tmp_path, examples


def test_answers_of_other_examples_are_refused(saved):
    folder, examples = saved
    assert len(load_graded(folder, examples)) == 3, "control"
    for others in (examples[:2], examples[::-1], [*examples, example("new")]):
        with pytest.raises(RunError, match="written for other examples"):
            load_graded(folder, others)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]\n", "{}\n", '{"id": "0", "completion": {"words": 1}, "score": {}}\n', "\xff"],
)
def test_a_damaged_file_is_refused(saved, damage):
    folder, examples = saved
    (folder / "graded.jsonl").write_bytes(damage.encode("latin-1"))
    with pytest.raises(RunError, match=r"graded\.jsonl"):
        load_graded(folder, examples)
    (folder / "graded.jsonl").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        load_graded(folder, examples)


def answered(rows: list[tuple[str, str]]) -> list[Graded]:
    return [
        Graded(example(str(i), true), Completion(text), Score(float(true == text), text, "why"))
        for i, (true, text) in enumerate(rows)
    ]


def test_confusion_counts_as_sklearn_does():
    rng = random.Random(1)
    labels = ["card", "cash", "fees"]
    rows = [(rng.choice(labels), rng.choice([*labels, "none of them"])) for _ in range(200)]
    matrix = confusion_matrix(*zip(*rows, strict=True), labels=[*labels, "none of them"])
    found = confusion(labels, answered(rows))
    assert list(found) == sorted(found)
    table = np.zeros((4, 4), dtype=int)
    for true, answer, count in found:
        table[true, answer] = count
    assert (table == matrix).all()


def test_confusion_reads_labels_as_the_grader_does():
    assert confusion(["Card lost"], answered([("Card lost", " card  LOST")])) == ((0, 0, 1),)


def scored(values: list[float], groups: list[str]) -> list[Graded]:
    return [
        Graded(
            example(f"row {i}", group=group), Completion(f"out {value}"), Score(value, "", "why")
        )
        for i, (value, group) in enumerate(zip(values, groups, strict=True))
    ]


def test_won_and_lost_show_the_largest_differences_of_different_groups():
    groups = ["a", "a", "b", "", "", "c"]
    arm = scored([1.0, 0.9, 0.5, 0.1, 0.4, 0.3], groups)
    reference = scored([0.0, 0.0, 0.4, 0.9, 0.6, 0.3], groups)
    won, lost = won_and_lost(arm, reference, limit=2)
    assert [sample.id for sample in won] == ["row 0", "row 2"], "row 1 is of row 0's group"
    assert [sample.id for sample in lost] == ["row 3", "row 4"]
    assert (won[0].score, won[0].reference_score) == (1.0, 0.0)
    assert (won[0].answer, won[0].reference_answer) == ("out 1.0", "out 0.0")
    assert (won[0].input, won[0].expected, won[0].explanation) == ("question row 0", "yes", "why")
    everything, _ = won_and_lost(arm, reference, limit=9)
    assert [sample.id for sample in everything] == ["row 0", "row 1", "row 2"]


def told(*texts: str) -> str:
    """What is shown of an input of several turns."""
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = tuple({"role": r, "content": t} for r, t in zip(roles, (*texts, "a"), strict=True))
    row = Example("row", messages)
    one, other = (Graded(row, Completion(""), Score(value, "", "")) for value in (1.0, 0.0))
    ((sample,), _) = won_and_lost([one], [other])
    return sample.input


def test_the_whole_conversation_is_shown():
    shown = told("same for all", "my card is lost", "Shall I look?", "yes")
    assert shown == "user: my card is lost\nassistant: Shall I look?\nuser: yes"


def test_a_long_conversation_is_cut_in_the_middle():
    first, second, last = "first " + "a" * 9000, "b" * 9000, "c" * 90 + " last"
    whole = f"user: {first}\nassistant: {second}\nuser: {last}"
    shown = told("", first, second, last)
    head, tail = shown.split(f"\n[{len(whole) - 3000:,} characters are left out here]\n")
    assert (head, tail) == (whole[:1500], whole[-1500:])
    assert len(shown) < 4000, "the report shows all of it"


def test_equal_differences_are_chosen_the_same_way_each_time_and_not_by_position():
    arm, reference = scored([1.0] * 200, [""] * 200), scored([0.0] * 200, [""] * 200)
    won, lost = won_and_lost(arm, reference)
    again, _ = won_and_lost(arm[::-1], reference[::-1])
    assert won == again
    assert lost == ()
    assert len(won) == 10
    places = [int(sample.id.split()[1]) for sample in won]
    assert max(places) > 100, "not the first rows of the file"


def test_graded_rows_are_plain_json(saved):
    folder, _ = saved
    row = json.loads((folder / "graded.jsonl").read_text().splitlines()[0])
    assert set(row) == {"id", "completion", "score"}


def sure(answer: str, expected: str, *given: float) -> Graded:
    probabilities = dict(zip(("probability", "uncalibrated"), given, strict=False))
    right = Score(float(answer == expected), answer, "")
    return Graded(example("x", expected), Completion(answer, **probabilities), right)


def test_the_calibration_of_an_arm_that_gives_probabilities() -> None:
    def of(graded: list[Graded]) -> dict[str, float]:
        return calibration("classification", ["yes", "no"], graded)

    graded = [sure("yes", "yes", 0.75, 1.0)] * 3 + [sure("no", "yes", 0.75, 1.0)]
    found = of(graded)
    assert found == {"ece": pytest.approx(0), "ece_uncalibrated": pytest.approx(0.25)}
    assert of([sure("yes", "yes", 0.75)]) == {"ece": pytest.approx(0.25)}
    refused = Graded(example("x"), Completion("", refused=True), Score(0, "", ""))
    assert of([*graded, refused]) == found
    assert of([refused]) == {}
    assert of([sure("maybe", "perhaps", 0.9)]) == {"ece": pytest.approx(0.9)}, "never right"


def test_several_labels_are_right_all_together() -> None:
    graded = [sure('["a","b"]', '["b", "a"]', 1.0), sure('["a"]', '["a","b"]', 1.0)]
    assert calibration("multi-label", ["a", "b"], graded) == {"ece": pytest.approx(0.5)}
