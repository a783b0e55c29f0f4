"""Several labels a row, from the data to what is predicted; rows of GoEmotions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metier import recipes
from metier.errors import ConfigError, DataError
from metier.evaluation.verdict import chance
from metier.graders.labels import read_labels
from metier.progress import Silent
from metier.recipes import making, tuning
from metier.recipes.workbench import open_workbench, read_task
from metier.task import Arm, Task
from tests.recipes.conftest import QUICK, write_task
from tests.training.families import write_base

EMOTIONS = {"0": "admiration", "4": "approval", "15": "gratitude", "18": "love"}


def emotions(data: Path) -> list[dict[str, Any]]:
    """Sixty rows each with several of four emotions, with one and with none."""
    lines = (data / "goemotions" / "train.tsv").read_text("utf-8").splitlines()
    cells = [line.split("\t") for line in lines]
    rows = [
        {"text": text, "label": [EMOTIONS[i] for i in ids.split(",") if i in EMOTIONS]}
        for text, ids, _ in cells
    ]
    counts = {kind: [row for row in rows if min(len(row["label"]), 2) == kind] for kind in range(3)}
    return [row for kind in counts.values() for row in kind[:60]]


def write(directory: Path, base: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    settings = {"split": {"near_duplicate": 1.0}, "max_new_tokens": 40, **changes}
    task = write_task(directory, base, kind="multi-label", **settings)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task


def test_every_arm_answers_with_lists_of_labels(
    tmp_path: Path, data_dir: Path, stories260k: Path
) -> None:
    arms = ["prompt", "classical", "lora", "lora/head"]
    rows = [row for row in emotions(data_dir) if len(row["text"]) < 60]
    settings = {
        "training": {**QUICK, "epochs": 1, "seeds": [0]},
        "split": {"near_duplicate": 1.0, "max_validation": 12, "max_test": 12},
    }
    task = write(tmp_path, stories260k, rows, arms=arms, **settings)
    verdict = recipes.run(task, tmp_path / "run", budget=600)
    assert verdict.kind == "multi-label"
    found = {arm.arm: arm.metrics for arm in verdict.arms}
    assert found.keys() == set(arms)
    for name, metrics in found.items():
        assert {"fields", "micro_f1", "macro_f1", "exact", "invalid_answers"} <= metrics.keys()
        assert ("ece_uncalibrated" in metrics) == (name in ("classical", "lora/head"))
    assert found["classical"]["invalid_answers"] == found["lora/head"]["invalid_answers"] == 0
    (made,) = (tmp_path / "run").glob("arm-lora-seed0-*")
    learned = json.loads((made / "training.json").read_text())["sample"].partition("⟦")[2]
    assert set(json.loads(learned.partition("]")[0] + "]")) <= set(EMOTIONS.values())
    assert '["' in (tmp_path / "run" / "report.html").read_text().replace("&#34;", '"')
    (tmp_path / "new.jsonl").write_text('{"text": "I love it, thank you so much!"}\n')
    for arm in ("classical", "lora/head"):
        out = tmp_path / f"{arm[:4]}.jsonl"
        recipes.predict(tmp_path / "run", tmp_path / "new.jsonl", out, arm)
        (line,) = map(json.loads, out.read_text().splitlines())
        assert list(line["probabilities"]) == sorted(EMOTIONS.values())
        assert set(read_labels(line["output"])) <= set(EMOTIONS.values())
        assert 0 < line["probability"] < 1


def test_a_head_learns_several_labels(tmp_path: Path) -> None:
    """A made-up task that a tiny encoder can learn: every name in a text is a label."""
    base = write_base(tmp_path / "base", "Bert")
    names = ("dog", "cat", "fish")
    rows = [
        {
            "text": f"{' '.join(own) or 'stone'} {n}",
            "label": [name.upper() for name in own],
        }
        for n in range(120)
        for own in [[name for place, name in enumerate(names) if n >> place & 1]]
    ]
    training = {"epochs": 20, "seeds": [0], "learning_rate": 0.005, "patience": 0}
    task = write(tmp_path, base, rows, arms=["classical", "full/head"], training=training)
    bench = open_workbench(read_task(task), tmp_path)
    assert bench.labels == ("CAT", "DOG", "FISH")
    out = tmp_path / "made"
    out.mkdir()
    tuning.tune(bench, Arm.of("full/head"), 0, None, Silent(), out, tmp_path / "scratch")
    generator = making.build(bench, Arm.of("full/head"), out).generator
    answers = generator.generate([row.prompt for row in bench.parts.test])
    pairs = zip(answers, bench.parts.test, strict=True)
    right = sum(answer.text == row.answer for answer, row in pairs)
    assert right > 0.9 * len(bench.parts.test) > 10
    assert "[]" in {answer.text for answer in answers}, "rows without any label as well"


def test_text_with_commas_and_lists_are_read_alike(tmp_path: Path, stories260k: Path) -> None:
    texts = [f"text number {n} of some length" for n in range(40)]
    lists = [{"text": t, "label": [["b", "a"], ["a"], []][n % 3]} for n, t in enumerate(texts)]
    plain = [{"text": t, "label": ["b, a", "a", "[]"][n % 3]} for n, t in enumerate(texts)]
    found = []
    for rows in (lists, plain):
        task = write(tmp_path, stories260k, rows, arms=["classical"])
        parts = open_workbench(read_task(task), tmp_path).parts
        found.append({row.input: row.answer for row in (*parts.train, *parts.test)})
    assert found[0] == found[1]
    assert set(found[0].values()) == {'["a","b"]', '["a"]', "[]"}


def test_every_part_gets_rare_labels(tmp_path: Path, stories260k: Path) -> None:
    rows = [
        {"text": f"text number {n} of some length", "label": ["a"] + ["rare"] * (n in (3, 50, 77))}
        for n in range(90)
    ]
    task = write(tmp_path, stories260k, rows, arms=["classical"])
    parts = open_workbench(read_task(task), tmp_path).parts
    for part in (parts.train, parts.validation, parts.test):
        assert any("rare" in row.answer for row in part)
    caps = ["split.max_train=9", "split.max_test=5"]
    capped = open_workbench(read_task(task, caps), tmp_path).parts
    assert any("rare" in row.answer for row in capped.train)


@pytest.mark.parametrize(
    ("label", "labels", "cause"),
    [
        ({"a": 1}, [], "cannot be read as labels: it is no list"),
        ([["a"]], [], "cannot be read as labels: it lists something else"),
        (["a", "typo"], ["a", "b", "type"], "the label 'typo' is not among"),
    ],
)
def test_what_is_no_label_is_refused(
    tmp_path: Path, stories260k: Path, label: Any, labels: list[str], cause: str
) -> None:
    rows = [{"text": f"text number {n}", "label": label} for n in range(40)]
    task = write(tmp_path, stories260k, rows, arms=["classical"], labels=labels)
    with pytest.raises(DataError, match=cause):
        open_workbench(read_task(task), tmp_path)


def test_likelihood_compares_single_labels_only() -> None:
    values = {"name": "t", "kind": "multi-label", "data": {"file": "a"}}
    with pytest.raises(ConfigError, match="needs kind: classification"):
        Task.parse({**values, "arms": ["prompt/likelihood"]}, "task.yaml")
    arms = {arm.name for arm in Task.parse(values, "task.yaml").chosen_arms()}
    assert arms == {"prompt", "few-shot", "rag", "classical", "lora"}


def test_answers_without_understanding() -> None:
    """By hand: `a` is right in three of four rows, once as one of two."""
    task = Task.parse({"name": "t", "kind": "multi-label", "data": {"file": "x"}}, "task.yaml")
    found = chance(task, ['["a"]', '["a"]', '["a","b"]', '["c"]'], ("a", "b", "c"))
    assert found.level == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert '["a"]' in found.words
    empty = chance(task, ["[]", "[]", '["a"]'], ("a",))
    assert empty.level == pytest.approx(2 / 3)
    assert "always answering []" in empty.words
