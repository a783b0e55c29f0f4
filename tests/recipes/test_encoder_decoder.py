"""An encoder-decoder from task.yaml to verdict, answers, server and export."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from metier import recipes
from metier.errors import ConfigError, ModelError
from metier.evaluation.proof import PROOF
from metier.progress import Silent
from metier.recipes import encoder_decoder, making
from metier.recipes.answering import Specialist
from metier.recipes.experiment import read_verdict
from metier.recipes.workbench import open_workbench, read_task
from metier.task import Arm
from tests.recipes.conftest import QUICK, rows, write_task
from tests.recipes.test_tuned_kinds import opened, tuned
from tests.seq2seq_bases import write_seq2seq

ARMS = ["prompt", "rag", "prompt/likelihood", "lora", "full"]
TRAINING = QUICK | {
    "seeds": [0],
    "epochs": 8,
    "batch_size": 4,
    "learning_rate": 0.003,
    "patience": 0,
    "rehearsal": 1,
}


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"{row['text']} {row['label']}" for row in rows()]
    return write_seq2seq(tmp_path_factory.mktemp("base"), "T5-1.1", texts, dropout_rate=0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    directory = tmp_path_factory.mktemp("task")
    task = write_task(directory, base, arms=ARMS, training=TRAINING)
    said = Said()
    recipes.run(task, directory / "run", progress=said)
    (directory / "said").write_text("\n".join(said.lines))
    return directory


def test_a_run_ends_in_a_verdict_that_claims_nothing_of_what_was_forgotten(finished: Path) -> None:
    verdict = read_verdict(finished / "run")
    assert [arm.arm for arm in verdict.arms] == ARMS
    scores = {arm.arm: arm.score.mean for arm in verdict.arms}
    assert scores["full"] > 0.8 > 0.5 > scores["prompt"]
    assert verdict.decision == "ship", "else nothing would be said of what it forgot"
    for arm in verdict.arms:
        assert not arm.forgetting
        assert (encoder_decoder.UNMEASURED in arm.notes) == arm.tuned
    said = "\n".join([verdict.headline, *verdict.reasons]).lower()
    assert "what it forgot was not measured" in said
    assert "nothing forgotten" not in said
    assert not list((finished / "run").glob("rehearsal-*"))
    assert "rehearsal is left out" in (finished / "said").read_text()


def test_the_sample_that_is_shown_ends_the_prompt(finished: Path) -> None:
    assert "### Answer:" not in (finished / "said").read_text()
    assert "happy</s>⟦" in (finished / "said").read_text()


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_what_is_predicted_is_what_transformers_writes(
    finished: Path, base: Path, tmp_path: Path, arm: str
) -> None:
    """The files of the arm, read by the library alone, answer the texts of the user's file."""
    asked = tmp_path / "asked.jsonl"
    texts = [row["text"] for row in rows()][::9]
    asked.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = recipes.predict(finished / "run", asked, arm=arm)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    (made,) = (finished / "run").glob(f"arm-{arm}-seed0-*")
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(
        base if arm == "lora" else made, dtype=torch.float32
    )
    if arm == "lora":
        plain = PeftModel.from_pretrained(plain, made)
    plain, tokenizer = plain.eval(), AutoTokenizer.from_pretrained(base)
    for line, text in zip(found, texts, strict=True):
        ids = plain.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6)[0]
        assert line["output"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert line["finished"]


@pytest.mark.parametrize("name", ["few-shot", "lora+rag"])
def test_an_arm_that_looks_up_is_made_and_built_again(
    base: Path, tmp_path: Path, name: str
) -> None:
    bench = opened(tmp_path, base, training=TRAINING | {"epochs": 1, "batch_size": 32})
    arm, out = Arm.of(name), tmp_path / "made"
    if arm.tuned:
        tuned(bench, arm, out)
    else:
        out.mkdir()
        making.choose_phrasing(bench, arm, out, Silent())
    built = making.build(bench, arm, out)
    chats = [row.prompt for row in bench.parts.validation[:3]]
    answers = built.generator.generate(chats)
    bare = [len(built.engine.renderer.prompt(chat)) for chat in chats] if built.engine else []
    assert all(a.prompt_tokens > 2 * n for a, n in zip(answers, bare, strict=True))
    assert making.build(bench, arm, out).generator.generate(chats) == answers


def test_what_is_streamed_is_what_is_predicted(finished: Path) -> None:
    specialist = recipes.specialist(finished / "run", "lora")
    chat = [{"role": "user", "content": next(rows())["text"]}]
    (expected,) = specialist.generator.generate([chat])
    assert "".join(specialist.stream(chat)) == expected.text


@pytest.mark.parametrize(("arm", "merge"), [("lora", False), ("lora", True), ("full", False)])
def test_an_export_is_proven(finished: Path, tmp_path: Path, arm: str, merge: bool) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in [*rows()][::20]))
    out = recipes.export(finished / "run", arm, tmp_path / "out", merge, asked)
    proof = json.loads((out / PROOF).read_text())
    if merge or arm == "full":  # for programs that go by the config
        config = json.loads((out / "config.json").read_text())
        assert_the_card_asks_it(out, recipes.specialist(finished / "run", arm))
        assert (config["tie_word_embeddings"], config["decoder_start_token_id"]) == (False, 0)
    assert {form["name"] for form in proof["forms"]} >= {"reloaded", "served"}
    for form in proof["forms"]:
        assert form["same"] == len(proof["prompts"])


