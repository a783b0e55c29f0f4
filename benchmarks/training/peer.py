"""The peers' side: TRL and Transformers as their own documentation uses them, with figures taken.

It runs in the peers' environment and may import neither metier nor what needs it. Both sides get
the same rows in the same steps, the same learning rate at every step, AdamW with PyTorch's own
settings and the same clipping; what a *variant* says is how fast the peer is made to go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from training import common
from training.common import Spec, Steps

_IGNORED = -100


class _Clock(TrainerCallback):
    """Tells when training begins and when a step is over."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.loss = steps, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.steps.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.end(self.loss)
        self.loss = 0.0


def _recording(kind: type[Trainer], factors: Sequence[float], clock: _Clock) -> type[Trainer]:
    """A trainer whose losses and tokens are taken down, on a given schedule."""

    class Recording(kind):  # type: ignore[misc,valid-type]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            for ids, labels in _rows(inputs):
                clock.steps.row(ids[:-1], labels[1:])
            loss = super().training_step(model, inputs, num_items_in_batch)
            clock.loss += float(loss)
            return loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: factors[min(step, len(factors) - 1)]
            )
            return self.lr_scheduler

    return Recording


def _rows(inputs: Mapping[str, torch.Tensor]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of the rows of a micro-batch, without padding."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if "position_ids" in inputs:  # rows one behind the other
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            yield ids[0, start:end].tolist(), labels[0, start:end].tolist()
        return
    counts = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else None
    for row in range(len(ids)):
        count = counts[row] if counts else ids.shape[1]
        yield ids[row, :count].tolist(), labels[row, :count].tolist()


def _arguments(spec: Spec) -> dict[str, Any]:
    """What is the same for every variant, and how this one goes about it."""
    variant = spec["variant"]
    return {
        "output_dir": spec["scratch"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": variant["micro"],
        "gradient_accumulation_steps": spec["step_rows"] // variant["micro"],
        "learning_rate": spec["learning_rate"],
        "weight_decay": spec["weight_decay"],
        "train_sampling_strategy": "sequential",
        "bf16": variant["autocast"],
        "gradient_checkpointing": variant["checkpointing"],
        "torch_compile": variant["compile"],
        "seed": spec["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }


def train(spec: Spec) -> dict[str, Any]:
    """Fine-tune with TRL's SFTTrainer."""
    variant, clock = spec["variant"], _Clock(Steps())
    rows = ordered(json.loads(Path(spec["rows"]).read_text("utf-8")), variant["grouped"])
    longest = max(len(ids) for ids in rows["input_ids"])
    arguments = SFTConfig(
        **_arguments(spec),
        max_length=None if variant["padding_free"] else max(longest, 1024),
        padding_free=variant["padding_free"],
        model_init_kwargs={
            "dtype": variant["dtype"],
            "attn_implementation": variant["attention"],
        },
    )
    trainer = _recording(SFTTrainer, spec["factors"], clock)(
        model=spec["base"],
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["base"]),
        peft_config=_lora(spec),
        callbacks=[clock],
    )
    if spec["adapter"]:
        _take_adapter(trainer.model, Path(spec["adapter"]))
    trainer.train()
    return clock.steps.figures() | {"padding": _padding(rows["input_ids"], variant)}


def ordered(found: Mapping[str, Any], grouped: bool) -> dict[str, list[list[int]]]:
    """Ids and labels in the order of the steps; grouped: in each step by length, longest first."""
    places = []
    for step in found["steps"]:
        lengths = {place: len(found["ids"][place]) for place in step}
        places += sorted(step, key=lambda place: -lengths[place]) if grouped else step
    labels = [
        [token if on else _IGNORED for token, on in zip(ids, trained, strict=True)]
        for ids, trained in zip(found["ids"], found["trained"], strict=True)
    ]
    return {
        "input_ids": [found["ids"][place] for place in places],
        "labels": [labels[place] for place in places],
    }


def _padding(rows: Sequence[Sequence[int]], variant: Mapping[str, Any]) -> float:
    """Share of padding in what the model reads."""
    if variant["padding_free"]:
        return 0.0
    micro = variant["micro"]
    parts = [rows[start : start + micro] for start in range(0, len(rows), micro)]
    read = sum(len(part) * max(len(row) for row in part) for part in parts)
    return 1 - sum(len(row) for row in rows) / read


def _lora(spec: Spec) -> LoraConfig | None:
    if spec["method"] == "full":
        return None
    lora = spec["lora"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules="all-linear",
    )


def _take_adapter(model: Any, directory: Path) -> None:
    """Start from the adapter that the other side starts from."""
    found = set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"))
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        raise ValueError(f"the adapter does not fit: {missing} {found.unexpected_keys}")


def pretrain(spec: Spec) -> dict[str, Any]:
    """Pre-train with Transformers' Trainer, with the optimisers that the other side has."""
    clock = _Clock(Steps())
    rows = np.load(spec["windows"], allow_pickle=False)[: spec["steps"]]
    rows = rows.reshape(-1, rows.shape[-1]).tolist()
    torch.manual_seed(spec["seed"])
    model = LlamaForCausalLM(
        LlamaConfig(**spec["config"], attn_implementation=spec["variant"]["attention"])
    )
    optimizer = _Both(model, spec["learning_rate"], spec["weight_decay"])
    trainer = _recording(Trainer, spec["factors"], clock)(
        model=model,
        args=TrainingArguments(**_arguments(spec)),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        callbacks=[clock],
        optimizers=(optimizer, None),
    )
    trainer.train()
    found = clock.steps.figures()
    # A window has one token more than it predicts, as its first one follows nothing. What the other
    # side reads cannot be looked at: its losses tell.
    return found | {"tokens": found["trained"], "contents": [0] * spec["steps"]}


class _Both(torch.optim.Optimizer):
    """Muon for the matrices inside the layers and AdamW for the rest, as one optimiser."""

    def __init__(self, model: torch.nn.Module, rate: float, weight_decay: float) -> None:
        named = list(model.named_parameters())
        inside = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
        super().__init__([*inside, *rest], {"lr": rate})
        muon = torch.optim.Muon(
            inside, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._both = (muon, adam)
        self.param_groups = [*muon.param_groups, *adam.param_groups]

    def step(self, closure: Any = None) -> None:
        for optimizer in self._both:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Nothing is saved."""
        return {}

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing is read."""


@torch.inference_mode()
def generate(spec: Spec) -> dict[str, Any]:
    """Answer all prompts with Transformers' generate, in batches of similar lengths."""
    model = AutoModelForCausalLM.from_pretrained(
        spec["base"], dtype=spec["dtype"] or "bfloat16", attn_implementation="sdpa"
    ).eval()
    batch, prompts = spec["variant"]["batch"], spec["prompts"]
    _answers(model, prompts[: spec["warm"]], batch, spec["new_tokens"])
    began = time.perf_counter()
    written = _answers(model, prompts, batch, spec["new_tokens"])
    return {"seconds": time.perf_counter() - began, "texts": written}


def _answers(model: Any, prompts: list[list[int]], batch: int, most: int) -> list[list[int]]:
    """Greedy continuations, each up to its stop token."""
    end = model.config.eos_token_id
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    written: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        longest = len(prompts[places[0]])
        blanks = [longest - len(prompts[place]) for place in places]
        rows = zip(places, blanks, strict=True)
        ids = torch.tensor([[*[end] * blank, *prompts[place]] for place, blank in rows])
        mask = torch.tensor([[0] * blank + [1] * (longest - blank) for blank in blanks])
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=end,
        )
        for place, text in zip(places, found[:, longest:].tolist(), strict=True):
            written[place] = text[: text.index(end) + 1] if end in text else text
    return written


def start_up(spec: Spec) -> dict[str, Any]:
    """What a user's script does, up to the first step."""
    at = []

    class FirstStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            at.append(time.time())
            control.should_training_stop = True

    SFTTrainer(
        model=spec["base"],
        args=SFTConfig(
            output_dir=spec["scratch"],
            model_init_kwargs={"dtype": "bfloat16"},
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            learning_rate=spec["learning_rate"],
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=load_dataset("json", data_files=spec["pairs"], split="train"),
        peft_config=_lora(spec),
        callbacks=[FirstStep()],
    ).train()
    return {"first_step": at[0]}


if __name__ == "__main__":
    common.serve({"train": train, "pretrain": pretrain, "generate": generate, "start-up": start_up})
