"""Adapters are PEFT's in format and value, ours in what they may do."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from metier.errors import ConfigError, ModelError
from metier.model.adapters import add_adapter, load_adapter, save_adapter, unfreeze
from metier.model.backbone import decoder_layers
from metier.model.load import Base
from metier.task import TUNINGS, Lora, Training

IDS = torch.tensor([[1, 403, 407, 261, 378]])
KINDS = [kind for kind, tuning in TUNINGS.items() if tuning.adapter and not tuning.four_bit]
SMALL = Training(lora=Lora(rank=4, alpha=8), virtual_tokens=3)
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def fresh(base: Base) -> Base:
    return replace(base, model=deepcopy(base.model))


@torch.inference_mode()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits
    return result


def logits(model: Any) -> torch.Tensor:
    return logits_of(model, IDS)


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


@pytest.mark.parametrize("kind", KINDS)
def test_its_start_depends_on_the_seed_alone(base: Base, kind: str) -> None:
    torch.manual_seed(1)
    one = dict(weights(add_adapter(fresh(base).model, kind, SMALL, 7)))
    torch.manual_seed(2)
    two = dict(weights(add_adapter(fresh(base).model, kind, SMALL, 7)))
    other = dict(weights(add_adapter(fresh(base).model, kind, SMALL, 8)))
    assert {parameter.dtype for parameter in one.values()} == {torch.float32}
    for name, start in one.items():
        assert torch.equal(start, two[name])
        drawn = kind != "ia3" and "lora_B" not in name and "magnitude" not in name
        assert torch.equal(start, other[name]) != (drawn or kind == "pissa")


def test_what_is_drawn_does_not_depend_on_the_number_format(base: Base) -> None:
    one = dict(weights(add_adapter(fresh(base).model, "lora", SMALL, 7)))
    half = fresh(base).model.to(torch.bfloat16)
    for name, start in weights(add_adapter(half, "lora", SMALL, 7)):
        assert start.dtype == torch.float32
        assert torch.equal(start, one[name])


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "ia3"])
def test_a_model_starts_as_its_base(base: Base, kind: str) -> None:
    found = logits(add_adapter(fresh(base).model, kind, SMALL, 0).eval())
    assert torch.allclose(found, logits(base.model), atol=1e-4)


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix-tuning"])
def test_virtual_tokens_start_as_words_before_the_input(base: Base, kind: str) -> None:
    model = add_adapter(fresh(base).model, kind, SMALL, 5).eval()
    words = torch.randint(512, (3,), generator=torch.Generator().manual_seed(5))
    expected = logits_of(base.model, torch.cat((words[None], IDS), dim=1))[:, 3:]
    assert torch.allclose(logits(model)[:, -IDS.shape[1] :], expected, atol=1e-4)


def spread_out(base: Base) -> Base:
    """Weights whose singular values fall fast, so that the principal part is well determined."""
    base = fresh(base)
    for module in base.model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            left, values, right = torch.linalg.svd(module.weight.data, full_matrices=False)
            falling = values[0] * 0.6 ** torch.arange(len(values))
            module.weight.data = left * falling @ right
    return base


def descend(model: Any, steps: int = 4) -> None:
    """Plain gradient descent, which no turn of A against B changes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        for parameter in trained:
            parameter.data -= 0.02 * parameter.grad
            parameter.grad = None


def test_pissa_learns_what_pefts_own_learns(base: Base) -> None:
    """PEFT takes the principal part out of the base's weights; ours leaves them as they are."""
    one, two, plain = spread_out(base), spread_out(base), spread_out(base)
    ours = add_adapter(one.model, "pissa", SMALL, 0)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights="pissa",
    )
    theirs = get_peft_model(two.model, config)
    for model in (ours, theirs):
        descend(model.eval())
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-3)
    lora = add_adapter(plain.model, "lora", SMALL, 0)
    descend(lora.eval())
    assert not torch.allclose(logits(lora), logits(theirs), atol=1e-1), "it is no plain LoRA"