def assert_the_card_asks_it(directory: Path, specialist: Specialist) -> None:
    """The code in the README, run in the directory, says what the arm says."""
    text = next(rows())["text"]
    code = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    said = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(said):
        exec(code.replace('"..."', repr(text)), {})
    (expected,) = specialist.generator.generate([[{"role": "user", "content": text}]])
    assert said.getvalue().strip() == expected.text != ""


def test_a_plan_counts_it(base: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path, base, arms=["prompt", "lora", "full"], training=TRAINING)
    plan = recipes.plan(task)
    assert [arm.arm for arm in plan.arms] == ["prompt", "lora", "full"]
    assert all(arm.minutes > 0 and arm.memory > 0 for arm in plan.arms)


REFUSED = {
    "lora/head": {},
    "full/head": {},
    "prompt-tuning": {},
    "prefix-tuning": {},
    "lora": {"layers": [0]},
    "full": {"added_tokens": ["<x>"]},
}


@pytest.mark.parametrize(("arm", "settings"), REFUSED.items())
@pytest.mark.parametrize("command", ["run", "train", "plan"])
def test_what_needs_a_causal_base_is_refused_before_anything_is_loaded(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm: str,
    settings: dict[str, Any],
    command: str,
) -> None:
    monkeypatch.setattr("metier.model.load._model", lambda *_: pytest.fail("a base was loaded"))
    training = {**TRAINING, **settings}
    task = write_task(tmp_path, base, arms=["prompt", arm], training=training)
    commands = {
        "train": lambda: recipes.train(task, arm, tmp_path / "run"),
        "run": lambda: recipes.run(task, tmp_path / "run"),
        "plan": lambda: recipes.plan(task),
    }
    with pytest.raises(ConfigError, match="is an encoder-decoder") as caught:
        commands[command]()
    assert "choose a causal" in caught.value.remedy
    assert arm in caught.value.place or next(iter(settings), "") in caught.value.place


def test_control_what_is_not_refused_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LoadedError(Exception):
        pass

    def load(*_: Any) -> None:
        raise LoadedError

    monkeypatch.setattr("metier.model.load._model", load)
    with pytest.raises(LoadedError):
        recipes.plan(write_task(tmp_path, base, arms=["lora"], training=TRAINING))


def test_going_on_with_pre_training_is_refused(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "pretrain.yaml"
    source = "{name: a, files: [a.txt], held_out: 0.1}"
    config.write_text(f"name: x\nbase: {base}\ntokens: 1000\nsources: [{source}]\n")
    with pytest.raises(ModelError, match="encoder-decoder"):
        recipes.pretrain(config, tmp_path / "out")


def test_only_the_bases_that_are_encoder_decoders_are_not_measured(
    base: Path, stories260k: Path, tmp_path: Path
) -> None:
    task = write_task(tmp_path, base, arms=["prompt", "lora"])
    bench = open_workbench(read_task(task), tmp_path)
    assert not encoder_decoder.may_forget(bench, Arm.of("lora"))
    other = Arm(method="lora", base=str(stories260k))
    assert encoder_decoder.may_forget(bench, other)
    assert making.base_name(bench, other) == str(stories260k)
