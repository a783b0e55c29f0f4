"""An export loads without metier and says what the arm said; every planted fault refuses it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from metier import recipes
from metier.errors import ExportError, ModelError, RunError
from metier.evaluation.proof import read_proof
from metier.model.generate import Engine
from metier.model.load import load_base, starter_path
from metier.progress import Silent
from metier.recipes import exporting
from metier.runs import Run
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from tests.recipes.conftest import QUICK, write_task

TEXTS = ("Tom saw a big dog", "Mia liked the soup", "Ben went to the park")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which exports may be written into."""
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*TEXTS, " ")))
    return path


def told(directory: Path, text: str, model: Any) -> str:
    """What the README of an export says one does."""
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    messages = [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**asked)[0, asked["input_ids"].shape[1] :].tolist()
    stops = model.generation_config.eos_token_id
    return tokenizer.decode([token for token in answer if token not in stops]).strip()


def test_a_merged_model_says_what_the_arm_says(run: Path, finished: Path) -> None:
    ledger = finished / "things.ledger.jsonl"
    openings = ledger.read_bytes()
    path = recipes.export(run, arm="lora", merge=True)
    assert path == run / "export" / "lora-merged"
    proof = read_proof(path)
    assert [form.name for form in proof.forms] == ["merged", "reloaded", "served"]
    assert all(form.same + len(form.ties) == len(proof.prompts) for form in proof.forms)
    assert all((form.largest_difference or 0) <= proof.bound for form in proof.forms)
    assert proof.forms[1].largest_difference == proof.forms[0].largest_difference > 0
    assert proof.weights is not None
    assert (proof.weights.merged, proof.weights.tensors) == (35, 48)
    assert proof.weights.untouched == 13
    assert proof.stop_tokens == ("<s>", "</s>")
    assert ledger.read_bytes() == openings, "nothing was graded: no opening of the sealed part"
    # In float32, where no two tokens are so near each other that rounding chooses.
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    exported = load_base(str(path), dtype=torch.float32)
    engine = Engine(exported.model, Renderer(exported.tokenizer, "plain"), 6)
    expected = engine.generate([[{"role": "user", "content": text}] for text in TEXTS])
    assert [told(path, text, model) for text in TEXTS] == [one.text for one in expected]
    card = (path / "README.md").read_text()
    assert str(run) not in card + (path / "proof.json").read_text()
    assert "## What was proven" in card
    assert stat.S_IMODE((path / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (path / "config.json").stat().st_mode
    )
    assert sorted(file.name for file in path.parent.iterdir()) == ["lora-merged"]


def test_an_adapter_is_plain_peft(run: Path, stories260k: Path, prompts: Path) -> None:
    path = recipes.export(run, arm="lora", prompts=prompts)
    assert {file.name for file in path.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "metier.json", "manifest.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("generation_config.json", "proof.json", "README.md"),
    }
    proof = read_proof(path)
    assert (proof.kind, proof.weights, len(proof.prompts), proof.left_out) == (
        "adapter",
        None,
        3,
        1,
    )
    found = [(form.name, form.same + len(form.ties)) for form in proof.forms]
    assert found == [("reloaded", 3), ("served", 3)]
    dtype = getattr(torch, proof.number_format)
    base = AutoModelForCausalLM.from_pretrained(str(stories260k), dtype=dtype)
    base.generation_config = GenerationConfig.from_pretrained(str(path))
    model = PeftModel.from_pretrained(base, str(path)).eval()
    (expected,) = recipes.specialist(run, "lora").generator.generate(
        [[{"role": "user", "content": TEXTS[0]}]]
    )
    assert told(path, TEXTS[0], model) == expected.text


def test_a_whole_model_of_another_family_with_its_own_chat_template(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tokenizer = Tokenizer.load(starter_path())
    tokenizer.save(base)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=tokenizer.vocab_size, **sizes, **heads)
    Qwen2ForCausalLM(config).save_pretrained(base)
    training = {**QUICK, "epochs": 1, "seeds": [0], "learning_rate": 0.01}
    arms = ["classical", "full"]
    task = write_task(tmp_path, base, arms=arms, template="chat", training=training)
    recipes.run(task, tmp_path / "run")
    path = recipes.export(tmp_path / "run", arm="full", out=tmp_path / "mine")
    proof = read_proof(path)
    assert (proof.kind, proof.base, proof.template) == ("model", "base", "chat")
    assert proof.stop_tokens == ("<|eos|>",)
    assert proof.weights is not None
    assert proof.weights.untouched == proof.weights.tensors == 27
    assert [form.name for form in proof.forms] == ["reloaded", "served"]
    assert proof.forms[0].largest_difference == 0
    assert (path / "chat_template.jinja").read_text() == tokenizer.chat_template


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        ("prompt", "with an instruction before each input"),
        ("classical", "is no language model"),
        ("lora/head", "chooses among labels"),
    ],
)
def test_arms_that_are_not_one_model_are_refused(run: Path, arm: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason) as caught:
        recipes.export(run, arm=arm, merge=True)
    assert "lora, full" in caught.value.remedy


