from __future__ import annotations

import pytest

from metier.errors import ConfigError, RemoteError
from metier.graders import load_grader
from metier.records import Completion

SPEC = {
    "type": "score_model",
    "name": "judge",
    "model": "big",
    "input": [
        {"role": "system", "content": "Give 1 to 5."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "{{item.answer}} / {{sample.output_text}}"}],
        },
    ],
    "range": [1, 5],
    "sampling_params": {"temperature": 0},
}


class Judge:
    """Answers every chat with the same text and remembers what it was asked."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.asked: list = []

    def __call__(self, model, sampling):
        self.asked.append((model, dict(sampling)))
        return self

    def generate(self, chats):
        self.asked += chats
        return [Completion(self.answer) for _ in chats]


@pytest.mark.parametrize(
    ("answer", "value"), [("5", 1), (" 2.0\n", 0.25), ('{"result": 3}', 0.5), ("1", 0)]
)
def test_the_number_is_scaled_from_its_range(example, answer, value):
    judge = Judge(answer)
    score = load_grader(SPEC, "expansion", [], None, judge).grade("{{item.id}}", example("gold"))
    assert score.value == pytest.approx(value)
    assert "big gave" in score.explanation
    assert judge.asked[0] == ("big", {"temperature": 0})
    assert judge.asked[1][1] == {"role": "user", "content": "gold / {{item.id}}"}, "one pass only"


@pytest.mark.parametrize(
    "answer", ["", "good", "6", "0.5", "3 out of 5", "nan", "[3]", '{"result": true}', "{}"]
)
def test_an_answer_that_is_no_number_of_the_range_is_an_error(example, answer):
    grader = load_grader(SPEC, "expansion", [], None, Judge(answer))
    with pytest.raises(RemoteError, match="no number from 1 to 5") as caught:
        grader.grade("out", example("gold"))
    assert "row a1" in caught.value.place


def test_without_a_judge_the_grader_is_refused():
    with pytest.raises(ConfigError, match="no judge can be reached"):
        load_grader(SPEC, "expansion", [], None)


@pytest.mark.parametrize(
    "change",
    [
        {"range": [1, 1]},
        {"input": []},
        {"input": [{"role": "user", "content": "{{item.secret}}"}]},
        {"input": [{"role": "user", "content": {"type": "input_image", "text": "x"}}]},
    ],
)
def test_wrong_specs_are_refused(change):
    with pytest.raises(ConfigError):
        load_grader({**SPEC, **change}, "expansion", [], None, Judge("3"))
