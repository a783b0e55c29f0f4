"""Small trainings that one process or several compute; run by torchrun, it writes what two find."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from metier.model.adapters import add_adapter
from metier.model.backbone import inner
from metier.model.world import World, gathered, joined, shard
from metier.task import Lora, Training
from metier.training import sft
from metier.training.batches import Row, RowBatches
from metier.training.loop import Loop, Plan, State
from metier.training.rehearsal import Rehearsal
from metier.training.rehearsal import loss as rehearsal_loss
from metier.training.scoring import Scorer
from metier.training.sft import answer_judge, answer_loss, fit

VOCABULARY = 97
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
        )
    ),
}
METHODS = ("full", "lora")
CASES = [(family, method) for family in FAMILIES for method in METHODS]
DIES_AT = 9


def model_of(family: str, method: str, dropout: float = 0.0) -> Any:
    """A small model in float64; the second matrices of its adapter are not zero."""
    torch.manual_seed(0)
    model = FAMILIES[family]().double()
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, LlamaRMSNorm):  # which would compute in float32
                exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon)
                setattr(parent, name, exact.double())
    if method == "full":
        return model
    adapted = add_adapter(model, "lora", Training(lora=Lora(rank=3, dropout=dropout)), 0).double()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=draw)
    return adapted


def rows(count: int = 9) -> list[Row]:
    """Rows of very different lengths, some of their tokens trained."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        length = int(torch.randint(3, 50, (1,), generator=draw))
        ids = torch.randint(0, VOCABULARY, (length,), generator=draw).tolist()
        trained = (torch.rand(length, generator=draw) < 0.4).tolist()
        found.append(Row(tuple(ids), (False, *trained[1:-1], True), -1))
    return found


def gradients(
    family: str, method: str, micro_tokens: int, world: World, *, sharded: bool = False
) -> dict[str, Tensor]:
    """Gradients of one step of the loop over all rows: what plain descent at rate 1 takes off."""
    model = model_of(family, method)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in names.items()}
    if sharded:
        shard(inner(model), world)
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batches = RowBatches(rows(), step_rows=100, micro_tokens=micro_tokens, seed=0)
    kinds = [[p for p in names.values() if hasattr(p, "full_tensor") == kind] for kind in (0, 1)]
    descent = [torch.optim.SGD(kind, lr=1.0, foreach=False) for kind in kinds if kind]
    plan = Plan(steps=1, schedule=lambda _: 1.0, clip=0.0)
    Loop(model, answer_loss(Scorer(model)), batches, descent, plan, world=world).run()
    after = gathered({name: p.detach() for name, p in names.items()}, world)
    return {name: before[name] - value for name, value in after.items()}


def opinions() -> Rehearsal:
    """Of another model, on texts of its own."""
    draw = torch.Generator().manual_seed(3)
    lengths = (7, 12, 5, 9)
    following = torch.randint(0, VOCABULARY, (sum(lengths), 70), generator=draw)
    logprobs = torch.randn(following.shape, generator=draw).log_softmax(-1)
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=draw)
    return Rehearsal(ids, lengths, following.int(), logprobs)


def train(
    directory: Path, world: World, *, sharded: bool = False, dies_at: int | None = None
) -> State:
    """A LoRA with dropout and rehearsal; process 1 may kill itself in a step."""
    sft._CHECKPOINT_SECONDS = 0.0
    model = model_of("llama", "lora", dropout=0.3)
    if sharded:
        shard(inner(model), world)
    score = Scorer(model)
    loss, begun = answer_loss(score), 0

    def counted(batch: Any) -> Tensor:
        nonlocal begun
        begun += 1
        if begun == dies_at and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(batch)

    settings = Training(epochs=4, batch_size=3, patience=0)
    return fit(
        model,
        counted,
        rows(),
        rows(3),
        settings,
        learning_rate=3e-3,
        seed=0,
        judge=answer_judge(score),
        also=rehearsal_loss(score, opinions(), 0),
        directory=directory,
        world=world,
    )


def main(out: Path) -> None:
    """Everything that two processes are to show; the last training is killed."""
    sft.MICRO_TOKENS = 64
    with joined() as world:
        for family, method in CASES:
            for sharded in (False, True):
                found = gradients(family, method, 64, world, sharded=sharded)
                if world.first:
                    kind = "sharded" if sharded else "whole"
                    save_file(found, out / f"{family}-{method}-{kind}.safetensors")
        for sharded in (False, True):
            train(out / f"whole-{sharded}", world, sharded=sharded)
        train(out / "killed-True", world, sharded=True, dies_at=DIES_AT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
