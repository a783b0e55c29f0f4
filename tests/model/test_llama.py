import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from metier.model.adapters import add_adapter
from metier.model.backbone import hidden_states
from metier.model.llama import LlamaForward, has_compiler, supports
from metier.model.rows import groups
from metier.task import Lora, Training


def model(kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[1], [9, 9, 9], [200, 190, 40, 30, 3]])
def test_equals_transformers_forward_and_backward(kv_heads: int, lengths: list[int]) -> None:
    net = model(kv_heads)
    ids = torch.randint(0, 90, (sum(lengths),))
    rows = [net.model(input_ids=row[None]).last_hidden_state[0] for row in ids.split(lengths)]
    expected = torch.cat(rows)
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    gradients = {name: p.grad.clone() for name, p in net.model.named_parameters()}
    net.zero_grad()

    forward = LlamaForward(net, torch.float32)
    forward(torch.zeros(5, dtype=torch.long), [3, 2])  # tables grow from what shorter rows needed
    found = forward(ids, lengths)
    (found * probe).sum().backward()
    assert torch.allclose(found, expected, atol=2e-6)
    for name, parameter in net.model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4), name


def test_there_are_several_groups_in_what_is_compared() -> None:
    assert len(groups([200, 190, 40, 30, 3], torch.device("cpu"))) == 2


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler itself looks at it
def test_the_compiled_layer_computes_the_same() -> None:
    net = model(2)
    ids = torch.randint(0, 90, (64,))
    found, gradients = [], []
    for compiled in (False, True):
        net.zero_grad()
        found.append(LlamaForward(net, torch.float32, compiled=compiled)(ids, [32, 32]))
        found[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert torch.allclose(*found, atol=1e-5)
    for plain, compiled_one in zip(*gradients, strict=True):
        assert torch.allclose(plain, compiled_one, atol=1e-3, rtol=1e-4)


def changed(kind: str, lora: Lora, **training: object) -> PeftModel:
    """An adapter whose every parameter has moved from its start."""
    adapted = add_adapter(model(2), kind, Training(lora=lora, **training), 1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.1
    return adapted


@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa"])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_an_adapter_computes_what_peft_computes(kind: str, layers: tuple[int, ...]) -> None:
    adapted = changed(kind, Lora(rank=3, alpha=5), layers=layers)
    assert supports(adapted)
    lengths = [200, 190, 40, 30, 3]
    ids = torch.randint(0, 90, (sum(lengths),))
    expected = hidden_states(adapted, ids, lengths)
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    gradients = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()

    found = LlamaForward(adapted, torch.float32)(ids, lengths)
    (found * probe).sum().backward()
    assert torch.allclose(found, expected, atol=5e-6)
    assert any("lora_A" in name for name in gradients)
    for name, parameter in adapted.named_parameters():
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], atol=2e-3, rtol=1e-4), name
        else:
            assert parameter.grad is None, name


def test_what_it_cannot_compute_is_not_supported() -> None:
    assert supports(model(2))
    for kind in ("lora", "rslora", "pissa"):
        adapted = add_adapter(model(2), kind, Training(lora=Lora(rank=3, dropout=0.1)), 0)
        assert not supports(adapted), kind
    for kind in ("dora", "ia3", "prompt-tuning", "prefix-tuning"):
        assert not supports(add_adapter(model(2), kind, Training(), 0)), kind
    scaled = model(2)
    scaled.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert not supports(scaled)
    biased = model(2)
    biased.config.attention_bias = True
    assert not supports(biased)
