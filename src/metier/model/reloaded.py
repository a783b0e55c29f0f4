"""What anyone does with an exported directory: load it and ask it, with nothing of metier.

A script for a process of its own: ``python -P reloaded.py QUESTIONS ANSWERS LOGITS``. It reads
questions (JSON), writes the answers (JSON) and the logits over given ids (safetensors), and prints
a line for each question that is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
)


def main(questions: str, answers: str, logits: str) -> None:
    """Answer every question greedily, as generation_config.json says."""
    asked = json.loads(Path(questions).read_text("utf-8"))
    torch.set_num_threads(asked["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(asked["directory"])
    model = load(asked)
    found, kept = [], {}
    for number, row in enumerate(asked["rows"]):
        found.append(answer(model, tokenizer, row["messages"]))
        kept[str(number)] = forced(model, row["ids"], row["kept"])
        print(number, flush=True)
    save_file(kept, logits)
    Path(answers).write_text(json.dumps(found), "utf-8")


def load(asked: dict[str, Any]) -> Any:
    """The model of a directory; of one that holds an adapter, its base with the adapter in it."""
    seq2seq = AutoConfig.from_pretrained(asked["base"] or asked["directory"]).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    if asked["base"] is None:
        model: Any = kind.from_pretrained(asked["directory"], dtype="auto")
        return model.to(asked["device"])
    from peft import PeftModel

    dtype = getattr(torch, asked["dtype"])
    # Named here, because the config of any base may name attention code to be fetched.
    base = kind.from_pretrained(
        asked["base"], dtype=dtype, attn_implementation=asked["attention"]
    ).to(asked["device"])
    base.generation_config = GenerationConfig.from_pretrained(asked["directory"])
    return PeftModel.from_pretrained(base, asked["directory"]).eval()


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, messages: Any) -> dict[str, Any]:
    """Ids of the prompt, ids of the answer, and its text."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    whole = model.generate(**inputs)[0].tolist()
    prompt = inputs["input_ids"][0].tolist()
    # An encoder-decoder writes behind one start token alone.
    ids = whole[1 if model.config.is_encoder_decoder else len(prompt) :]
    stops = model.generation_config.eos_token_id
    text = tokenizer.decode([token for token in ids if token not in stops]).strip()
    return {"prompt": prompt, "ids": ids, "text": text}


@torch.inference_mode()
def forced(model: Any, ids: list[int], kept: int) -> torch.Tensor:
    """Logits behind the last `kept` of some ids, shape (kept, vocabulary)."""
    if model.config.is_encoder_decoder:
        start = len(ids) - kept + 1
        written = [model.config.decoder_start_token_id, *ids[start:]]
        inputs = {"input_ids": ids[:start], "decoder_input_ids": written}
        read = {name: torch.tensor([own], device=model.device) for name, own in inputs.items()}
        logits: torch.Tensor = model(**read).logits
    else:
        row = torch.tensor([ids], device=model.device)
        logits = model(input_ids=row, logits_to_keep=kept).logits
    return logits[0].float().cpu().contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
