"""What both sides are given: a base of the wanted shape, rows, prompts, windows, written once.

The base has random weights from one seed: speed does not depend on what a model knows. Its
embeddings are wider than usual, so that tokens differ in how likely they are, as they do in a base
that has learned: a loss that looked at the wrong ones would show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metier.data import stream
from metier.model.adapters import add_adapter, save_adapter
from metier.model.load import load_base, starter_path
from metier.records import Message
from metier.runs import publish
from metier.task import Training
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer
from metier.training import sft
from metier.training.batches import Row
from metier.training.mixture import Mixture
from metier.training.pretrain_config import PretrainConfig
from training.common import Spec

SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M (Ben Allal et al. 2025, arXiv 2502.02737)."""

TEMPLATE = "question-answer"
STEP_ROWS = 16
_END = "<|endoftext|>"
_DOLLY = "dolly_part/dolly_flan_t5_xl.jsonl"
_PREFIX = 400
# Standard deviation of logits over tokens.
_SPREAD = 2.0


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """A directory that is made the first time it is asked for, whole or not at all."""
    if not path.exists():
        with publish(path, {}) as directory:
            make(directory)
    return path


def write_base(directory: Path, data: Path, shape: dict[str, Any]) -> None:
    """A Llama of random weights in Hugging Face layout, with GPT-2's tokenizer and an adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end = write_tokenizer(directory, data / "tokenizers/gpt2/tokenizer.json", shape["vocab_size"])
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data.normal_(0, _SPREAD / math.sqrt(shape["hidden_size"]))
    model.bfloat16().save_pretrained(directory)
    base = load_base(str(directory))
    save_adapter(add_adapter(base.model, "lora", Training(), seed=0), directory / "adapter", base)


def write_tokenizer(directory: Path, source: Path, size: int) -> int:
    """GPT-2's tokenizer with its first merges only, so that it has `size` ids. Returns EOS's id.

    The first merges of a byte-level BPE are a tokenizer of their own: the one that a shorter
    training on the same text gives.
    """
    described = json.loads(source.read_text("utf-8"))
    vocabulary: dict[str, int] = described["model"]["vocab"]
    kept = sorted((token for token in vocabulary if token != _END), key=vocabulary.__getitem__)
    bytes_only = len(kept) - len(described["model"]["merges"])
    described["model"]["merges"] = described["model"]["merges"][: size - 1 - bytes_only]
    tokens = [*kept[: size - 1], _END]
    described["model"]["vocab"] = {token: place for place, token in enumerate(tokens)}
    described["added_tokens"][0]["id"] = size - 1
    (directory / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "pad_token": _END}
    (directory / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    return size - 1


def dolly(data: Path) -> Iterator[dict[str, str]]:
    """Instructions and answers that people wrote."""
    with (data / _DOLLY).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield {"instruction": row["instruction"], "answer": row["text"]}


def write_rows(directory: Path, data: Path, base: Path, steps: int) -> None:
    """Rows as ids with what is trained on, and which of them every step of ours holds."""
    renderer = Renderer(Tokenizer.load(base), TEMPLATE)
    rows = []
    for row in islice(dolly(data), steps * STEP_ROWS):
        answer = Message(role="assistant", content=row["answer"])
        found = renderer.example([Message(role="user", content=row["instruction"]), answer])
        rows.append(Row.of(found))
    if len(rows) < steps * STEP_ROWS:
        raise ValueError(f"{_DOLLY} has {len(rows)} rows, not {steps * STEP_ROWS}")
    found = {
        "ids": [row.ids for row in rows],
        "trained": [row.trained for row in rows],
        "steps": steps_of(rows, Training(epochs=1, batch_size=STEP_ROWS), seed=0),
    }
    (directory / "rows.json").write_text(json.dumps(found), "utf-8")


def read_rows(file: Path) -> list[Row]:
    """The rows that `write_rows` wrote."""
    found = json.loads(file.read_text("utf-8"))
    pairs = zip(found["ids"], found["trained"], strict=True)
    return [Row(tuple(ids), tuple(trained)) for ids, trained in pairs]


def steps_of(rows: list[Row], training: Training, seed: int) -> list[list[int]]:
    """Places of the rows in every step of a pass: read off the batches that training draws.

    The last token of a row is not read, but it is trained: targets and ids name a row. In a step
    rows stand as in the data, not by length: who wants to group them must do so.
    """
    places: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        targets = (t if on else -1 for t, on in zip(row.ids[1:], row.trained[1:], strict=True))
        places.setdefault((row.ids[:-1], tuple(targets)), []).append(place)
    batches = sft.row_batches(rows, training, seed=seed)
    steps = []
    for step in range(batches.steps_per_epoch):
        held = []
        for batch in batches.step(step):
            ids, targets = (t.split(list(batch.lengths)) for t in (batch.ids, batch.targets))
            for own, following in zip(ids, targets, strict=True):
                held.append(places[tuple(own.tolist()), tuple(following.tolist())].pop())
        steps.append(sorted(held))
    return steps


def write_prompts(directory: Path, data: Path, base: Path, count: int) -> None:
    """Prompts as ids, with a shared few-shot prefix and without one, and for the starter."""
    tokenizer = Tokenizer.load(base)
    renderer = Renderer(tokenizer, TEMPLATE)
    rows = dolly(data)
    prefix: list[int] = []
    while len(prefix) < _PREFIX:
        shot = next(rows)
        text = f"### Question:\n{shot['instruction']}\n\n### Answer:\n{shot['answer']}\n\n"
        prefix += tokenizer.encode(text, "text" if prefix else "start")
    asked = [[Message(role="user", content=row["instruction"])] for row in islice(rows, count)]
    plain = [renderer.prompt(chat) for chat in asked]
    starter = Renderer(Tokenizer.load(starter_path()), TEMPLATE)
    found = {
        "plain": plain,
        "prefix": [[*prefix, *prompt] for prompt in plain],
        "starter": [starter.prompt(chat) for chat in asked],
    }
    (directory / "prompts.json").write_text(json.dumps(found), "utf-8")


def write_task(directory: Path, data: Path, base: Path, count: int) -> None:
    """A task file over `count` different rows, and the same rows for TRL."""
    rows = list(dolly(data))
    # Beyond what there is: two questions in one, which is no near-duplicate of either.
    for first, second in zip(rows, rows[len(rows) // 2 :], strict=False):
        rows.append({name: f"{first[name]}\n{second[name]}" for name in first})
    rows = rows[:count]
    if len(rows) < count:
        raise ValueError(f"{_DOLLY} makes {len(rows)} rows, not {count}")
    _write_lines(directory / "rows.jsonl", rows)
    question = "### Question:\n{instruction}\n\n### Answer:\n"
    pairs = ({"prompt": question.format(**r), "completion": r["answer"]} for r in rows)
    _write_lines(directory / "pairs.jsonl", pairs)
    task = {
        "name": "start-up",
        "kind": "expansion",
        "base": str(base),
        "template": TEMPLATE,
        "data": {"file": "rows.jsonl", "columns": {"input": "instruction", "output": "answer"}},
        "training": {"batch_size": STEP_ROWS, "rehearsal": 0},
    }
    (directory / "task.yaml").write_text(json.dumps(task), "utf-8")


def _write_lines(file: Path, rows: Any) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def recipe(data: Path, tokens: int, parts: int) -> PretrainConfig:
    """The starter's shape, packed: every window is as long as its context.

    Args:
        data: directory of the data sets.
        tokens: to train on.
        parts: micro-batches of a step.

    """
    source = {"name": "shakespeare", "files": ["tinyshakespeare/*.txt*"], "held_out": 0}
    return PretrainConfig.parse(
        {
            "name": "packed",
            "root": str(data.resolve()),
            "sources": [source],
            "step_lengths": [1024] * parts,
            "tokens": tokens,
            "checkpoint_seconds": 1e9,
        },
        "benchmark",
    )


def write_windows(directory: Path, run: Path, config: PretrainConfig, steps: int) -> None:
    """The windows of the first steps, shape (steps, windows, 1 + length), from a run's tokens."""
    (tokens,) = run.glob("tokens-*/shakespeare.bin")
    (described,) = run.glob("tokenizer-*/tokenizer.json")
    mixture = Mixture(
        [(stream.TokenFile(tokens), 1.0)],
        config.step_lengths,
        config.micro_tokens,
        config.seed,
        Tokenizer.load(described.parent),
    )
    windows = [torch.cat([part.ids for part in mixture.step(step)]) for step in range(steps)]
    np.save(directory / "windows.npy", torch.stack(windows).numpy(), allow_pickle=False)


def prepare(spec: Spec) -> dict[str, Any]:
    """Write what a scenario needs below the directory of material; returns nothing."""
    work, data, count = Path(spec["work"]), Path(spec["data"]), spec["count"]
    shape = SMOLLM2 | {"num_hidden_layers": spec["layers"]}
    base = once(work / "base", lambda path: write_base(path, data, shape))
    write = {"rows": write_rows, "prompts": write_prompts, "task": write_task}[spec["what"]]
    once(work / f"{spec['what']}-{count}", lambda path: write(path, data, base, count))
    return {}
