import json
from pathlib import Path

import pytest

from metier import recipes
from metier.errors import DataError, RunError
from metier.evaluation.runner import load_graded
from metier.recipes import workbench


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


def test_predict_writes_one_answer_per_input(finished: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "new.jsonl"
    texts = ["Tom saw a big dog", "Mia liked the soup", "Ben went to the park"]
    inputs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = recipes.predict(finished / "run", inputs, arm="classical")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path == tmp_path / "new.answers.jsonl"
    assert len(lines) == 3
    assert all(line["output"] in {"animal", "food", "place"} for line in lines)
    assert all(0 < line["probability"] <= 1 for line in lines)


def test_what_cannot_be_loaded_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no arm 'full'"):
        recipes.specialist(finished / "run", "full")
    with pytest.raises(RunError, match=r"verdict\.json"):
        recipes.specialist(tmp_path)
    with pytest.raises(DataError):
        recipes.predict(finished / "run", tmp_path / "none.jsonl")


def test_stream_is_the_evaluated_answer(finished: Path) -> None:
    found = recipes.specialist(finished / "run", "lora")
    chat = [{"role": "user", "content": "Tom saw a big dog and was happy"}]
    assert "".join(found.stream(chat)) == found.generator.generate([chat])[0].text
    sampled = "".join(found.stream(chat, temperature=1.0, seed=3, max_new_tokens=6))
    assert sampled == "".join(found.stream(chat, temperature=1.0, seed=3, max_new_tokens=6))
