"""A merged weight is the nearest number to base plus adapter, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import layer as lora_layer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from metier.errors import ModelError
from metier.model.adapters import add_adapter
from metier.model.load import Base
from metier.model.merge import digests, merge, unit_roundoff
from metier.progress import Silent
from metier.task import Lora, Training

IDS = torch.tensor([[1, 403, 407, 261, 378]])
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gpt2, turned weights": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_embd=48, n_layer=2, n_head=4)
    ),
}
FORMATS = [torch.float32, torch.bfloat16]


def random(model: Any, seed: int = 0) -> Any:
    """The same model with an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data = (parameter.data.float() + noise).to(parameter.dtype)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def distance(one: Any, other: Any) -> float:
    """Largest difference of a logit, as a share of the largest logit."""
    return float((logits(one) - logits(other)).abs().max() / logits(other).abs().max())


def nearest(value: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to a format, ties to even, by arithmetic on whole numbers; see `merge`."""
    for digits in {torch.float32: (24,), torch.bfloat16: (24, 8)}[dtype]:
        mantissa, exponent = np.frexp(value)
        value = np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)
    return torch.from_numpy(value).to(dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_weight_is_the_nearest_to_the_sum(
    family: PreTrainedModel, dtype: torch.dtype
) -> None:
    model = random(add_adapter(family.to(dtype), "lora", Training(lora=Lora(rank=4, alpha=10)), 0))
    expected = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, lora_layer.LoraLayer):
            a, b = (
                getattr(layer, part)["default"].weight.detach().double().numpy()
                for part in ("lora_A", "lora_B")
            )
            change = 2.5 * (b @ a)
            weight = layer.get_base_layer().weight.detach().double().numpy()
            turned = change.T if layer.fan_in_fan_out else change
            expected[name] = nearest(weight + turned, dtype)
    merged = merge(model, Silent())
    assert set(merged.layers) == set(expected)
    assert len(expected) >= 8
    for name, weight in expected.items():
        found = merged.model.get_submodule(name).weight
        assert torch.equal(found, weight), name
    assert 0 < merged.error <= 1


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_only_the_adapters_layers_change(family: PreTrainedModel, dtype: torch.dtype) -> None:
    before = digests(family.to(dtype))
    model = random(add_adapter(family, "lora", Training(lora=Lora(rank=4)), 0))
    assert digests(model) == before, "an adapter beside the base leaves it alone"
    kept = copy.deepcopy(model)
    merged = merge(model, Silent())
    after = digests(merged.model)
    changed = {name.removesuffix(".weight") for name in before if before[name] != after[name]}
    assert after.keys() == before.keys()
    assert changed == set(merged.layers)
    assert merged.model.dtype == dtype
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert distance(merged.model, kept) < 50 * unit_roundoff(dtype)


KINDS: dict[str, Any] = {
    "rank-stabilised": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear"),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "OFT": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"], use_cayley_neumann=False
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_that_can_be_merged_are(base: Base, kind: str) -> None:
    adapted = peft.get_peft_model(copy.deepcopy(base.model), KINDS[kind]())
    kept = copy.deepcopy(random(adapted))
    assert not torch.allclose(logits(kept), logits(base.model), atol=1e-2)
    merged = merge(adapted, Silent())
    assert distance(merged.model, kept) < 1e-4
    assert len(merged.layers) >= 10


def test_tokens_before_the_input_cannot_be_merged(base: Base) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    with pytest.raises(ModelError, match="nothing to merge into weights") as caught:
        merge(model, Silent())
    assert "without --merge" in caught.value.remedy


def adapted(base: Base, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    config = {"r": 4, "target_modules": "all-linear", **config}
    model = copy.deepcopy(base.model).to(dtype)
    return random(peft.get_peft_model(model, peft.LoraConfig(**config)))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.2), (torch.float32, 0)]
)
def test_a_layer_that_was_merged_wrongly_is_found(
    base: Base, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    right = lora_layer.Linear.merge

    def wrong(self: Any, **options: Any) -> None:
        right(self, **options)
        if self.get_base_layer().out_features == 172:  # gate and up
            self.get_base_layer().weight.data[3] *= factor

    merge(adapted(base, dtype), Silent())
    monkeypatch.setattr(lora_layer.Linear, "merge", wrong)
    with pytest.raises(ModelError, match="times what rounding explains") as caught:
        merge(adapted(base, dtype), Silent())
    assert caught.value.place == "layer model.layers.0.mlp.gate_proj"


def test_an_adapter_that_is_not_finite_is_refused(base: Base) -> None:
    model = adapted(base)
    model.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"].weight.data[0] = (
        torch.nan
    )
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj.*cannot be merged"):
        merge(model, Silent())


TIED = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")


@TIED
def test_a_weight_that_is_tied_to_a_merged_one_is_not_changed_in_silence(base: Base) -> None:
    """The head shares its weight with the embeddings, which the adapter does not stand on."""
    with pytest.raises(ModelError, match=r"embed_tokens\.weight.*was changed by the merge"):
        merge(adapted(base, target_modules=["lm_head", "q_proj"]), Silent())


@TIED
def test_an_embedding_with_an_adapter_is_refused(base: Base) -> None:
    with pytest.raises(ModelError, match="is a Embedding, which cannot be merged"):
        merge(adapted(base, target_modules=["embed_tokens"]), Silent())
