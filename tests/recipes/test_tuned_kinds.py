"""Every way of tuning from task.yaml to answers: made, built again, served."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from metier import recipes
from metier.errors import ConfigError, MissingExtraError, TrainingError
from metier.model import quantised
from metier.model.device import compute_dtype
from metier.model.load import load_base
from metier.progress import Silent
from metier.recipes import making, planning, tuning
from metier.recipes.experiment import read_verdict
from metier.recipes.workbench import Workbench, open_workbench, read_task
from metier.task import TUNINGS, Arm, Task
from metier.training import sft
from tests.recipes.conftest import write_task
from tests.training.families import write_base

KINDS = [name for name, kind in TUNINGS.items() if not kind.four_bit]
TRAINING = {"epochs": 1, "seeds": [0], "max_length": 128, "rehearsal": 0, "virtual_tokens": 6}
HEADS = ["dora/head", "ia3/head", "prompt-tuning/head", "prefix-tuning/head"]


def opened(directory: Path, base: Path, **changes: Any) -> Workbench:
    task = write_task(directory, base, **{"training": TRAINING, **changes})
    return open_workbench(read_task(task), directory)


def tuned(bench: Workbench, arm: Arm, out: Path) -> Path:
    out.mkdir()
    tuning.tune(bench, arm, 0, None, Silent(), out, out.with_suffix(".scratch"))
    return out


@pytest.mark.parametrize("name", [*KINDS, *HEADS, "dora+rag", "prefix-tuning+rag"])
def test_an_arm_is_made_and_built_again(tmp_path: Path, stories260k: Path, name: str) -> None:
    bench, arm = opened(tmp_path, stories260k), Arm.of(name)
    out = tuned(bench, arm, tmp_path / "made")
    built = making.build(bench, arm, out)
    chats = [row.prompt for row in bench.parts.validation]
    answers = built.generator.generate(chats)
    assert not any("context" in note for note in built.notes()), "every request fits"
    labels = {answer.text for answer in answers}
    if arm.mode == "head":
        assert labels <= set(bench.labels)
        return
    assert built.engine is not None
    again = making.build(bench, arm, out).generator.generate(chats[:1])
    assert again == built.generator.generate(chats[:1])
    assert any(labels)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT leaves them out
def test_what_a_prompt_tuned_arm_answers_is_what_peft_answers(
    tmp_path: Path, stories260k: Path
) -> None:
    bench, arm = opened(tmp_path, stories260k), Arm.of("prompt-tuning")
    out = tuned(bench, arm, tmp_path / "made")
    engine = making.build(bench, arm, out).engine
    assert engine is not None
    assert engine.context == 512 - 6
    rounded = engine.model.dtype  # both round the weights alike, then count in float32
    engine.model.float()
    theirs = AutoModelForCausalLM.from_pretrained(stories260k, dtype=rounded)
    theirs = PeftModel.from_pretrained(theirs, out).float().eval()
    for row in bench.parts.validation[:3]:
        prompt = engine.renderer.prompt(row.prompt)
        written = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=engine.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(engine.renderer.stop_ids),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert engine.generate_ids([prompt]) == [written]


def test_a_run_compares_ways_of_tuning_and_serves_each(tmp_path: Path, stories260k: Path) -> None:
    arms = ["prompt", "prompt-tuning", "ia3/head"]
    split = {"near_duplicate": 1.0, "max_validation": 6, "max_test": 6}
    task = write_task(tmp_path, stories260k, arms=arms, training=TRAINING, split=split)
    verdict = recipes.run(task, tmp_path / "run")
    assert {arm.arm for arm in verdict.arms} == set(arms)
    assert read_verdict(tmp_path / "run") == verdict
    (tmp_path / "new.jsonl").write_text('{"text": "Tom saw a big dog"}\n')
    for arm in arms[1:]:
        out = recipes.predict(
            tmp_path / "run", tmp_path / "new.jsonl", tmp_path / f"{arm[:3]}.jsonl", arm
        )
        (line,) = out.read_text().splitlines()
        assert json.loads(line)["finished"] in (True, False)


def write_tagged(directory: Path, base: Path, **training: Any) -> Path:
    """A task whose answers are tokens that the base does not have."""
    words = {"<animal>": ("dog", "cat", "bird"), "<food>": ("cake", "soup", "milk")}
    rows = [
        {"text": f"{name} saw a {word} number {number}", "label": label}
        for label, found in words.items()
        for word in found
        for number, name in enumerate(("Lily", "Tom", "Ben", "Mia", "Sam") * 2)
    ]
    task = write_task(
        directory,
        base,
        name="tags",
        arms=["prompt", "lora"],
        split={"near_duplicate": 1.0},
        training={**TRAINING, "added_tokens": list(words), **training},
    )
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task


def test_new_tokens_are_learned_kept_and_served(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "Llama")
    task = write_tagged(tmp_path, base, epochs=30, batch_size=4, patience=0)
    verdict = recipes.run(task, tmp_path / "run")
    lora = next(arm for arm in verdict.arms if arm.arm == "lora")
    assert lora.completion_tokens == 2, "a new token and the end"
    bench = open_workbench(read_task(task), tmp_path)
    specialist = recipes.specialist(tmp_path / "run", "lora")
    answers = specialist.generator.generate([row.prompt for row in bench.parts.train])
    assert {answer.text for answer in answers} == {"<animal>", "<food>"}
    assert specialist.engine is not None
    assert specialist.engine.renderer.tokenizer.vocab_size == 8194
    (made,) = (tmp_path / "run").glob("arm-lora-seed0-*")
    assert (made / "tokenizer.json").is_file()


def test_a_token_that_is_there_already_is_refused_before_training(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "Llama")
    task = write_tagged(tmp_path, base)
    with pytest.raises(ConfigError, match="'the' is a token of"):
        recipes.run(task, tmp_path / "run", ["training.added_tokens=[the]"])
    assert not (tmp_path / "run").exists()


def test_rows_leave_room_for_virtual_tokens(tmp_path: Path, stories260k: Path) -> None:
    """A row that fills the base's context fits a LoRA, and no prefix."""
    training = {**TRAINING, "max_length": 512, "virtual_tokens": 40}
    bench = opened(tmp_path, stories260k, training=training)
    first, *rest = bench.parts.train
    long = {"role": "user", "content": "a big dog and " * 98}
    parts = dataclasses.replace(
        bench.parts,
        train=(dataclasses.replace(first, messages=(long, first.messages[-1])), *rest),
    )
    bench = dataclasses.replace(bench, parts=parts)
    lengths = []
    for name in ("lora", "prefix-tuning"):
        base, model = making.load_trainable(bench, Arm.of(name), 0)
        engine = making.make_engine(bench, base, model)
        lengths.append(engine.context)
        if name == "lora":
            rows, _ = making.prepare(bench, Arm.of(name), engine)
            assert 472 < max(len(row.ids) for row in rows.rows) <= 512
        else:
            with pytest.raises(TrainingError, match="the limit is 472"):
                making.prepare(bench, Arm.of(name), engine)
    assert lengths == [512, 472]


