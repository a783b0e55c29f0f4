import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from metier import recipes
from metier.errors import DataError, RequestError, RunError
from metier.evaluation.arms import Composed
from metier.evaluation.remote import RemoteGenerator
from metier.evaluation.runner import load_graded
from metier.progress import Silent
from metier.recipes import answering, workbench
from metier.recipes.answering import Specialist
from metier.records import Completion
from metier.task import Remote
from tests.serving.test_gateway import KEY, served

WRITING = ("prompt", "few-shot", "rag", "lora", "lora+rag")
CHOOSING = ("classical", "prompt/likelihood", "lora/head")
TEXTS = ("Tom saw a big dog", "Mia liked the soup", "Ben went to the park")
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
LONG = [{"role": "user", "content": "once upon a time " * 500}]


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with every other local arm, made from the same directories."""
    path = tmp_path_factory.mktemp("all") / "run"
    shutil.copytree(finished / "run", path)
    index = json.loads((path / "arms.json").read_text())
    known = index["arms"]
    for name, like in {
        "few-shot": "prompt",
        "rag": "prompt",
        "prompt/likelihood": "prompt",
        "lora+rag": "lora",
    }.items():
        method, _, mode = name.partition("/")
        arm = {"method": method, "mode": mode or "text", "base": ""}
        known[name] = {"arm": arm, "directory": known[like]["directory"]}
    (path / "arms.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def specialists(run: Path) -> dict[str, Specialist]:
    return {arm: recipes.specialist(run, arm) for arm in (*WRITING, *CHOOSING)}


@pytest.fixture(scope="module")
def url(specialists: dict[str, Specialist]) -> Iterator[str]:
    with served(specialists) as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.parametrize("arm", ["prompt", "classical", "lora", "lora/head"])
def test_a_specialist_answers_as_it_was_evaluated(finished: Path, arm: str) -> None:
    run = finished / "run"
    found = recipes.specialist(run, arm)
    bench = workbench.load(next(run.glob("data-*")))
    index = json.loads((run / "arms.json").read_text())["arms"][arm]
    chats = [row.prompt for row in bench.parts.validation]
    answers = [answer.text for answer in found.generator.generate(chats)]
    graded = [
        [item.completion.text for item in load_graded(path, bench.parts.validation)]
        for path in run.glob(f"validation-{arm.replace('/', '-')}-*")
        if json.loads((path / "manifest.json").read_text())["inputs"]["arm"] == index["directory"]
    ]
    assert graded == [answers]


# --- files


def write_inputs(path: Path, texts: tuple[str, ...] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_an_empty_answer_that_was_cut_is_not_a_request_too_long() -> None:
    """As from an endpoint that spent its whole limit on thoughts and reports no tokens."""
    assert "error" not in json.loads(answering._line(1, "a", Completion("", finished=False)))
    refused = Completion("", finished=False, refused=True)
    assert "error" in json.loads(answering._line(1, "a", refused))


class Told(Silent):
    """Keeps what a person is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_predict_writes_one_answer_per_input(finished: Path, tmp_path: Path) -> None:
    told = Told()
    inputs = write_inputs(tmp_path / "new.jsonl")
    path = recipes.predict(finished / "run", inputs, arm="classical", progress=told)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path == tmp_path / "new.jsonl.answers.jsonl"
    assert len(lines) == 3
    assert all(line["output"] in {"animal", "food", "place"} for line in lines)
    assert all(0 < line["probability"] <= 1 for line in lines)
    assert all(line["finished"] for line in lines)
    assert [line["row"] for line in lines] == [1, 2, 3]
    assert told.lines == []
    assert {file.name for file in tmp_path.iterdir()} == {inputs.name, path.name}


def test_predict_marks_and_counts_what_is_cut_or_not_answered(run: Path, tmp_path: Path) -> None:
    told = Told()
    inputs = write_inputs(tmp_path / "new.jsonl", (*TEXTS, LONG[0]["content"]))
    path = recipes.predict(run, inputs, arm="few-shot", progress=told)
    *answered, refused = [json.loads(line) for line in path.read_text().splitlines()]
    (*expected, empty) = recipes.specialist(run, "few-shot").generator.generate([*CHATS, LONG])
    assert [line["finished"] for line in answered] == [one.finished for one in expected]
    assert not any("error" in line for line in answered)
    assert (refused["output"], refused["finished"]) == ("", False) == (empty.text, empty.finished)
    assert refused["error"] == "longer than the model's context allows"
    cut = sum(not one.finished for one in expected)
    assert told.lines == [
        *([f"{cut} of 4 answers were cut at the length limit"] if cut else []),
        "1 of 4 inputs are not answered: longer than the model's context allows",
    ]


