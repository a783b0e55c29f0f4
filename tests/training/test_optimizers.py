import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metier.training.optimizers import adamw, muon_and_adam


def test_matrices_are_orthogonalised_and_the_rest_goes_to_adam() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, tie_word_embeddings=True,
        )
    )  # fmt: skip
    muon, adam = muon_and_adam(model, 0.01, 0.0)
    matrices, others = ([id(p) for p in opt.param_groups[0]["params"]] for opt in (muon, adam))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(matrices + others) == sorted(names)
    assert {names[p].split(".")[-2] for p in others} == {
        "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip

    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    muon.step()
    change = torch.linalg.svdvals(model.model.layers[0].mlp.up_proj.weight.detach() - before)
    # Every direction moves about as far; 0.2 sqrt(max dimension) is the size of AdamW's step.
    expected = 0.01 * 0.2 * 24**0.5
    assert 0.5 * expected < change.min()
    assert change.max() < 1.4 * expected


def test_adamw_decays_matrices_and_moves_only_what_is_trained() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw(model, 0.1, 0.5).step()
    for name, parameter in model.named_parameters():
        share = 1 - 0.1 * 0.5 if name == "0.weight" else 1
        assert torch.allclose(parameter, before[name] * share)


def test_a_head_has_a_rate_of_its_own_where_it_is_given_one() -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 2)})
    rates = {
        id(parameter): group["lr"]
        for group in adamw(model, 0.1, 0.5, 0.7).param_groups
        for parameter in group["params"]
    }
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {"model.weight": 0.1, "model.bias": 0.1, "head.weight": 0.7, "head.bias": 0.7}
    assert {group["lr"] for group in adamw(model, 0.1, 0.5).param_groups} == {0.1}
