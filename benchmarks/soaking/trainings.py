"""The trainings that are killed: tiny, but by the road that the commands take; and the controls."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import peft  # noqa: F401  # loaded before the fork
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from metier.evaluation.statistics import ratio
from metier.model import checkpoint
from metier.model.load import load_base
from metier.progress import Silent
from metier.recipes import tuning
from metier.recipes.stages import Stages
from metier.recipes.workbench import open_workbench, read_task
from metier.runs import Run
from metier.task import Arm
from metier.text import bpe
from metier.training import pretrain, rehearsal, sft
from metier.training.loop import Loop, Plan, cosine
from metier.training.pretrain_config import PretrainConfig
from soaking.processes import start, wait

WORDS = ("the", "a", "big", "old", "dog", "cat", "bird", "tree", "saw", "liked", "and", "it", "was")
RESULTS = Path(__file__).parent / "results" / "soak.json"
LABELS = ("animal", "place", "thing")
SHAPE = {
    "vocabulary": 300, "hidden": 64, "layers": 2, "heads": 2, "intermediate": 96, "context": 128,
}  # fmt: skip
RECIPE = {
    "name": "tiny",
    "sources": [{"name": "corpus", "files": ["corpus.jsonl"], "held_out": 0.1}],
    "shape": SHAPE,
    "tokens": 30 * 768,
    "step_lengths": [16, 64, 128],
    "micro_tokens": 256,
    "evaluate_every": 10,
    "evaluation_windows": 4,
    "warmup_steps": 3,
    "checkpoint_seconds": 1e-9,
}
CONTINUED = {key: value for key, value in RECIPE.items() if key != "shape"} | {
    "base": "base",
    "tokens": 20 * 768,
}
TASK = {
    "name": "tiny",
    "kind": "classification",
    "data": {"file": "rows.jsonl"},
    "base": "base",
    "template": "plain",
    "split": {"near_duplicate": 1.0},
    "max_new_tokens": 8,
    "training": {"epochs": 4, "max_length": 128, "lora": {"rank": 4, "dropout": 0.2}},
}


def prepare(inputs: Path) -> None:
    """Write a corpus with its recipe, a task with its rows, and a base of random weights."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(120)]
    _write_lines(inputs / "corpus.jsonl", ({"text": text} for text in texts))
    rows = [(" ".join(draw.choices(WORDS, k=9)), LABELS[number % 3]) for number in range(110)]
    _write_lines(inputs / "rows.jsonl", ({"text": text, "label": label} for text, label in rows))
    (inputs / "pretrain.yaml").write_text(yaml.safe_dump(RECIPE))
    (inputs / "continue.yaml").write_text(yaml.safe_dump(CONTINUED))
    (inputs / "task.yaml").write_text(yaml.safe_dump(TASK))
    wait(start(lambda: _write_base(inputs / "base", texts), inputs / "told.txt"))
    load_base(str(inputs / "base"))  # and with it what every process needs that is forked later


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_base(directory: Path, texts: list[str]) -> None:
    """A process of its own does it: the tokenizer's trainer starts threads."""
    directory.mkdir()
    bpe.train_bpe(iter(texts), SHAPE["vocabulary"], directory)
    config = LlamaConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["intermediate"],
        max_position_embeddings=SHAPE["context"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def train_base(inputs: Path, out: Path, recipe: str = "pretrain.yaml") -> None:
    """Pre-train from random weights, or what another recipe says."""
    pretrain.pretrain(PretrainConfig.load(inputs / recipe), inputs, out, ratio)


def continue_base(inputs: Path, out: Path) -> None:
    """Train a given base further on raw text."""
    train_base(inputs, out, "continue.yaml")


def train_base_compiled(inputs: Path, out: Path) -> None:
    """Pre-train as for a corpus that is worth compiling for."""
    pretrain._WORTH_COMPILING = 0
    train_base(inputs, out)


def tune(arm: str) -> Callable[[Path, Path], None]:
    """Tune with rehearsal, several micro-batches a step and a checkpoint after each."""

    def train(inputs: Path, out: Path) -> None:
        sft._CHECKPOINT_SECONDS, sft.MICRO_TOKENS = 0.0, 128
        rehearsal.TEXTS, rehearsal._SIDE_BY_SIDE, rehearsal.LENGTH = 32, 32, 16
        bench = open_workbench(read_task(inputs / "task.yaml"), inputs)
        with Run(out) as run:
            Stages(bench, run, Silent()).make(Arm.of(arm), 0)

    return train


@dataclass(frozen=True)
class _Noise:
    """Data of the network that stands alone, a function of the step."""

    seed: int = 0
    weight: float = 8.0
    tokens: int = 8

    def step(self, index: int) -> list[_Noise]:
        return [_Noise(2 * index), _Noise(2 * index + 1)]


def train_network(_: Path, out: Path) -> None:
    """A small network with dropout in the loop alone: for sweeps, as it takes milliseconds."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1)]
    model = torch.nn.Sequential(*layers)

    def loss(part: _Noise) -> torch.Tensor:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(part.seed))
        found: torch.Tensor = ((model(x) - x.sum(1, keepdim=True)) ** 2).sum()
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plan = Plan(6, cosine(6, 0.1), checkpoint_seconds=0.0)
    with Run(out) as run:
        Loop(model, loss, _Noise(), [optimizer], plan, directory=run.path / "training-alone").run()
        run.stage("model", {}, lambda path: _save(model, path))


def _save(model: torch.nn.Module, directory: Path) -> None:
    """A result of several files, one of them in a directory of its own."""
    checkpoint.save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "more").mkdir()
    (directory / "more" / "about.json").write_text("{}")


def forget_the_optimizer() -> None:
    """Control: its moments are not restored."""
    checkpoint._unflatten = lambda _, numbers: [{} for _ in numbers]


def forget_the_seed() -> None:
    """Control: random numbers go on from the start of the process, not from the step."""
    torch.manual_seed = lambda _: torch.default_generator


def save_in_place() -> None:
    """Control: checkpoints have their names while they are written, and nobody looks at hashes."""

    def save(directory: Path, snapshot: checkpoint.Checkpoint, step: int) -> Path:
        path = directory / f"step-{step:09d}"
        path.mkdir(parents=True, exist_ok=True)
        tensors, numbers = checkpoint._flatten(snapshot.optimizers)
        state = {"state": dict(snapshot.state), "optimizers": numbers}
        (path / "state.json").write_text(json.dumps(state))
        checkpoint._write(path / "optimizer.safetensors", tensors)
        checkpoint._write(path / "best.safetensors", snapshot.best)
        checkpoint._write(path / "model.safetensors", snapshot.tensors)
        return path

    checkpoint.save = save
    checkpoint.runs.verify = lambda _: {}


def half_written(out: Path, process: int) -> bool:
    """Whether a process is writing a checkpoint or its log, or was when it was killed."""
    return any(
        name.startswith(f".partial-{process}-")
        and (directory.endswith("/checkpoints") or name.endswith("-log.jsonl"))
        for directory, names, files in os.walk(out)
        for name in (*names, *files)
    )


def result(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions: loss log, weights, names of all that there is."""
    kept = [*out.glob("*/log.jsonl"), *out.glob("arm-*/*.safetensors")]
    kept += out.glob("model-*/*.safetensors")
    found = {str(path.relative_to(out)): path.read_bytes() for path in kept}
    names = sorted(str(path.relative_to(out)) for path in out.glob("**/.partial-*"))
    names += sorted(path.name for path in out.iterdir())
    return found | {"names": "\n".join(names).encode()}


@dataclass(frozen=True)
class Scenario:
    """What is trained, and the safeguard that a control takes out."""

    train: Callable[[Path, Path], None]
    broken: Callable[[], None] | None = None
    share: float = 1.0
    """Of the kills at random; where a run takes long, less than others."""


SCENARIOS = {
    "full": Scenario(tune("full")),
    "lora": Scenario(tune("lora")),
    "lora/head": Scenario(tune("lora/head"), share=0.3),
    "pretrain": Scenario(train_base),
    "continued": Scenario(continue_base),
    "pretrain, compiled": Scenario(train_base_compiled, share=0.3),
    "control: optimizer forgotten": Scenario(tune("full"), forget_the_optimizer),
    "control: seed forgotten": Scenario(tune("lora"), forget_the_seed),
}
SWEEPS = {
    "every change of a save, network": (Scenario(train_network), (Loop, "_save", 3)),
    "every change of a publication, network": (Scenario(train_network), (Run, "stage", 1)),
    "every change of a save, lora": (SCENARIOS["lora"], (Loop, "_save", 3)),
    "every change of a publication, lora": (SCENARIOS["lora"], (tuning, "_write", 1)),
    "every change of a save, pretrain": (SCENARIOS["pretrain"], (Loop, "_save", 3)),
    "control: every change of a save, in place": (
        Scenario(train_network, save_in_place),
        (Loop, "_save", 3),
    ),
}
"""Each traces the n-th call of a function, up to the next call of it or to the end."""
