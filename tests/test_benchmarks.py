"""The harness of benchmarks/train.py: its statistics, its gates with controls, its files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train
from training.ceiling import lora_operations
from training.fine_tuning import TUNED

from metier.model.adapters import add_adapter
from metier.model.load import load_base
from metier.task import Lora, Training
from metier.text.tokenizer import Tokenizer
from metier.training import sft
from metier.training.batches import Row
from training import bench, figures, gates, material, ours, processes

STEPS = 6
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


# Ratios.


def rounds_of(generator: np.random.Generator, rounds: int, steps: int, ratio: float) -> Any:
    """Pairs whose steps and rounds vary, with a known ratio."""
    drift = np.exp(generator.normal(0, 0.2, (rounds, 1)))
    both = drift * np.exp(generator.normal(0, 0.3, steps))
    mine, other = (both * np.exp(generator.normal(0, 0.05, (rounds, steps))) for _ in range(2))
    return list(zip((ratio * mine).tolist(), other.tolist(), strict=True))


def test_a_constant_ratio_has_no_interval() -> None:
    found = figures.ratio_of([([6.0, 6.0], [2.0, 2.0])] * 3)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


def test_what_is_measured_once_reaches_no_goal() -> None:
    found = figures.ratio_of([([6.0], [2.0])])
    assert found == figures.Ratio(pytest.approx(3), None, None)
    assert not figures.Goal(2).holds(found)
    row = figures.row("start", "TRL", "speed", figures.Goal(2), found)
    assert "3.00 (measured once) | at least 2 | **not reached**" in figures.table([row])


def test_the_interval_of_single_figures_is_the_normal_one() -> None:
    logs = np.random.default_rng(1).normal(math.log(2), 0.1, 60)
    found = figures.ratio_of([([float(np.exp(log))], [1.0]) for log in logs])
    half = 1.96 * logs.std() / math.sqrt(len(logs))
    assert math.log(found.value) == pytest.approx(logs.mean())
    assert math.log(found.low) == pytest.approx(logs.mean() - half, abs=0.1 * half)
    assert math.log(found.high) == pytest.approx(logs.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_true_ratio() -> None:
    generator = np.random.default_rng(2)
    found = [figures.ratio_of(rounds_of(generator, 6, 10, 1.5)) for _ in range(60)]
    assert sum(one.low <= 1.5 <= one.high for one in found) >= 52
    assert sum(one.low <= 1.7 <= one.high for one in found) < 10


def test_steps_are_paired() -> None:
    """A step that is slow on both sides is no uncertainty."""
    pairs = rounds_of(np.random.default_rng(3), 5, 30, 2.0)
    shuffled = [(mine, other[::-1]) for mine, other in pairs]
    paired, unpaired = figures.ratio_of(pairs), figures.ratio_of(shuffled)
    assert paired.high / paired.low < unpaired.high / unpaired.low


@pytest.mark.parametrize("pairs", [[], [([], [])], [([1.0], [1.0, 2.0])]])
def test_what_cannot_be_paired_is_refused(pairs: Any) -> None:
    with pytest.raises(ValueError, match=r"rounds|inhomogeneous"):
        figures.ratio_of(pairs)


def test_a_goal_is_reached_with_the_whole_interval() -> None:
    goal, memory = figures.Goal(3, 4), figures.Goal(0.5, at_most=True)
    assert goal.holds(figures.Ratio(3.5, 3.01, 4.2))
    assert not goal.holds(figures.Ratio(3.5, 2.99, 4.2))
    assert memory.holds(figures.Ratio(0.4, 0.3, 0.49))
    assert not memory.holds(figures.Ratio(0.4, 0.3, 0.51))


def test_a_row_has_the_shape_of_the_project() -> None:
    shape = {"scenario", "against", "figure", "ratio", "low", "high", "goal", "holds"}
    ratio = figures.Ratio(3.5, 3.1, 4.2)
    found = figures.row("LoRA", "TRL tuned", "speed", figures.Goal(3, 4), ratio)
    refused = figures.row("LoRA", "TRL tuned", "speed", figures.Goal(3, 4), None)
    assert set(found) == set(refused) == shape
    assert found["holds"] is True
    assert refused["holds"] is False
    assert "3.50 (3.10 to 4.20) | at least 3, stretch 4 | reached" in figures.table([found])
    assert "not comparable | at least 3, stretch 4 | **not reached**" in figures.table([refused])


# Gates.


def run(losses: list[float], **changes: int) -> dict[str, Any]:
    same = {"tokens": 100, "trained": 60, "contents": 123} | changes
    return {"losses": losses} | {name: [value] * len(losses) for name, value in same.items()}


CURVE = [5.0, 4.5, 4.2]


def test_the_same_training_passes() -> None:
    band = [run([5.0, 4.6, 4.1])]
    assert not gates.same_training([run([5.01, 4.59, 4.11])], [run(CURVE)], band)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (run([5.03, 4.5, 4.2]), "first loss differs"),
        (run([5.0, 4.5, 4.23]), "step 2: loss 4.23"),
        (run([5.0, math.nan, 4.2]), "step 1: loss nan"),
        (run(CURVE, tokens=99), "step 0: the runs' tokens differ (99, 100)"),
        (run(CURVE, trained=61), "step 0: the runs' trained differ (60, 61)"),
        (run(CURVE, contents=4), "step 0: the runs' contents differ (4, 123)"),
        (run(CURVE[:2]), "runs have [2, 3] steps"),
        (run(CURVE) | {"tokens": [100]}, "runs have [1, 3] steps"),
    ],
)
def test_another_training_is_refused(fault: dict[str, Any], said: str) -> None:
    assert said in "; ".join(gates.same_training([run(CURVE), fault], [run(CURVE)], []))


def test_the_first_loss_is_not_excused_by_the_band() -> None:
    found = gates.same_training([run([5.1, 4.5, 4.2])], [run(CURVE)], [run([5.2, 4.5, 4.2])])
    assert found == ["our run 0: first loss differs by 0.1000"]


def test_a_peer_without_result_is_no_victory() -> None:
    assert bench.judged([run(CURVE)], [], []) == ["the peer gave no result"]
    goal = figures.Goal(3)
    found = bench.row("LoRA", "TRL", "speed", goal, [([9.0], [1.0])], ["no result"])
    assert (found["ratio"], found["holds"]) == (None, False)


def test_another_torch_is_refused() -> None:
    runs = [{"versions": {"torch": name}} for name in ("2.13.0", "2.13.0+cpu")]
    assert gates.same_torch(runs) == ["different builds of torch: 2.13.0, 2.13.0+cpu"]
    assert not gates.same_torch(runs[:1])


def test_texts_may_differ_by_ties_only() -> None:
    texts, other = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    assert not gates.same_texts(texts, texts, [])
    assert not gates.same_texts(texts, other, [0.01])
    assert gates.same_texts(texts, other, [0.5]) == ["a text differs by 0.500 nats"]
    assert gates.same_texts(texts, other, []) == [
        "there is not one gap for every text that differs"
    ]
    assert gates.same_texts(texts, texts[:1], []) == ["2 texts of ours, 1 of the peer"]


# Both sides on a tiny model.


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, Any]:
    """A training of a tiny Llama on real rows."""
    work = tmp_path_factory.mktemp("training")
    base, rows = work / "base", work / "rows"
    material.once(base, lambda path: material.write_base(path, data_dir, TINY))
    material.once(rows, lambda path: material.write_rows(path, data_dir, base, STEPS))
    return {
        "kind": "train",
        "method": "lora",
        "base": str(base),
        "rows": str(rows / "rows.json"),
        "steps": STEPS,
        "step_rows": material.STEP_ROWS,
        "seed": 0,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "factors": [sft.cosine(STEPS, 0.05)(step) for step in range(STEPS)],
        "lora": Lora().model_dump(),
        "adapter": str(base / "adapter"),
    }


@pytest.fixture(scope="module")
def peer(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL makes of it, in a process of its own."""
    pytest.importorskip("trl", reason="TRL comes with metier[dev]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "environment", lambda _: Path(sys.executable))
        started = processes.Processes(tmp_path_factory.mktemp("peer"), threads=1)
        return started.peer(spec | {"variant": TUNED})


def test_both_sides_do_the_same_work(spec: dict[str, Any], peer: dict[str, Any]) -> None:
    found = ours.train(spec)
    rows = json.loads(Path(spec["rows"]).read_text("utf-8"))
    assert not gates.same_training([found], [peer], [])
    assert found["tokens"] == [sum(len(rows["ids"][i]) for i in step) for step in rows["steps"]]
    assert all(seconds > 0 for seconds in (*found["seconds"], *peer["seconds"]))
    assert 0 < peer["padding"] < 0.5


def shifted_mask(patch: pytest.MonkeyPatch) -> None:
    read = material.read_rows

    def shifted(file: Path) -> list[Row]:
        return [replace(row, trained=(*row.trained[1:], False)) for row in read(file)]

    patch.setattr(material, "read_rows", shifted)


def all_tokens(patch: pytest.MonkeyPatch) -> None:
    read = material.read_rows

    def whole(file: Path) -> list[Row]:
        return [replace(row, trained=(True,) * len(row.ids)) for row in read(file)]

    patch.setattr(material, "read_rows", whole)


def wrong_mean(patch: pytest.MonkeyPatch) -> None:
    answer_loss = sft.answer_loss

    def scaled(score: Any) -> Callable[[Any], torch.Tensor]:
        loss = answer_loss(score)
        return lambda batch: loss(batch) * (batch.weight / batch.tokens)

    patch.setattr(sft, "answer_loss", scaled)


def other_rows(patch: pytest.MonkeyPatch) -> None:
    read = material.read_rows
    patch.setattr(material, "read_rows", lambda file: read(file)[::-1])


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        (shifted_mask, {"contents", "loss"}),
        (all_tokens, {"trained", "contents", "loss"}),
        (wrong_mean, {"loss"}),
        (other_rows, {"tokens", "trained", "contents", "loss"}),
    ],
)
def test_a_planted_fault_is_refused(
    fault: Callable[[pytest.MonkeyPatch], None],
    seen_in: set[str],
    spec: dict[str, Any],
    peer: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    found = "; ".join(gates.same_training([ours.train(spec)], [peer], []))
    assert {name for name in ("tokens", "trained", "contents", "loss") if name in found} == seen_in


def test_another_learning_rate_leaves_the_band(spec: dict[str, Any], peer: dict[str, Any]) -> None:
    found = gates.same_training([ours.train(spec | {"learning_rate": 3e-2})], [peer], [])
    assert found
    assert not any("first loss" in reason for reason in found)


def test_a_profile_shows_operators(spec: dict[str, Any]) -> None:
    found = ours.train(spec | {"profile": [1, 3], "steps": 3})
    assert len(found["losses"]) == 3
    assert "aten::mm" in found["profile"]


def test_a_process_without_result_is_told(tmp_path: Path) -> None:
    with pytest.raises(processes.NoResultError, match="KeyError: 'no such work'"):
        processes.Processes(tmp_path, 1).ours({"kind": "no such work"})


# What both sides are given.


def test_steps_are_those_that_training_draws() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 9, 40)
    rows = [Row(tuple(range(n)), (False, *(True,) * (n - 1))) for n in lengths]
    rows += rows[:3]  # the same again
    training = Training(epochs=1, batch_size=8)
    steps = material.steps_of(rows, training, seed=5)
    assert sorted(place for step in steps for place in step) == list(range(len(rows)))
    batches = sft.row_batches(rows, training, seed=5)
    for index, step in enumerate(steps):
        drawn = sorted(n for batch in batches.step(index) for n in batch.lengths)
        assert drawn == sorted(len(rows[place].ids) - 1 for place in step)
        assert step == sorted(step)
    assert steps != material.steps_of(rows, training, seed=6)


