"""Adapters are PEFT's in format and value, ours in what they may do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from metier.errors import ModelError
from metier.model.adapters import add_adapter, load_adapter, save_adapter
from metier.model.load import Base
from metier.task import Lora, Training

IDS = torch.tensor([[1, 403, 407, 261, 378]])
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def fresh(base: Base) -> Base:
    return replace(base, model=deepcopy(base.model))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def trained(base: Base, seed: int = 0) -> PeftModel:
    """An adapter whose B is no longer zero."""
    model = add_adapter(fresh(base).model, "lora", Training(lora=Lora(rank=4, alpha=8)), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


@pytest.fixture(scope="module")
def adapted(base: Base) -> PeftModel:
    return trained(base)


@pytest.fixture
def saved(base: Base, adapted: PeftModel, tmp_path: Path) -> Path:
    save_adapter(adapted, tmp_path / "adapter", base)
    return tmp_path / "adapter"


def weights(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def test_a_new_adapter_covers_all_linear_layers_but_the_head(base: Base) -> None:
    model = add_adapter(fresh(base).model, "lora", Training(lora=Lora(rank=4)), 0)
    shapes = {name: tuple(p.shape) for name, p in weights(model)}
    assert len(shapes) == 2 * 7 * 5, "A and B of 7 linear layers in each of 5 blocks"
    assert not any("lm_head" in name or "embed" in name for name in shapes)
    assert torch.equal(logits(model.eval()), logits(base.model)), "it starts as the base"


def test_its_start_depends_on_the_seed_alone(base: Base) -> None:
    torch.manual_seed(1)
    one = dict(weights(add_adapter(fresh(base).model, "lora", Training(lora=Lora(rank=4)), 7)))
    torch.manual_seed(2)
    half = fresh(base).model.to(torch.bfloat16)
    two = dict(weights(add_adapter(half, "lora", Training(lora=Lora(rank=4)), 7)))
    other = dict(weights(add_adapter(fresh(base).model, "lora", Training(lora=Lora(rank=4)), 8)))
    for name, start in one.items():
        assert torch.equal(start.float(), two[name].float())
        assert torch.equal(start, other[name]) == ("lora_B" in name)


def test_its_start_is_spread_as_pefts(base: Base) -> None:
    """Kaiming-uniform with a = sqrt(5): uniform within 1/sqrt(inputs)."""
    model = add_adapter(fresh(base).model, "lora", Training(lora=Lora(rank=64)), 0)
    values = torch.cat([p.flatten() for n, p in weights(model) if "q_proj.lora_A" in n])
    bound = 64**-0.5
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_plain_peft_reads_what_is_saved(base: Base, adapted: PeftModel, saved: Path) -> None:
    theirs = PeftModel.from_pretrained(fresh(base).model, str(saved)).eval()
    assert torch.equal(logits(theirs), logits(adapted))
    assert not torch.allclose(logits(theirs), logits(base.model), atol=1e-3)


def test_a_saved_adapter_loads_the_same(base: Base, adapted: PeftModel, saved: Path) -> None:
    ours = load_adapter(fresh(base), saved)
    assert torch.equal(logits(ours), logits(adapted))
    assert not ours.training
    assert not list(weights(ours)), "it is loaded for use"


def test_what_is_saved_names_no_place_of_this_machine(
    base: Base, adapted: PeftModel, tmp_path: Path
) -> None:
    save_adapter(adapted, tmp_path, replace(base, name="starter"))
    assert str(base.path) not in (tmp_path / CONFIG).read_text()
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "starter"
    record = json.loads((tmp_path / "metier.json").read_text())
    assert record == {"base": "starter", "base_hash": base.hash}


def test_another_base_is_refused_by_hash(base: Base, saved: Path) -> None:
    with pytest.raises(ModelError, match="belongs to another base"):
        load_adapter(replace(fresh(base), hash="f" * 64), saved)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no record": (lambda d: (d / "metier.json").unlink(), "missing or unreadable"),
    "record is no JSON": (lambda d: (d / "metier.json").write_text("x"), "missing or unreadable"),
    "record is a list": (lambda d: (d / "metier.json").write_text("[]"), "another base"),
    "no config": (lambda d: (d / CONFIG).unlink(), "missing or unreadable"),
    "another kind": (lambda d: edit(d / CONFIG, peft_type="LOHA"), "known are LORA"),
    "rank is text": (lambda d: edit(d / CONFIG, r="many"), "does not fit"),
    "rank is zero": (lambda d: edit(d / CONFIG, r=0), "does not fit"),
    "targets are a number": (lambda d: edit(d / CONFIG, target_modules=7), "does not fit"),
    "rank differs": (lambda d: edit(d / CONFIG, r=5), "does not fit"),
    "targets are unknown": (lambda d: edit(d / CONFIG, target_modules=["zzz"]), "does not fit"),
    "targets are missing": (lambda d: edit(d / CONFIG, target_modules=None), "names no target"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "missing or damaged"),
    "weights cut short": (lambda d: (d / WEIGHTS).write_bytes(b"x" * 20), "missing or damaged"),
    "a tensor is missing": (lambda d: change_weights(d, lambda t: t.popitem()), "does not fit"),
    "a tensor too many": (
        lambda d: change_weights(d, lambda t: t.update(zzz=torch.zeros(1))),
        "does not fit",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter_is_refused(base: Base, saved: Path, name: str) -> None:
    damage, cause = DAMAGE[name]
    good = shutil.copytree(saved, saved.with_name("good"))
    damage(saved)
    untouched = fresh(base)
    with pytest.raises(ModelError, match=cause):
        load_adapter(untouched, saved)
    assert torch.equal(logits(untouched.model), logits(base.model))
    load_adapter(untouched, good)


def test_an_adapter_cannot_name_code(
    base: Base, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil_library.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(
        saved / CONFIG,
        task_type=None,
        auto_mapping={"base_model_class": "X", "parent_library": "evil_library"},
    )
    load_adapter(fresh(base), saved)
    assert not canary.exists()
    __import__("evil_library")
    assert os.path.isdir(canary), "the canary does sing"
