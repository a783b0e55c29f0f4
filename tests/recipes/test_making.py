import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from metier.errors import ConfigError, ModelError, TrainingError
from metier.evaluation.wording import phrasings
from metier.model.generate import Engine
from metier.model.load import load_base
from metier.progress import Silent
from metier.recipes import making
from metier.recipes.workbench import Workbench, open_workbench, read_task
from metier.task import Arm
from metier.text.template import Renderer
from tests.recipes.conftest import write_task

LORA_RAG = Arm.of("lora+rag")
PHRASING = phrasings("classification")[0].name


def open_with(directory: Path, base: Path, **changes: object) -> tuple[Workbench, Engine]:
    task = read_task(write_task(directory, base, **changes))
    bench = open_workbench(task, directory)
    loaded = load_base(str(base))
    return bench, making.make_engine(bench, loaded)


def training(max_length: int, **changes: object) -> dict[str, object]:
    return {"epochs": 1, "seeds": [0], "max_length": max_length, **changes}


def test_a_limit_below_the_taught_answers_is_refused(tmp_path: Path, stories260k: Path) -> None:
    bench, engine = open_with(tmp_path, stories260k, max_new_tokens=4)
    for name in ("lora", "full", "lora+rag"):
        with pytest.raises(TrainingError, match="is 5 tokens long with its stop") as caught:
            making.prepare(bench, Arm.of(name), engine)
    assert "rows.jsonl:" in caught.value.place
    assert "set max_new_tokens: 5" in caught.value.remedy
    making.prepare(bench, Arm.of("lora/head"), engine)
    bench, engine = open_with(tmp_path, stories260k, max_new_tokens=5)
    rows, _ = making.prepare(bench, Arm.of("lora"), engine)
    assert max(sum(row.trained) for row in rows.rows) == 5


def test_a_row_that_is_dropped_asks_for_no_room(tmp_path: Path, stories260k: Path) -> None:
    bench, engine = open_with(tmp_path, stories260k, training=training(60, too_long="drop"))
    first, *rest = bench.parts.train
    answer = {"role": "assistant", "content": "a long story " * 30}
    long = dataclasses.replace(first, messages=(first.messages[0], answer))
    parts = dataclasses.replace(bench.parts, train=(long, *rest))
    rows, _ = making.prepare(dataclasses.replace(bench, parts=parts), Arm.of("lora"), engine)
    assert rows.dropped == {"training rows": 1}


def with_long_answer(bench: Workbench, part: str) -> Workbench:
    """The first row of a part gets an answer that is too long to be trained on."""
    first, *rest = getattr(bench.parts, part)
    answer = {"role": "assistant", "content": "a long story " * 30}
    long = dataclasses.replace(first, messages=(first.messages[0], answer))
    return dataclasses.replace(
        bench, parts=dataclasses.replace(bench.parts, **{part: (long, *rest)})
    )


def test_a_row_that_is_dropped_takes_no_room_from_requests(
    tmp_path: Path, stories260k: Path
) -> None:
    settings = {"training": training(60, too_long="drop"), "max_new_tokens": None}
    bench, engine = open_with(tmp_path, stories260k, **settings)
    loaded = load_base(str(stories260k))
    longer = making.make_engine(with_long_answer(bench, "train"), loaded)
    assert longer.max_new_tokens == engine.max_new_tokens < 20
    wide = {"training": training(512), "max_new_tokens": None}
    kept, _ = open_with(tmp_path, stories260k, **wide)
    control = making.make_engine(with_long_answer(kept, "train"), loaded)
    assert control.max_new_tokens > 60


def test_a_validation_row_that_is_dropped_takes_no_room_from_passages(
    tmp_path: Path, stories260k: Path
) -> None:
    bench, engine = open_with(tmp_path, stories260k, training=training(96, too_long="drop"))
    rows, held_out = making.prepare(with_long_answer(bench, "validation"), LORA_RAG, engine)
    bare, _ = making.prepare(bench, Arm.of("lora"), engine)
    assert held_out.dropped == {"validation rows": 1}
    assert len(rows.rows[0].ids) > len(bare.rows[0].ids), "something is still looked up"


def test_a_limit_that_leaves_no_room_for_inputs_is_refused(
    tmp_path: Path, stories260k: Path
) -> None:
    bench, engine = open_with(tmp_path, stories260k, max_new_tokens=510)
    with pytest.raises(ConfigError, match="leaves no room") as caught:
        making.check_room(bench, engine)
    assert caught.value.place == "max_new_tokens"
    making.check_room(*open_with(tmp_path, stories260k, max_new_tokens=6))


