"""A base loads whole or is refused with its cause; nothing in it can run code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metier.errors import ModelError
from metier.model import load
from metier.model.load import Base, base_hash, load_base

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def test_the_real_model_loads(base: Base, stories260k: Path) -> None:
    assert base.parameters == 260_032
    assert base.path == stories260k
    assert not base.model.training
    text = "Once upon a time, there was a little"
    ids = torch.tensor([[1, *base.tokenizer.encode(text)]])
    with torch.inference_mode():
        likeliest = int(base.model(ids).logits[0, -1].argmax())
    assert base.tokenizer.decode([likeliest]) == "g", "of girl"


def test_the_number_format_is_as_asked(stories260k: Path) -> None:
    assert (
        load_base(str(stories260k), dtype=torch.bfloat16, device="cpu").model.dtype
        == torch.bfloat16
    )


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content.update(values)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_the_hash_follows_weights_and_config(base: Base, copy: Path) -> None:
    assert base_hash(str(copy)) == base.hash
    edit(copy / "tokenizer_config.json", model_max_length=100)
    assert base_hash(str(copy)) == base.hash
    edit(copy / "config.json", rope_theta=5000.0)
    changed = base_hash(str(copy))
    weights = load_file(copy / WEIGHTS)
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / WEIGHTS)
    found = [base.hash, changed, base_hash(str(copy))]
    content, dates = bytearray((copy / WEIGHTS).read_bytes()), (copy / WEIGHTS).stat()
    content[-1] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    os.utime(copy / WEIGHTS, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert len({*found, base_hash(str(copy))}) == 4, "of another file with its size and dates"


def test_weights_in_shards_load_the_same(base: Base, copy: Path) -> None:
    base.model.save_pretrained(str(copy), max_shard_size="400KB")
    (copy / WEIGHTS).unlink()
    assert len(list(copy.glob("*.safetensors"))) > 1
    sharded = load_base(str(copy), dtype=torch.float32, device="cpu")
    for one, other in zip(base.model.parameters(), sharded.model.parameters(), strict=True):
        assert torch.equal(one, other)
    next(copy.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="is missing"):
        load_base(str(copy))


def cut(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def only_pickle(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def drop_a_tensor(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, directory / WEIGHTS)


def shrink_a_tensor(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, directory / WEIGHTS)


def shrink_the_vocabulary(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:500].clone()
    save_file(weights, directory / WEIGHTS)
    edit(directory / "config.json", vocab_size=500)


def outside(directory: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other.safetensors"}}
    (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: is missing"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "is unreadable"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "is not a JSON object"),
    "unknown architecture": (
        lambda d: edit(d / "config.json", model_type="zzz", auto_map={"AutoConfig": "evil.Config"}),
        "describes no model",
    ),
    "encoder-decoder": (
        lambda d: (d / "config.json").write_text('{"model_type": "bart"}'),
        "encoder-decoder of the family bart",
    ),
    "not a language model": (
        lambda d: (d / "config.json").write_text('{"model_type": "vit"}'),
        "is a vit model",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "model.safetensors: is missing"),
    "weights cut short": (cut, "damaged or cut short"),
    "weights empty": (lambda d: (d / WEIGHTS).write_bytes(b""), "damaged or cut short"),
    "weights are HTML": (lambda d: (d / WEIGHTS).write_text("<html>" * 9), "damaged or cut short"),
    "only pickle": (only_pickle, "pickle"),
    "a tensor is missing": (drop_a_tensor, "lacks 1 weights, e.g. model.layers.3.mlp"),
    "a tensor is too small": (shrink_a_tensor, "cannot be loaded"),
    "index names a file outside": (outside, "names the file"),
    "index names nothing": (lambda d: (d / INDEX).write_text("{}"), "names no weight files"),
    "index is damaged": (
        lambda d: (d / INDEX).write_text('{"weight_map": [1]}'),
        "names no weight files",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer too large": (shrink_the_vocabulary, "512 ids but the model embeds only 500"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_base_is_refused(copy: Path, name: str) -> None:
    damage, cause = DAMAGE[name]
    damage(copy)
    with pytest.raises(ModelError, match=cause) as caught:
        load_base(str(copy), device="cpu")
    assert caught.value.remedy


class Canary:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["METIER_CANARY"],)


def test_nothing_in_a_base_runs(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("METIER_CANARY", str(canary))
    hostile = pickle.dumps(Canary())
    (copy / "pytorch_model.bin").write_bytes(hostile)
    (copy / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    edit(
        copy / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
    )
    edit(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    assert load_base(str(copy), device="cpu").model.config._attn_implementation == "sdpa"
    (copy / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="pickle"):
        load_base(str(copy), device="cpu")
    assert not canary.exists()
    pickle.loads(hostile)
    assert canary.exists(), "the canary does sing"


@pytest.mark.parametrize("name", ["no/such/directory", "../up", "/nowhere", "a b"])
def test_a_wrong_path_is_explained(name: str) -> None:
    with pytest.raises(ModelError, match="is no directory"):
        load_base(name)


def test_a_hub_name_that_cannot_be_had_is_explained() -> None:
    with pytest.raises(ModelError, match="Hub") as caught:
        load_base("metier-tests/absent-model")
    assert "network" in caught.value.remedy


def test_the_starter_is_found_or_its_absence_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "__file__", str(tmp_path / "load.py"))
    with pytest.raises(ModelError, match="not part of this copy"):
        load_base("starter")
    (tmp_path / "starter").mkdir()
    (tmp_path / "starter" / "config.json").write_text("{}")
    assert load.locate("starter") == tmp_path / "starter"
