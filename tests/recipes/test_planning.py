"""Estimates against sums worked out from the task's own rows, under speeds that are given."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metier import recipes
from metier.errors import BudgetError, ConfigError
from metier.model.load import load_base
from metier.model.memory import SLACK, give_back, resident
from metier.progress import Silent
from metier.recipes import making, planning, speeds
from metier.recipes.planning import ArmPlan, Plan
from metier.recipes.speeds import Speed
from metier.recipes.workbench import Workbench, open_workbench, read_task
from metier.records import Example
from metier.text.template import Renderer
from metier.training import classify, sft
from metier.training.batches import Batch
from tests.recipes.conftest import write_task

BASE = Speed(read=1e4, write=1e3, alone=100, score=1e9, answering=100)
LORA = Speed(
    read=5e3, write=500, alone=50, score=1e9, answering=200, train=2e3, rehearse=0.03, training=300
)  # fmt: skip
FULL = replace(BASE, train=1e3, rehearse=0.05, training=900)
SPEEDS = {"base": BASE, "lora": LORA, "full": FULL}
ARMS = ["prompt", "prompt/likelihood", "classical", "lora", "lora/head", "full"]
# The warm-up and fifty requests that show the latency, as they are quick here.
LATENCY = 51


class Told(Silent):
    """What a person is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def bench(tmp_path: Path, stories260k: Path) -> Workbench:
    return open_workbench(read_task(write_task(tmp_path, stories260k, arms=ARMS)), tmp_path)


@pytest.fixture
def measured(
    bench: Workbench, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Speed]:
    """The speeds that planning finds: a test may change them."""
    found = dict(SPEEDS)
    base = load_base(str(stories260k))
    engine = making.make_engine(bench, base)
    monkeypatch.setattr(speeds, "measure", lambda *_: (dict.fromkeys(SPEEDS, engine), found))
    return found


def seconds(bench: Workbench, made: tuple[str, ...] = ()) -> dict[str, float]:
    found = planning.plan(bench, Silent(), made)
    assert found.minutes == pytest.approx(sum(arm.minutes for arm in found.arms))
    assert found.memory == max(arm.memory for arm in found.arms)
    return {arm.arm: arm.minutes * 60 for arm in found.arms}


def lengths(bench: Workbench, stories260k: Path) -> tuple[float, float]:
    """Mean tokens of the bare prompt and of the answer, over the sampled validation rows."""
    renderer = Renderer(load_base(str(stories260k)).tokenizer, bench.task.template)
    rows = bench.parts.validation[:24]
    prompts = [len(renderer.prompt(row.prompt)) for row in rows]
    whole = [len(renderer.example(row.messages).ids) for row in rows]
    return sum(prompts) / len(rows), (sum(whole) - sum(prompts)) / len(rows)


def in_training(bench: Workbench, stories260k: Path, *, answers: bool) -> float:
    """Tokens of one pass; validation is read only, a third of the work."""
    renderer = Renderer(load_base(str(stories260k)).tokenizer, bench.task.template)

    def tokens(rows: Sequence[Example]) -> int:
        if answers:
            return sum(len(renderer.example(row.messages).ids) for row in rows)
        return sum(len(renderer.prompt(row.prompt)) for row in rows)

    return tokens(bench.parts.train) + tokens(bench.parts.validation) / 3


def test_a_tuned_text_arm_trains_answers_and_shows_its_latency(
    bench: Workbench, stories260k: Path, measured: dict[str, Speed]
) -> None:
    prompt, answer = lengths(bench, stories260k)
    parts = bench.parts
    training = 2 * 2 * in_training(bench, stories260k, answers=True) / 2e3
    answering = 2 * (len(parts.validation) + len(parts.test)) * (prompt / 5e3 + answer / 500)
    alone = LATENCY * (prompt / 5e3 + answer / 50)
    assert seconds(bench)["lora"] == pytest.approx(training + answering + alone, rel=1e-3)


def test_a_head_reads_once_and_writes_nothing(
    bench: Workbench, stories260k: Path, measured: dict[str, Speed]
) -> None:
    prompt, _ = lengths(bench, stories260k)
    parts = bench.parts
    rows = 2 * (len(parts.validation) + len(parts.test)) + LATENCY
    passes = classify.READING_PASSES + 2
    training = 2 * passes * in_training(bench, stories260k, answers=False) / 2e3
    assert seconds(bench)["lora/head"] == pytest.approx(training + rows * prompt / 5e3)
    measured["lora"] = replace(LORA, write=1e-9, alone=1e-9, score=1e-9)
    assert seconds(bench)["lora/head"] == pytest.approx(training + rows * prompt / 5e3)