def test_inputs_longer_than_the_context_are_named_as_the_cause(
    tmp_path: Path, stories260k: Path
) -> None:
    bench, engine = open_with(tmp_path, stories260k, max_new_tokens=3)
    question = {"role": "user", "content": "a long story " * 400}
    rows = tuple(
        dataclasses.replace(row, messages=(question, row.messages[-1]))
        for row in bench.parts.validation
    )
    long = dataclasses.replace(bench, parts=dataclasses.replace(bench.parts, validation=rows))
    with pytest.raises(ConfigError, match="context of 512 tokens is too short for") as caught:
        making.check_room(long, engine)
    assert caught.value.place == "base"
    assert "base with a longer context" in caught.value.remedy


def test_a_prompted_arm_answers_with_the_base_it_was_measured_with(
    tmp_path: Path, stories260k: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(stories260k, base)
    bench, _ = open_with(tmp_path, base)
    arm = Arm.of("prompt")
    making.choose_phrasing(bench, arm, tmp_path, Silent())
    making.build(bench, arm, tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(ModelError, match="another base"):
        making.build(bench, arm, tmp_path)


def test_what_is_looked_up_makes_room_for_the_answer(tmp_path: Path, stories260k: Path) -> None:
    """Rows with all passages are far above `max_length`; with fewer they fit."""
    bench, engine = open_with(tmp_path, stories260k, training=training(96))
    whole, _ = open_with(tmp_path, stories260k, training=training(512))
    unlimited, _ = making.prepare(whole, LORA_RAG, engine)
    assert max(len(row.ids) for row in unlimited.rows) > 96, "control"
    rows = making.prepare(bench, LORA_RAG, engine)
    lengths = [len(row.ids) for part in rows for row in part.rows]
    assert 60 < max(lengths) <= 96
    assert rows[0].dropped == rows[1].dropped == {}
    bare, _ = making.prepare(bench, Arm.of("lora"), engine)
    assert len(rows[0].rows[0].ids) > len(bare.rows[0].ids), "something is still looked up"


def test_a_long_validation_answer_has_room_too(tmp_path: Path, stories260k: Path) -> None:
    bench, engine = open_with(tmp_path, stories260k, training=training(96))
    first, *rest = bench.parts.validation
    answer = {"role": "assistant", "content": "a big red dog and a small cat in the park"}
    long = dataclasses.replace(first, messages=(first.messages[0], answer))
    parts = dataclasses.replace(bench.parts, validation=(long, *rest))
    _, held_out = making.prepare(dataclasses.replace(bench, parts=parts), LORA_RAG, engine)
    assert sum(held_out.rows[0].trained) > engine.max_new_tokens
    assert len(held_out.rows[0].ids) <= 96


def test_an_arm_asks_as_it_was_trained(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, engine = open_with(tmp_path, stories260k, training=training(96))
    rows, _ = making.prepare(bench, LORA_RAG, engine)
    monkeypatch.setattr(making, "load_engine", lambda *_: engine)
    making.write_about(tmp_path, LORA_RAG, "")
    built = making.build(bench, LORA_RAG, tmp_path)
    renderer = Renderer(engine.renderer.tokenizer, bench.task.template)
    for row, example in zip(rows.rows, bench.parts.train, strict=True):
        asked = renderer.prompt(built.generator.compose(example.prompt))
        assert list(row.ids[: row.trained.index(True)]) == asked


def test_notes_speak_of_requests_answered_before(tmp_path: Path, stories260k: Path) -> None:
    _, engine = open_with(tmp_path, stories260k)
    chats = [[{"role": "user", "content": text}] for text in ("a dog", "a dog " * 600, "a cat")]
    notes = []
    for answered in (0, 2):
        built = making._fitted(engine, engine)
        built.count(chats[:answered])
        built.generator.generate(chats[answered:])
        notes.append(built.notes())
    assert notes[0] == notes[1]
    assert notes[0][0].startswith("1 of 3 requests are longer")


def test_a_base_that_goes_on_by_itself_is_stopped(tmp_path: Path, stories260k: Path) -> None:
    bench, engine = open_with(tmp_path, stories260k, template="question-answer")
    assert engine.stop == ("\n", "### Question:")
    assert making.load_engine(bench, Arm.of("full"), stories260k).stop == ()
    assert making.make_engine(bench, load_base(str(stories260k)), engine.model).stop == ()
    built = making._composed(bench, Arm.of("rag"), engine, PHRASING)
    answers = built.generator.generate([row.prompt for row in bench.parts.validation[:3]])
    assert not any("\n" in answer.text for answer in answers)


def test_an_index_is_built_once_and_shows_what_the_task_says(
    tmp_path: Path, stories260k: Path
) -> None:
    bench, _ = open_with(tmp_path, stories260k, retrieval={"shots": 3})
    assert bench.shots is bench.shots
    assert bench.snippets is bench.snippets
    text = bench.parts.validation[0].input
    assert (len(bench.shots(text)), len(bench.snippets(text))) == (3, 3)
    with_passage = dataclasses.replace(bench, passages=("a zebra in the snow",))
    assert "a zebra in the snow" in with_passage.snippets("zebra snow")
