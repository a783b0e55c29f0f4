"""An encoder as base: heads on it are compared, kept and asked; all else is refused."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from metier import recipes
from metier.errors import ConfigError
from metier.model.load import load_base
from metier.progress import Silent
from metier.recipes import making, planning, tuning
from metier.recipes.workbench import Workbench, open_workbench, read_task
from metier.retrieval.hybrid import bundled_model
from metier.task import Arm
from tests.recipes.conftest import write_task
from tests.training.families import write_base

TRAINING = {"epochs": 3, "seeds": [0], "max_length": 64, "batch_size": 16}
ARMS = ["classical", "full/head", "lora/head"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bert"), "Bert")


def test_heads_on_an_encoder_and_on_a_language_model_are_compared(
    tmp_path: Path, bert: Path, stories260k: Path
) -> None:
    task = write_task(tmp_path, bert, arms=["classical", "lora/head"], training=TRAINING)
    stories260k = stories260k.resolve()
    bases = f"base=[{bert}, {stories260k}]"
    verdict = recipes.run(task, tmp_path / "run", [bases])
    names = {f"lora/head@{bert}", f"lora/head@{stories260k}"}
    assert {arm.arm for arm in verdict.arms} == names | {"classical"}
    made = {path.name: path for path in (tmp_path / "run").glob("arm-lora-head*")}
    assert len(made) == 2
    adapters = [json.loads((path / "adapter_config.json").read_text()) for path in made.values()]
    kinds = {adapter["task_type"] for adapter in adapters}
    assert kinds == {"FEATURE_EXTRACTION", "CAUSAL_LM"}
    (tmp_path / "new.jsonl").write_text('{"text": "Tom saw a big dog"}\n')
    out = recipes.predict(tmp_path / "run", tmp_path / "new.jsonl", arm=f"lora/head@{bert}")
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["output"] in ("animal", "food", "place")
    assert 1 / 3 < line["probability"] < 1


def test_an_encoder_learns_labels_alone(tmp_path: Path, bert: Path) -> None:
    """No pass over the inputs comes before: it would predict what it has read already."""
    bench = open_workbench(
        read_task(write_task(tmp_path, bert, arms=ARMS, training=TRAINING)), tmp_path
    )
    out, scratch = tmp_path / "made", tmp_path / "scratch"
    out.mkdir()
    tuning.tune(bench, Arm.of("full/head"), 0, None, Silent(), out, scratch)
    assert not (scratch / "reading").exists()
    facts = tuning.read_facts(out)
    assert facts.curve[-1].validation_loss < facts.curve[0].validation_loss
    assert "<|bos|>" in facts.sample
    assert "###" not in facts.sample, "no template"
    check_snippet(out, bench)
    first, again = (making.build(bench, Arm.of("full/head"), out) for _ in range(2))
    chats = [row.prompt for row in bench.parts.validation]
    assert first.generator.generate(chats) == again.generator.generate(chats)


@pytest.mark.parametrize("name", ["lora/head", "full/head"])
def test_an_encoder_learns_new_tokens(tmp_path: Path, bert: Path, name: str) -> None:
    training = {**TRAINING, "epochs": 1, "added_tokens": ["<Lily>"]}
    task = write_task(tmp_path, bert, arms=["classical", name], training=training)
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text().replace("Lily", "<Lily>"))
    bench = open_workbench(read_task(task), tmp_path)
    out = tmp_path / "made"
    out.mkdir()
    tuning.tune(bench, Arm.of(name), 0, None, Silent(), out, tmp_path / "scratch")
    engine = making.load_engine(bench, Arm.of(name), out)
    ids = engine.renderer.prompt([{"role": "user", "content": "<Lily> saw"}])
    assert max(ids) == 8192
    rows = engine.model.get_input_embeddings().weight
    before = load_base(str(bert)).model.get_input_embeddings().weight.float().mean(0)
    assert not torch.allclose(rows[8192].float(), before, atol=1e-6), "it was learned"
    chats = [row.prompt for row in bench.parts.validation]
    answers = making.build(bench, Arm.of(name), out).generator.generate(chats)
    assert all(0 < (answer.probability or 0) < 1 for answer in answers)


def check_snippet(made: Path, bench: Workbench) -> None:
    """What docs/heads.md gives people to load a head with, on this one."""
    page = (Path(__file__).parents[2] / "docs" / "heads.md").read_text("utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    row = bench.parts.validation[0]
    for old, new in {"run/arm-full-head-seed0-...": made, "Where is my card?": row.input}.items():
        assert code.count(old) == 1
        code = code.replace(old, str(new))
    (made.parent / "snippet.py").write_text(code, "utf-8")
    found = runpy.run_path(str(made.parent / "snippet.py"))["probabilities"]
    (answer,) = making.build(bench, Arm.of("full/head"), made).generator.generate([row.prompt])
    assert answer.text == max(found, key=lambda label: float(found[label]))
    # In bfloat16, where the device computes in it.
    assert answer.probability == pytest.approx(found[answer.text], abs=0.02)


def test_the_plan_of_an_encoder(tmp_path: Path, bert: Path) -> None:
    training = {**TRAINING, "virtual_tokens": 6}
    bench = open_workbench(
        read_task(write_task(tmp_path, bert, arms=ARMS, training=training)), tmp_path
    )
    found = planning.plan(bench, Silent())
    assert [arm.arm for arm in found.arms] == ARMS
    assert all(0 < arm.minutes < 1 for arm in found.arms)


@pytest.mark.parametrize(
    ("arm", "cause"),
    [
        ("prompt", "and writes none"),
        ("few-shot/likelihood", "and writes none"),
        ("lora", "and writes none"),
        ("full+rag", "and writes none"),
        ("prefix-tuning/head", "not behind virtual tokens"),
        ("prompt-tuning/head", "not behind virtual tokens"),
    ],
)
def test_what_an_encoder_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, arm: str, cause: str
) -> None:
    base = write_base(tmp_path / "base", "ModernBert")
    (base / "model.safetensors").unlink()
    task = write_task(tmp_path, base, arms=["classical", arm])
    (tmp_path / "rows.jsonl").unlink()
    for start in (lambda: recipes.run(task, tmp_path / "run"), lambda: recipes.plan(task)):
        with pytest.raises(ConfigError, match=cause) as caught:
            start()
        assert "lora/head" in caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_one_arm_that_an_encoder_cannot_be_is_refused_too(tmp_path: Path, bert: Path) -> None:
    task = write_task(tmp_path, bert, arms=ARMS)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match="and writes none"):
        recipes.train(task, "lora", tmp_path / "run")


def write_banking(directory: Path, data: Path, base: Path, **changes: Any) -> Path:
    """Three intents that are close to each other, some rows of each."""
    wanted = ("card_arrival", "card_delivery_estimate", "lost_or_stolen_card")
    with (data / "banking77" / "train.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in wanted]
    kept = [row for name in wanted for row in [r for r in rows if r["category"] == name][:24]]
    lines = [json.dumps({"text": row["text"], "label": row["category"]}) for row in kept]
    task = write_task(directory, base, **changes)
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return task


def test_real_weights_learn_real_intents(tmp_path: Path, data_dir: Path) -> None:
    """MiniLM on rows of BANKING77; without training it answers by chance."""
    training = {"epochs": 8, "seeds": [0], "max_length": 64, "batch_size": 8}
    task = write_banking(
        tmp_path,
        data_dir,
        bundled_model(),
        arms=["classical", "full/head"],
        training=training,
        split={"near_duplicate": 1.0, "test": 0.3, "validation": 0.2},
    )
    bench = open_workbench(read_task(task), tmp_path)
    out = tmp_path / "made"
    out.mkdir()
    tuning.tune(bench, Arm.of("full/head"), 0, None, Silent(), out, tmp_path / "scratch")
    generator = making.build(bench, Arm.of("full/head"), out).generator
    answers = generator.generate([row.prompt for row in bench.parts.test])
    pairs = zip(answers, bench.parts.test, strict=True)
    right = sum(answer.text == row.answer for answer, row in pairs)
    assert right >= 0.8 * len(bench.parts.test) > 12