def test_the_plan_measures_each_way_of_tuning(tmp_path: Path, stories260k: Path) -> None:
    arms = ["prompt", "dora", "prefix-tuning", "full"]
    bench = opened(tmp_path, stories260k, arms=arms, training={**TRAINING, "layers": []})
    found = planning._Base(bench, str(stories260k), bench.task.chosen_arms())
    assert found._speeds.keys() == {"base", "dora", "prefix-tuning", "full"}
    assert found._kept["prefix-tuning"].context == 512 - 6
    assert found._kept["dora"].context == 512
    plan = planning.plan(bench, Silent())
    assert {arm.arm for arm in plan.arms} == set(arms)
    assert all(arm.minutes > 0 for arm in plan.arms)


def test_of_a_whole_model_the_chosen_layers_alone_are_changed(
    tmp_path: Path, stories260k: Path
) -> None:
    bench = opened(tmp_path, stories260k, training={**TRAINING, "layers": [-1]})
    out = tuned(bench, Arm.of("full"), tmp_path / "made")
    after = load_file(out / "model.safetensors")
    before = load_base(str(stories260k)).model.to(compute_dtype(torch.device("cpu"))).state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("model.layers.4.") for name in changed)


@pytest.mark.parametrize(
    ("name", "decay"), [("lora", 0.01), ("full", 0.01), ("pissa", 0), ("ia3", 0)]
)
def test_weights_decay_only_where_that_leads_back_to_the_base(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch, name: str, decay: float
) -> None:
    seen: list[tuple[float, float]] = []
    fit = sft.fit

    def spy(*given: Any, **named: Any) -> Any:
        seen.append((given[4].weight_decay, named["learning_rate"]))
        return fit(*given, **named)

    monkeypatch.setattr(sft, "fit", spy)
    tuned(opened(tmp_path, stories260k), Arm.of(name), tmp_path / "made")
    rate = 5e-4 * (64 / 2000) ** -0.78 * TUNINGS[name].rate
    assert seen == [(decay, pytest.approx(rate))]


def test_four_bits_are_refused_before_any_work(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, stories260k, arms=["prompt", "qlora"])
    (tmp_path / "rows.jsonl").unlink()  # not even the data is read
    for start in (
        lambda: recipes.run(task, tmp_path / "run"),
        lambda: recipes.train(task, "qlora", tmp_path / "run"),
        lambda: recipes.plan(task),
    ):
        with pytest.raises(ConfigError, match="takes a CUDA device; this machine has cpu"):
            start()
    monkeypatch.setattr(quantised, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'metier\[qlora\]'"):
        recipes.run(task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def values(**changes: Any) -> dict[str, Any]:
    return {
        "name": "t",
        "kind": "classification",
        "data": {"file": "rows.jsonl"},
        "arms": ["prompt", "lora"],
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"arms": ["prefix-tuning"], "training": {"layers": [0]}}, "cannot have training.layers"),
        ({"arms": ["ia3"], "training": {"added_tokens": ["<a>"]}}, "cannot have training.added"),
        (
            {"arms": ["full"], "training": {"added_tokens": ["<a>"], "layers": [0]}},
            "would not be learned",
        ),
        ({"training": {"added_tokens": ["a b"]}}, "is no token"),
        ({"training": {"added_tokens": [""]}}, "is no token"),
        ({"training": {"added_tokens": ["<a>", "<a>"]}}, "stands twice"),
        ({"training": {"virtual_tokens": 0}}, "greater than 0"),
        ({"arms": ["lora+rag/head"]}, "can carry a head"),
        ({"arms": ["prompt/head"]}, "can carry a head"),
        ({"arms": ["classical+rag"]}, "is no arm"),
        ({"arms": ["lora", "lora/likelihood"]}, "likelihood goes with"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        Task.parse(values(**changes), "task.yaml")


def test_what_goes_together_is_taken() -> None:
    layers = {"training": {"layers": [-1], "added_tokens": ["<a>"]}}
    Task.parse(values(arms=["lora", "dora", "pissa", "rslora", "qlora"], **layers), "task.yaml")
    arms = [f"{kind}{end}" for kind in TUNINGS for end in ("", "/head", "+rag")]
    task = Task.parse(values(arms=arms), "task.yaml")
    assert all(arm.tuned for arm in task.chosen_arms())
    assert sum(arm.retrieves for arm in task.chosen_arms()) == len(TUNINGS)