def test_a_cut_tokenizer_writes_every_text(spec: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(spec["base"])
    text = "Größe: 3 €, “quoted”\n\tand\u3000wide 字"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == TINY["vocab_size"]
    assert tokenizer.eos_id == TINY["vocab_size"] - 1
    assert len(tokenizer.encode("the animal")) < len("the animal") / 1.5


def test_operations_are_those_of_the_products(spec: dict[str, Any]) -> None:
    """Counted by PyTorch while Transformers and PEFT compute a row, head on all tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    base = load_base(spec["base"], dtype=torch.float32)
    base.model.set_attn_implementation("eager")
    model: Any = add_adapter(base.model, "lora", Training(), seed=0)
    length, width = 37, TINY["hidden_size"]
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(length)[None]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    formula = lora_operations(TINY, Lora().rank, [length], length)
    # Eager attention computes the whole square; nothing asks for a gradient of the embeddings.
    attention = 3 * 2 * width * TINY["num_hidden_layers"] * length**2
    first = 2 * length * (width * (64 + 32 + 32) + 3 * width * Lora().rank)
    assert counter.get_total_flops() == formula + attention - first


def test_peak_memory_is_that_of_the_process_alone() -> None:
    held = bytearray(b"x") * (1 << 28)  # which the child must not be charged for
    script = (
        "from training.common import peak_memory as p; a = p(); b = bytearray(b'x') * (1 << 26); "
        "print(a, p())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=train.HERE, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert len(held) > before
    assert after - before >= (1 << 26) * 0.9


# The peer's variants, and the files.


def test_the_fastest_variant_is_found_and_failures_are_told() -> None:
    def measure(variant: dict[str, Any]) -> float:
        if variant["compile"]:
            raise processes.NoResultError("no compiler")
        return float(10 + variant["micro"] - 3 * (variant["attention"] == "sdpa"))

    start = {"micro": 8, "attention": "sdpa", "compile": False}
    choices = {"micro": [4, 16], "attention": ["eager"], "compile": [True]}
    best, tried = bench.search(measure, start, choices)
    assert best == {"micro": 16, "attention": "eager", "compile": False}
    assert [one.get("rate") for one in tried] == [15, 11, 23, 26, None]
    assert tried[-1]["failed"] == "no compiler"


def test_a_scenario_measured_again_takes_the_place_of_its_figures(tmp_path: Path) -> None:
    results, runs = tmp_path / "train.json", tmp_path / "runs.jsonl"

    def keep(name: str, ratio: float) -> None:
        goal = figures.Goal(3)
        outcome = bench.Outcome(
            rows=[figures.row(name, "TRL", "speed", goal, figures.Ratio(ratio, ratio, ratio))],
            gates={"TRL": []},
            runs=[{"side": "TRL", "versions": {"trl": "1"}, "ratio": ratio}],
        )
        train.keep(name, outcome, train.about(bench.QUICK, 1, 0.0), results, runs)

    for name, ratio in (("full", 2.0), ("lora", 4.0), ("full", 5.0)):
        keep(name, ratio)
    found = json.loads(results.read_text("utf-8"))
    assert [(row["scenario"], row["ratio"]) for row in found["rows"]] == [("lora", 4), ("full", 5)]
    assert found["measured"]["full"]["peer_versions"] == {"trl": "1"}
    assert {"processor", "cores", "torch"} <= found["measured"]["full"]["versions"].keys()
    lines = [json.loads(line) for line in runs.read_text("utf-8").splitlines()]
    assert [(line["scenario"], line["ratio"]) for line in lines] == [("lora", 4), ("full", 5)]


def test_the_table_of_training_is_that_of_the_file() -> None:
    assert train.BEGIN + train.table() + train.END in train.PAGE.read_text("utf-8")
