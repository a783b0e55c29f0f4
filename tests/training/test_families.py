"""Every family and way of tuning: load, train, save, and read by plain Transformers or PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from metier.model.adapters import add_adapter, load_adapter, save_adapter, unfreeze
from metier.model.decoder import Decoder
from metier.model.load import Base, load_base
from metier.task import TUNINGS, Lora, Training
from metier.text.template import Renderer
from metier.training.batches import Batch, Row
from metier.training.scoring import Scorer
from metier.training.sft import answer_loss, default_learning_rate, fit
from tests.training.families import FAMILIES, write_base
from tests.training.test_sft import rows_of

TRAINING = Training(
    epochs=10, batch_size=6, patience=0, virtual_tokens=4, lora=Lora(rank=4, alpha=8)
)
KINDS = [kind for kind in TUNINGS if kind != "qlora"]
OTHER = {
    "Mistral": "dora",
    "Qwen3": "prefix-tuning",
    "Gemma3Text": "prompt-tuning",
    "Phi": "ia3",
    "GPT2": "pissa",
    "GPTNeoX": "rslora",
}
MATRIX = [("Llama", kind) for kind in KINDS] + [
    (family, kind) for family, other in OTHER.items() for kind in ("full", "lora", other)
]


@dataclass
class Tuned:
    """What a training left behind."""

    base: Base
    model: Any
    rows: list[Row]
    before: float
    after: float


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_base(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def load(path: Path) -> Base:
    return load_base(str(path), dtype=torch.float32, device="cpu")


def prepared(path: Path, kind: str, training: Training) -> tuple[Base, Any, list[Row]]:
    base = load(path)
    rows = rows_of(Renderer(base.tokenizer, "question-answer"), training)
    if TUNINGS[kind].adapter:
        return base, add_adapter(base.model, kind, training, 0), rows
    unfreeze(base.model, training.layers)
    return base, base.model, rows


def tune(path: Path, kind: str, training: Training = TRAINING) -> Tuned:
    """Twenty steps at the default learning rate."""
    base, model, rows = prepared(path, kind, training)
    batch = Batch.of(sorted(rows, key=lambda row: -len(row.ids)))
    score = Scorer(model)
    with torch.no_grad():
        before = answer_loss(score)(batch).item()
    rate = default_learning_rate(model, TUNINGS[kind])
    state = fit(model, answer_loss(score), rows, rows, training, learning_rate=rate, seed=0)
    assert state.step == 20
    model.eval()
    with torch.no_grad():
        after = answer_loss(score)(batch).item()
    return Tuned(base, model, rows, before, after)


def write(tuned: Tuned, kind: str, directory: Path) -> None:
    if TUNINGS[kind].adapter:
        save_adapter(tuned.model, directory, tuned.base)
    else:
        tuned.model.save_pretrained(directory)
        tuned.base.tokenizer.save(directory)


def plain(base: Path, kind: str, directory: Path) -> Any:
    """What the library alone makes of the files."""
    start = base if TUNINGS[kind].adapter else directory
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, directory) if start == base else model).eval()


@torch.inference_mode()
def alone(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of what follows each prompt, one by one and without padding."""
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts])


def ours(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The same through the engine's decoder, side by side."""
    return Decoder(model, prompts, 2).logits


def prompts_of(tuned: Tuned) -> list[list[int]]:
    """Of several lengths, the longest beyond the families' windows."""
    ids = [list(row.ids) for row in tuned.rows[:4]]
    return [ids[0][:1], ids[1], ids[2] + ids[3], ids[3][:5]]


@pytest.mark.parametrize(("family", "kind"), MATRIX)
def test_what_is_trained_is_what_others_read(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    tuned = tune(bases[family], kind)
    assert tuned.after < 0.95 * tuned.before
    write(tuned, kind, tmp_path)
    prompts = prompts_of(tuned)
    found = ours(tuned.model, prompts)
    expected = alone(plain(bases[family], kind, tmp_path), prompts)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, alone(load(bases[family]).model, prompts), atol=1e-2)
    if TUNINGS[kind].adapter:
        again = ours(load_adapter(load(bases[family]), tmp_path), prompts)
        assert torch.allclose(found, again, atol=1e-5)