def test_arms_that_look_things_up_are_refused(run: Path) -> None:
    index = json.loads((run / "arms.json").read_text())
    index["arms"]["lora+rag"] = {
        "arm": {"method": "lora+rag"},
        "directory": index["arms"]["lora"]["directory"],
    }
    (run / "arms.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="puts passages into each request"):
        recipes.export(run, arm="lora+rag")


# --- before any work


def test_a_run_at_work_is_not_disturbed(run: Path, prompts: Path, tmp_path: Path) -> None:
    with Run(run), pytest.raises(RunError, match="in use by another process"):
        recipes.export(run, arm="lora", prompts=prompts)


def test_what_is_there_is_never_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="exists already"):
        recipes.export(run, arm="lora", out=tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("change", ["gone", "other rows"])
def test_another_test_part_is_not_taken_for_the_runs(
    run: Path, finished: Path, tmp_path: Path, change: str
) -> None:
    (data,) = run.glob("data-*")
    about = json.loads((data / "task.json").read_text())
    about["base_dir"] = str(tmp_path)
    (data / "task.json").write_text(json.dumps(about))
    rows = (finished / "rows.jsonl").read_text().splitlines(keepends=True)
    if change == "other rows":
        (tmp_path / "rows.jsonl").write_text("".join(rows).replace("Tom", "Tim"))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"].pop("task.json")
    (data / "manifest.json").write_text(json.dumps(manifest))
    cause = {"gone": "cannot be read again", "other rows": "the data has changed"}[change]
    with pytest.raises(RunError, match=cause) as caught:
        recipes.export(run, arm="lora")
    assert "--prompts FILE" in caught.value.remedy


def test_prompts_that_say_nothing_are_refused(run: Path, prompts: Path) -> None:
    prompts.write_text(json.dumps({"text": "once upon a time " * 500}) + "\n")
    with pytest.raises(ExportError, match="hold no prompt"):
        recipes.export(run, arm="lora", prompts=prompts)
    assert list((run / "export").iterdir()) == []


def test_a_full_disk_is_seen_before_it_is_filled(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(run)._replace(free=60_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"60.MB left, and the export needs \d") as caught:
        recipes.export(run, arm="lora", merge=True, prompts=prompts)
    assert caught.value.place == str(run / "export")
    assert list((run / "export").iterdir()) == []


def test_a_prompt_that_no_template_can_say_is_refused(run: Path, prompts: Path) -> None:
    prompts.write_text(json.dumps({"text": "What is </s>?"}) + "\n")
    with pytest.raises(ExportError, match="reads 'What is </s>', where metier serves 'What is </'"):
        recipes.export(run, arm="lora", prompts=prompts)


# --- planted faults: nothing stays of an export that is refused


def refused(run: Path, prompts: Path, **options: Any) -> Any:
    with pytest.raises((ExportError, ModelError)) as caught:
        recipes.export(run, arm="lora", prompts=prompts, **options)
    assert list((run / "export").iterdir()) == []
    return caught.value


def after(name: str, fault: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault in a directory once a function of `exporting` has written into it."""
    right = getattr(exporting, name)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        fault(next(path for path in arguments if isinstance(path, Path)))
        return result

    monkeypatch.setattr(exporting, name, wrong)


def edit_weights(directory: Path, factor: float) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][7] *= factor
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def edit_stops(directory: Path, ids: list[int]) -> None:
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids}))


def edit_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace('"\\n"', '"\\n\\n"'))


def test_a_weight_that_was_changed_a_little(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little for its answers to tell in bfloat16: its bytes do."""
    after("_save", lambda directory: edit_weights(directory, 1.01), monkeypatch)
    error = refused(run, prompts, merge=True)
    where = {"weight model.layers.2.mlp.down_proj.weight", "reloaded model, prompt"}
    assert any(error.place.startswith(place) for place in where)


def test_a_missing_stop_token(run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after("_save", lambda directory: edit_stops(directory, [3]), monkeypatch)
    assert refused(run, prompts, merge=True).place in ("stop tokens", "reloaded model, prompt")


def test_a_stop_token_too_many(run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after("_save", lambda directory: edit_stops(directory, list(range(512))), monkeypatch)
    assert refused(run, prompts, merge=True).place.startswith("reloaded model, prompt")


def test_a_chat_template_that_was_changed_on_the_way(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after("_write_settings", edit_template, monkeypatch)
    assert refused(run, prompts, merge=True).place.startswith("chat template, prompt")


def test_a_wrong_chat_template(run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Renderer, "jinja", lambda _: ("{{ messages[0]['content'] }}",))
    monkeypatch.setattr(exporting, "Trial", None)  # it is seen before the arm is asked
    assert refused(run, prompts).place.startswith("chat template, prompt")


def test_another_base_under_the_adapter(run: Path, stories260k: Path, prompts: Path) -> None:
    base = run.parent / "base"
    shutil.copytree(stories260k, base, copy_function=shutil.copyfile)
    (data,) = run.glob("data-*")
    about = json.loads((data / "task.json").read_text())
    about["task"]["base"] = str(base)
    (data / "task.json").write_text(json.dumps(about))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"].pop("task.json")
    (data / "manifest.json").write_text(json.dumps(manifest))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "belongs to another base" in refused(run, prompts, merge=True).cause


# --- interruption


def test_an_interruption_leaves_nothing(run: Path, prompts: Path) -> None:
    class Interrupting(Silent):
        def stage(self, name: str, total: float | None = None) -> None:
            if name.startswith("reload"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipes.export(run, arm="lora", merge=True, prompts=prompts, progress=Interrupting())
    assert list((run / "export").iterdir()) == []


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    dead, alive, other = (
        tmp_path / f".partial-{number}-{name}"
        for number, name in ((2**22 + 1, "mine"), (os.getpid(), "mine"), (2**22 + 1, "other"))
    )
    for path in (dead, alive, other):
        path.mkdir()
        (path / "model.safetensors").touch()
    exporting._remove_leftovers(tmp_path / "mine")
    assert sorted(tmp_path.iterdir()) == sorted([alive, other])