def test_latency_is_counted_one_request_at_a_time(
    bench: Workbench, measured: dict[str, Speed]
) -> None:
    before = seconds(bench)
    measured["base"] = replace(BASE, alone=200)
    after = seconds(bench)
    written = bench.task.max_new_tokens
    assert written is not None
    assert before["prompt"] - after["prompt"] == pytest.approx(LATENCY * written * (0.01 - 0.005))
    assert after["prompt/likelihood"] == before["prompt/likelihood"]


def test_full_tuning_has_a_step_of_its_own(bench: Workbench, measured: dict[str, Speed]) -> None:
    before = seconds(bench)
    measured["full"] = replace(FULL, train=FULL.train / 2)
    after = seconds(bench)
    assert after["full"] > 1.5 * before["full"]
    assert {arm: after[arm] for arm in before if arm != "full"} == {
        arm: before[arm] for arm in before if arm != "full"
    }


def test_what_was_forgotten_is_read_by_the_base_once_and_by_every_seed(
    bench: Workbench, measured: dict[str, Speed]
) -> None:
    before = seconds(bench)
    measured |= {name: replace(speed, score=10.0) for name, speed in SPEEDS.items()}
    extra = {arm: value - before[arm] for arm, value in seconds(bench).items()}
    once = extra["full"] / 2  # two seeds
    assert once > 100
    assert extra["lora"] == pytest.approx(3 * once)
    assert extra == pytest.approx(dict.fromkeys(ARMS, 0.0) | {k: extra[k] for k in ("lora", "full")})  # fmt: skip  # noqa: E501


def test_what_is_rehearsed_is_written_once_and_read_in_every_step(
    bench: Workbench, measured: dict[str, Speed]
) -> None:
    before = seconds(bench)
    training = bench.task.training.model_copy(update={"rehearsal": 1.0})
    more = replace(bench, task=bench.task.model_copy(update={"training": training}))
    extra = {arm: value - before[arm] for arm, value in seconds(more).items()}
    steps = 2 * 2 * math.ceil(len(bench.parts.train) / 16)  # seeds, passes
    written = 512 * 64 / BASE.write
    assert extra["lora"] == pytest.approx(steps * LORA.rehearse + written)
    assert extra["full"] == pytest.approx(steps * FULL.rehearse)
    assert extra == pytest.approx(dict.fromkeys(ARMS, 0.0) | {k: extra[k] for k in ("lora", "full")})  # fmt: skip  # noqa: E501


def test_one_training_writes_as_much_as_all(bench: Workbench, measured: dict[str, Speed]) -> None:
    """What the base writes is the same for one seed and for three."""
    found = {}
    for weight in (0.0, 1.0):
        training = bench.task.training.model_copy(update={"rehearsal": weight})
        task = bench.task.model_copy(update={"training": training, "arms": ("lora",)})
        found[weight] = planning.plan_training(replace(bench, task=task), Silent()).minutes * 60
    steps = 2 * math.ceil(len(bench.parts.train) / 16)
    written = 512 * 64 / BASE.write
    assert found[1.0] - found[0.0] == pytest.approx(steps * LORA.rehearse + written)


def test_of_what_is_made_only_the_answers_count(
    bench: Workbench, measured: dict[str, Speed], stories260k: Path
) -> None:
    everything, rest = seconds(bench), seconds(bench, made=("lora", "classical"))
    trained = 2 * 2 * in_training(bench, stories260k, answers=True) / 2e3
    assert everything["lora"] - rest["lora"] == pytest.approx(trained)
    assert rest["classical"] == 0
    assert rest["full"] == everything["full"]
    memory = {arm.arm: arm.memory for arm in planning.plan(bench, Silent(), ("lora",)).arms}
    assert (memory["lora"], memory["full"]) == (200, 900)


def test_every_base_has_its_arms(
    tmp_path: Path, stories260k: Path, measured: dict[str, Speed]
) -> None:
    shutil.copytree(stories260k, tmp_path / "other")
    file = write_task(tmp_path, stories260k)
    task = read_task(file, [f"base=[other, '{stories260k}']"])
    bench = open_workbench(task, tmp_path)
    names = [arm.arm for arm in planning.plan(bench, Silent()).arms]
    over = [
        f"{method}@{base}" for base in task.bases() for method in ("prompt", "lora", "lora/head")
    ]
    assert sorted(names) == sorted(["classical", *over])


