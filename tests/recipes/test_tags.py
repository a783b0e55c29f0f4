"""A run that compares writing spans with tagging them, on real tweets and a real small base."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from metier import recipes
from metier.errors import ConfigError, ExportError, TrainingError
from metier.model.load import load_base
from metier.progress import Silent
from metier.recipes import making, planning, speeds, tuning
from metier.recipes.answering import load_specialist
from metier.recipes.finished import read_verdict
from metier.recipes.workbench import open_workbench, read_task
from metier.task import Arm
from metier.text import tags
from metier.training.tagging import labels_of
from tests.recipes.conftest import QUICK, write_task
from tests.training.families import write_base

ARMS = ["prompt", "full/tags"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, stories260k: Path) -> Path:
    """The first tweets that name something, and as many that do not."""
    directory = tmp_path_factory.mktemp("tweets")
    blocks = (data_dir / "wnut17" / "train.conll").read_text("utf-8").split("\n\t\n")
    short = [block for block in blocks if 3 < block.count("\n") < 14]
    tagged = [block for block in short if "B-person" in block or "B-location" in block]
    empty = [block for block in short if "B-" not in block]
    kept = [block for pair in zip(tagged[:45], empty[:45], strict=True) for block in pair]
    (directory / "tweets.conll").write_text("\n\n".join(kept), "utf-8")
    values = {
        "name": "tweets",
        "kind": "extraction",
        "data": {"file": "tweets.conll"},
        "base": str(stories260k),
        "template": "plain",
        "arms": ARMS,
        "split": {"near_duplicate": 1.0, "test": 0.2, "validation": 0.15},
        "max_new_tokens": 24,
        "training": {**QUICK, "epochs": 3, "seeds": [0], "max_length": 512, "learning_rate": 4e-3},
    }
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(task: Path) -> Path:
    recipes.run(task, task.parent / "run")
    return task.parent / "run"


def test_all_arms_answer_the_same_task(run: Path) -> None:
    verdict = read_verdict(run)
    found = {arm.arm: arm for arm in verdict.arms}
    assert set(found) == set(ARMS)
    for arm in found.values():
        assert {"span_f1", "span_precision", "span_recall", "valid_json"} <= set(arm.metrics)
    arm = found["full/tags"]
    assert (arm.mode, arm.tuned, arm.forgetting) == ("tags", True, ())
    assert arm.metrics["valid_json"] == 1
    assert arm.completion_tokens == 0
    details = json.loads((run / "details.json").read_text())
    curves = {one["arm"]: one["curves"][0] for one in details if one["curves"]}
    losses = [point["validation_loss"] for point in curves["full/tags"]]
    assert losses[-1] < losses[0]
    assert all(point["validation_mistakes"] is not None for point in curves["full/tags"])


def test_answers_are_spans_of_their_texts(run: Path, task: Path, tmp_path: Path) -> None:
    kinds = {"person", "location", "group", "product", "corporation", "creative-work"}
    texts = ["I saw Ada Lovelace in London", "", "Zoë went to 東京 🎉 with @bob"]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    out = recipes.predict(run, file, tmp_path / "answers.jsonl", arm="full/tags")
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert lines[1]["error"] == "the input is empty"
    for text, line in zip(texts, lines, strict=True):
        found = json.loads(line["output"] or "{}")
        assert all(one in text for texts in found.values() for one in texts)
        assert set(found) <= kinds
    specialist = load_specialist(run, "full/tags")
    assert specialist.engine is None
    (pieces,) = [*specialist.stream([{"role": "user", "content": texts[0]}])]
    assert pieces == lines[0]["output"]


def test_a_text_without_room_for_two_readings_is_refused(run: Path) -> None:
    generator = load_specialist(run, "full/tags").generator
    long, short = ([{"role": "user", "content": "park " * count}] for count in (300, 3))
    refused, answered = generator.generate([long, short])
    assert (refused.refused, refused.text) == (True, "")
    assert not answered.refused


def test_an_arm_that_tags_is_not_exported(run: Path) -> None:
    with pytest.raises(ExportError, match="tags its input instead of writing"):
        recipes.export(run, arm="full/tags")


def test_what_is_trained_is_what_is_asked(task: Path) -> None:
    bench = open_workbench(read_task(task), task.parent)
    arm = Arm.of("lora/tags")
    engine = making.load_engine(bench, Arm.of("prompt"), None)
    train, _ = making.prepare(bench, arm, engine)
    for row, example in zip(train.rows, train.examples, strict=True):
        assert list(row.ids) == tags.read(engine.renderer, example.prompt).ids
    lengths = [len(row.ids) for row in train.rows]
    assert making.longest_row(bench, engine) == max(
        *lengths, *(len(engine.renderer.example(row.messages).ids) for row in bench.parts.train)
    )
    assert tuning._steps(bench, arm, train) == 3 * -(-len(lengths) // 16)


def test_planning_counts_both_readings_and_nothing_written(
    task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_workbench(read_task(task, ["arms=[prompt, lora/tags]"]), task.parent)
    engine = making.load_engine(bench, Arm.of("prompt"), None)
    speed = speeds.Speed(read=5e3, write=1e-9, alone=1e-9, score=1, train=2e3, answering=1)
    base = speeds.Speed(read=1e4, write=1e3, alone=100, score=1, answering=1)
    kept = {"base": engine, "lora": engine}
    monkeypatch.setattr(speeds, "measure", lambda *_: (kept, {"base": base, "lora": speed}))
    found = {arm.arm: arm.minutes * 60 for arm in planning.plan(bench, Silent()).arms}

    def tokens(part: str) -> list[int]:
        rows = getattr(bench.parts, part)
        return [len(tags.read(engine.renderer, row.prompt).ids) for row in rows]

    training = 3 * (sum(tokens("train")) + sum(tokens("validation")) / 3) / 2e3
    sampled = tokens("validation")[:24]
    each = sum(sampled) / len(sampled) / 5e3
    asked = len(bench.parts.validation) + len(bench.parts.test) + 51
    assert found["lora/tags"] == pytest.approx(training + asked * each, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("arms=[prompt, prompt/tags]", "can carry a head"),
        ("arms=[prompt, lora+rag/tags]", "can carry a head"),
        ("kind=classification", "needs kind: extraction"),
    ],
)
def test_arms_that_cannot_tag_are_refused(task: Path, change: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        read_task(task, [change])


def test_answers_without_spans_are_refused_before_a_model_is_loaded(
    tmp_path: Path, stories260k: Path
) -> None:
    path = write_task(tmp_path, stories260k, kind="extraction", arms=["prompt", "lora/tags"])
    with pytest.raises(TrainingError, match="does not name spans by their type"):
        open_workbench(read_task(path), tmp_path)


def test_classes_stand_in_one_order_whatever_that_of_the_rows(task: Path) -> None:
    bench = open_workbench(read_task(task), task.parent)
    labels = labels_of(bench.parts.train)
    assert labels == labels_of(bench.parts.train[::-1])
    assert all(before < after for before, after in pairwise(labels[1::2]))


def test_an_encoder_tags_what_it_reads_once(
    task: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = write_base(tmp_path_factory.mktemp("bert"), "Bert")
    changed = read_task(task, [f"base={base}", "arms=[full/tags]", "training.max_length=128"])
    bench, arm = open_workbench(changed, task.parent), Arm.of("full/tags")
    out = tmp_path / "made"
    out.mkdir()
    tuning.tune(bench, arm, 0, None, Silent(), out, tmp_path / "scratch")
    built = making.build(bench, arm, out)
    (answer,) = built.generator.generate([bench.parts.validation[0].prompt])
    text = bench.parts.validation[0].input
    read = load_base(str(base)).tokenizer
    assert answer.prompt_tokens == len(read.encode(text)) + sum(map(len, read.frame or ()))
    named = json.loads(answer.text)
    assert all(span in text for spans in named.values() for span in spans)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