def test_an_empty_input_costs_only_its_own_answer(run: Path, tmp_path: Path) -> None:
    told = Told()
    inputs = tmp_path / "new.csv"
    inputs.write_text(f'label,text\nx,""\nx,{TEXTS[0]}\nx," "\n')
    for arm in ("classical", "prompt/likelihood", "lora"):
        path = recipes.predict(run, inputs, arm=arm, progress=told)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["row"] for line in lines] == [1, 2, 3]
        errors = [line.get("error") for line in lines]
        assert errors == ["the input is empty", None, "the input is empty"]
        assert [line["finished"] for line in lines][::2] == [False, False]
        (answer,) = recipes.specialist(run, arm).generator.generate(CHATS[:1])
        assert lines[1]["output"] == answer.text
        assert told.lines[-1] == "2 of 3 inputs are not answered: the input is empty"
    inputs.write_text("text\n  \n")
    path = recipes.predict(run, inputs, arm="classical")
    assert json.loads(path.read_text())["error"] == "the input is empty"


def test_files_of_the_same_stem_do_not_share_answers(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nTom saw a big dog\n")
    inputs = write_inputs(tmp_path / "a.jsonl")
    paths = {
        recipes.predict(finished / "run", file, arm="classical")
        for file in (inputs, tmp_path / "a.csv")
    }
    assert [len(path.read_text().splitlines()) for path in sorted(paths)] == [1, 3]


def test_predict_writes_over_nothing_but_answers(finished: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "new.jsonl")
    before = inputs.read_text()
    for name, content in {
        "notes.txt": "mine",
        "empty": "",
        "list": "[1]",
        inputs.name: before,
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(RunError, match="holds no answers"):
            recipes.predict(finished / "run", inputs, tmp_path / name, "classical")
        assert (tmp_path / name).read_text() == content
    path = recipes.predict(finished / "run", inputs, None, "classical")
    answers = path.read_bytes()
    path.write_bytes(answers * 2)
    assert recipes.predict(finished / "run", inputs, None, "classical").read_bytes() == answers


def test_an_interrupted_prediction_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "_CHUNK", 2)
    texts = tuple(f"{text} {n}" for n in range(3) for text in TEXTS)
    inputs = write_inputs(tmp_path / "new.jsonl", texts)
    whole = recipes.predict(finished / "run", inputs, tmp_path / "whole", "classical").read_bytes()

    class Interrupting(Told):
        def advance(self, n: float = 1, **info: object) -> None:
            self.lines.append(str(n))
            if len(self.lines) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipes.predict(finished / "run", inputs, None, "classical", Interrupting())
    (partial,) = tmp_path.glob("*.partial")
    assert partial.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    partial.write_bytes(partial.read_bytes() + b'{"id": "torn')
    told = Told()
    path = recipes.predict(finished / "run", inputs, None, "classical", told)
    assert path.read_bytes() == whole
    assert told.lines == ["4 answers are there already: going on after them"]
    assert not partial.exists()


def test_a_second_prediction_leaves_the_first_one_whole(finished: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "new.jsonl")
    whole = recipes.predict(finished / "run", inputs, tmp_path / "whole", "classical").read_bytes()

    class Twice(Silent):
        """Starts the same call again before the first chunk and before the end."""

        refused = 0

        def advance(self, n: float = 1, **info: object) -> None:
            with pytest.raises(RunError, match="written by another process"):
                recipes.predict(finished / "run", inputs, None, "classical")
            self.refused += 1

    twice = Twice()
    path = recipes.predict(finished / "run", inputs, None, "classical", twice)
    assert path.read_bytes() == whole
    assert twice.refused == 2


def test_a_file_put_in_place_while_it_is_opened_is_not_written(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    with partial.open("a+b") as handle:
        answering._lock(handle, partial)
    with partial.open("a+b") as handle:
        partial.replace(tmp_path / "target")
        with pytest.raises(RunError, match="written by another process"):
            answering._lock(handle, partial)


def test_answers_of_another_arm_or_file_are_not_gone_on_with(run: Path, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "new.jsonl")
    out = tmp_path / "out"

    class Interrupting(Silent):
        def advance(self, n: float = 1, **info: object) -> None:
            if n:
                raise KeyboardInterrupt

    for arm, texts in (("classical", TEXTS), ("lora/head", TEXTS), ("classical", TEXTS[:2])):
        write_inputs(inputs, texts)
        with pytest.raises(KeyboardInterrupt):
            recipes.predict(run, inputs, out, arm, Interrupting())
    assert len(list(tmp_path.glob("*.partial"))) == 3
    # The data's directory is named by the task, with the longest answer, and by the rows.
    changed = shutil.copytree(run, tmp_path / "run")
    (data,) = changed.glob("data-*")
    data.rename(changed / "data-changed")
    index = changed / "arms.json"
    index.write_text(index.read_text().replace(data.name, "data-changed"))
    with pytest.raises(KeyboardInterrupt):
        recipes.predict(changed, inputs, out, "classical", Interrupting())
    assert len(list(tmp_path.glob("*.partial"))) == 4


def test_what_cannot_be_loaded_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no arm 'full'"):
        recipes.specialist(finished / "run", "full")
    with pytest.raises(RunError, match=r"verdict\.json"):
        recipes.specialist(tmp_path)
    with pytest.raises(DataError):
        recipes.predict(finished / "run", tmp_path / "none.jsonl")


def test_a_run_that_ships_nothing_asks_for_an_arm(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "verdict.json"
    values = json.loads(path.read_text()) | {"decision": "none", "arm": ""}
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match="no arm that its verdict would use") as caught:
        recipes.specialist(copy)
    assert "--arm: prompt, classical, lora" in caught.value.remedy
    assert recipes.specialist(copy, "classical").name.endswith(":classical")


# --- requests


@pytest.mark.parametrize("arm", [*WRITING, *CHOOSING])
def test_what_is_served_is_what_is_evaluated(
    client: openai.OpenAI, specialists: dict[str, Specialist], arm: str
) -> None:
    expected = specialists[arm].generator.generate(CHATS)
    for chat, evaluated in zip(CHATS, expected, strict=True):
        answer = client.chat.completions.create(model=arm, messages=chat)
        assert answer.choices[0].message.content == evaluated.text
        assert answer.usage.prompt_tokens == evaluated.prompt_tokens
        assert answer.choices[0].finish_reason == ("stop" if evaluated.finished else "length")
        chunks = list(client.chat.completions.create(model=arm, messages=chat, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == evaluated.text
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


@pytest.mark.parametrize("arm", ["prompt", "few-shot", "rag"])
def test_a_request_is_composed_once(specialists: dict[str, Specialist], arm: str) -> None:
    found = specialists[arm]
    assert isinstance(found.generator, Composed)
    composed = found.generator.compose(CHATS[0])
    text = "\n".join(message["content"] or "" for message in composed)
    assert text.count("animal, food, place") == 1
    assert ("Output: " in text) == (arm == "rag")
    assert (len(composed) > 2) == (arm == "few-shot")


@pytest.mark.parametrize("arm", WRITING)
def test_arms_that_write_honour_every_option(client: openai.OpenAI, arm: str) -> None:
    def ask(**options: object) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(model=arm, messages=CHATS[0], **options)

    whole = ask()
    text = whole.choices[0].message.content
    assert ask(max_tokens=4096, temperature=0, top_p=1, seed=1).choices == whole.choices
    short = ask(max_tokens=1)
    assert short.usage.completion_tokens == 1
    assert text.startswith(short.choices[0].message.content)
    stopped = ask(stop=text[1:3]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[:1], "stop")
    drawn = [ask(temperature=2, seed=seed).choices[0].message.content for seed in (*range(4), 0)]
    assert drawn[0] == drawn[-1]
    assert len(set(drawn)) > 1
    for top_p in (0, 1e-9):
        narrow = [ask(temperature=2, top_p=top_p, seed=seed).choices for seed in (0, 1)]
        assert narrow[0] == narrow[1], "only the likeliest token is left"


@pytest.mark.parametrize("arm", CHOOSING)
def test_arms_that_choose_take_sampling_and_refuse_nonsense(
    client: openai.OpenAI, arm: str
) -> None:
    def ask(**options: object) -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(model=arm, messages=CHATS[0], **options)

    text = ask().choices[0].message.content
    assert text in {"animal", "food", "place"}
    for sampling in ({"temperature": 0, "top_p": 1}, {"temperature": 1, "top_p": 0.5}):
        same = ask(max_tokens=16, seed=5, stop="nowhere", **sampling).choices[0]
        assert same.message.content == text
    stopped = ask(stop=text[1:3]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[:1], "stop")
    for option in ({"temperature": 3}, {"temperature": -1}, {"top_p": 1.5}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**option)
        assert [caught.value.param] == list(option)
        assert caught.value.code == "invalid_value"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("arm", [*WRITING, "prompt/likelihood", "lora/head"])
def test_a_request_longer_than_the_context_is_refused(
    client: openai.OpenAI, arm: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.chat.completions.create(model=arm, messages=LONG, stream=stream)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_a_served_specialist_can_be_the_endpoint_of_a_remote_arm(
    url: str, specialists: dict[str, Specialist], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METIER_TEST_KEY", KEY)
    for arm in ("prompt", "lora", "classical"):
        remote = RemoteGenerator(Remote(base_url=url, model=arm, api_key_env="METIER_TEST_KEY"), 64)
        expected = specialists[arm].generator.generate(CHATS * 3)
        answers = remote.generate(CHATS * 3)
        assert [one.text for one in answers] == [one.text for one in expected]
        assert [one.finished for one in answers] == [one.finished for one in expected]
        assert remote.notes() == ()


def test_an_answer_that_cannot_be_cut_is_refused(specialists: dict[str, Specialist]) -> None:
    found = specialists["lora"]
    elsewhere = Specialist("elsewhere", found.task, found.generator, None, ())
    written = found.generator.generate([CHATS[0]])[0].completion_tokens
    assert "".join(elsewhere.stream(CHATS[0], max_new_tokens=written))
    with pytest.raises(RequestError, match=f"max_tokens: is {written - 1}"):
        next(elsewhere.stream(CHATS[0], max_new_tokens=written - 1))