def test_what_pissa_takes_away_stays_as_it_is(base: Base) -> None:
    model = add_adapter(fresh(base).model, "pissa", SMALL, 0)
    before = {name: p.detach().clone() for name, p in weights(model)}
    optimizer = torch.optim.AdamW([p for _, p in weights(model)], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, after in weights(model):
        along = int("lora_B" in name)
        learned, kept = (t.split(4, along) for t in (after, before[name]))
        assert torch.equal(learned[1], kept[1])
        assert not torch.equal(learned[0], kept[0])


def test_a_rank_beyond_the_singular_values_is_refused(base: Base) -> None:
    with pytest.raises(ConfigError, match="more than the singular values"):
        add_adapter(fresh(base).model, "pissa", Training(lora=Lora(rank=33)), 0)


def trained_layers(model: Any) -> set[str]:
    """Numbers of layers with trained parameters, and the names of others that are trained."""
    names = [name for name, _ in weights(model)]
    return {(re.search(r"layers\.(\d+)\.", name) or [name, name])[1] for name in names}


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "ia3", "full"])
def test_chosen_layers_alone_are_trained(base: Base, kind: str) -> None:
    chosen = SMALL.model_copy(update={"layers": (1, -1, 4)})
    model: Any = fresh(base).model
    if kind == "full":
        unfreeze(model, chosen.layers)
        assert sum(1 for _ in weights(model)) == 2 * 9
    else:
        model = add_adapter(model, kind, chosen, 0)
    assert trained_layers(model) == {"1", "4"}


def test_without_a_choice_everything_is_trained(base: Base) -> None:
    model = fresh(base).model
    unfreeze(model, ())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(decoder_layers(model)[1]) == 5


@pytest.mark.parametrize("number", [5, -6, 99])
def test_a_layer_that_is_not_there_is_refused(base: Base, number: int) -> None:
    chosen = SMALL.model_copy(update={"layers": (0, number)})
    for train in (
        lambda: add_adapter(fresh(base).model, "lora", chosen, 0),
        lambda: unfreeze(fresh(base).model, chosen.layers),
    ):
        with pytest.raises(ConfigError, match=f"names layer {number}, but the base has 5"):
            train()


def test_a_family_without_known_places_for_ia3_is_refused(base: Base) -> None:
    odd = fresh(base)
    odd.model.config.model_type = "unheard_of"
    with pytest.raises(ModelError, match="'unheard_of', for which PEFT names no layers"):
        add_adapter(odd.model, "ia3", SMALL, 0)


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


OTHER_DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tokens differ": ("prompt-tuning", lambda d: edit(d / CONFIG, num_virtual_tokens=4)),
    "tokens are text": ("prefix-tuning", lambda d: edit(d / CONFIG, num_virtual_tokens="many")),
    "tokens are below none": ("prompt-tuning", lambda d: edit(d / CONFIG, num_virtual_tokens=-1)),
    "a tensor is called otherwise": (
        "prefix-tuning",
        lambda d: change_weights(d, lambda t: t.update(zzz=t.pop("prompt_embeddings"))),
    ),
    "a vector is missing": ("ia3", lambda d: change_weights(d, lambda t: t.popitem())),
    "forward layers are no targets": ("ia3", lambda d: edit(d / CONFIG, feedforward_modules=["z"])),
    "no magnitudes": ("lora", lambda d: edit(d / CONFIG, use_dora=True)),
    "magnitudes too many": ("dora", lambda d: edit(d / CONFIG, use_dora=False)),
    "it learned a token": (
        "lora",
        lambda d: edit(d / CONFIG, trainable_token_indices={"embed_tokens": [512]}),
    ),
    "tokens are no table": ("lora", lambda d: edit(d / CONFIG, trainable_token_indices=[5])),
}


@pytest.mark.parametrize("name", OTHER_DAMAGE)
def test_damage_is_found_in_every_kind(base: Base, tmp_path: Path, name: str) -> None:
    kind, damage = OTHER_DAMAGE[name]
    save_adapter(add_adapter(fresh(base).model, kind, SMALL, 0), tmp_path, base)
    load_adapter(fresh(base), tmp_path)
    damage(tmp_path)
    untouched = fresh(base)
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(untouched, tmp_path)
    assert torch.equal(logits(untouched.model), logits(base.model))


def test_an_adapter_cannot_have_a_tokenizer_fetched(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would load the one that a config of this kind names."""
    save_adapter(add_adapter(fresh(base).model, "prompt-tuning", SMALL, 0), tmp_path, base)
    asked: list[str] = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **_: asked.append(name)
    )
    edit(
        tmp_path / CONFIG,
        inference_mode=False,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="x",
        tokenizer_name_or_path="org/evil",
    )
    load_adapter(fresh(base), tmp_path)
    assert asked == []
    with pytest.raises(TypeError):  # control: the config as PEFT reads it does ask
        get_peft_model(fresh(base).model, PeftConfig.from_pretrained(tmp_path))
    assert asked == ["org/evil"]


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