def test_a_real_estimate_knows_what_needs_how_much_memory(
    tmp_path: Path, stories260k: Path
) -> None:
    task = read_task(
        write_task(tmp_path, stories260k, arms=["classical", "prompt", "lora", "full"])
    )
    found = planning.plan(open_workbench(task, tmp_path), Silent())
    memory = {arm.arm: arm.memory for arm in found.arms}
    assert memory["classical"] <= memory["prompt"] <= memory["full"]
    # Weight, gradient and two moments of 260,032 parameters; the rest is this process.
    assert memory["full"] - memory["classical"] >= 16 * 260_032
    assert all(arm.minutes > 0 for arm in found.arms)


def test_keys_and_values_of_a_full_batch_are_counted(bench: Workbench, stories260k: Path) -> None:
    base = load_base(str(stories260k))
    engine = making.make_engine(bench, base)
    config = base.model.config.get_text_config()
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    size = base.model.dtype.itemsize
    expected = 2 * config.num_hidden_layers * heads * size * engine.batch_tokens
    assert speeds._cache_bytes(engine) == expected


@pytest.mark.parametrize("rate", [1e9, 1.0])
def test_training_memory_is_that_of_a_whole_micro_batch_of_the_longest_rows(rate: float) -> None:
    """A loss that holds a megabyte for each row; at a low rate one row is tried, and scaled up."""
    tried: list[int] = []

    def loss(batch: Batch) -> torch.Tensor:
        tried.append(len(batch.lengths))
        held = torch.ones(len(batch.lengths), 1 << 18, requires_grad=True)
        time.sleep(0.2)  # memory is looked at twenty times a second
        return held.sum()

    give_back()
    before = resident()
    rows = sft.MICRO_TOKENS // 64
    found = speeds._training_memory(loss, rate, 64)
    assert tried == [rows if rate > 1 else 1]
    assert 0.8 * rows * 2**20 < found - before - SLACK < 3 * rows * 2**20


def test_a_person_sees_what_was_left_out_and_what_is_odd(
    bench: Workbench, measured: dict[str, Speed]
) -> None:
    parts = replace(bench.parts, removed={"train-duplicate-of-test": 1234}, warnings=("few rows",))
    told = Told()
    planning.plan(replace(bench, parts=parts, removed_passages={"passage-with-answer": 0}), told)
    sizes = f"train {len(parts.train)}, validation {len(parts.validation)}, test {len(parts.test)}"
    assert told.lines == [
        f"rows: {sizes}",
        "left out: train-duplicate-of-test 1,234",
        "warning: few rows",
    ]


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    arms = tuple(
        ArmPlan(arm=name, minutes=m, memory=1) for name, m in (("prompt", 5), ("lora", 70))
    )
    plan = Plan(arms=arms, minutes=75, memory=1)
    planning.hold(plan, 75)
    with pytest.raises(BudgetError) as caught:
        planning.hold(plan, 60)
    cause = caught.value.cause.replace("\N{NO-BREAK SPACE}", " ")
    assert cause == "this would take about 1 h 15 min, the budget is 1 h; lora alone takes 1 h 10 min"  # fmt: skip  # noqa: E501
    assert "--budget 90), leave out lora" in caught.value.remedy


def test_one_training_is_held_to_the_budget(tmp_path: Path, stories260k: Path) -> None:
    task = write_task(tmp_path, stories260k)
    with pytest.raises(BudgetError, match="would take about") as caught:
        recipes.train(task, "lora", tmp_path / "run", budget=1e-6)
    assert "leave out" not in caught.value.remedy
    with pytest.raises(BudgetError):
        recipes.train(task, "lora", tmp_path / "run", ["budget=0.000001"])
    with pytest.raises(ConfigError, match="is not trained"):
        recipes.train(task, "prompt", tmp_path / "run", budget=1e-6)
    assert not (tmp_path / "run").exists()
    assert recipes.train(task, "lora", tmp_path / "run").is_dir()


def test_one_training_counts_one_seed(bench: Workbench, measured: dict[str, Speed]) -> None:
    alone = replace(bench, task=bench.task.model_copy(update={"arms": ("lora",)}))
    making_it = seconds(alone)["lora"] - seconds(alone, made=("lora",))["lora"]
    found = planning.plan_training(alone, Silent())
    assert found.minutes * 60 == pytest.approx(making_it / 2)
