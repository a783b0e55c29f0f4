"""Real chat templates, read as files from TRL, over a real tokenizer with their control tokens.

The tokenizer is the starter's, so nothing outside the package is needed but TRL's files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

import metier

_SPEC = find_spec("trl")  # a development dependency; it is not imported
if _SPEC is None or _SPEC.origin is None:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail("trl is not installed: its chat templates are what is tested")
    pytest.skip("trl is not installed: pip install -e '.[dev]'", allow_module_level=True)
_TEMPLATES = Path(_SPEC.origin).parent / "chat_templates"

STARTER = Path(metier.__file__).parent / "model" / "starter" / "tokenizer.json"


@dataclass(frozen=True)
class Family:
    """What belongs to a template in the models that ship it.

    Attributes:
        control: its control tokens.
        stop: the one that ends an answer; also EOS and the padding token, unless said otherwise.
        bos: the token at the start, if the models have one.
        eos: EOS where it is another than `stop`.
        stops: more tokens that generation_config.json names.
        system: the template takes a system message.
        tools: the template writes tools, calls and results.
        says_and_calls: the template writes text beside a call.
        swallows: control tokens remove the white space behind them.

    """

    control: tuple[str, ...]
    stop: str
    bos: str = ""
    eos: str = ""
    stops: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    says_and_calls: bool = True
    swallows: bool = False


_LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_COHERE = tuple(
    f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT")
)
_DEEPSEEK = (
    *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", *_THINK),
)
_LFM = (
    *("<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    *("<|tool_response_start|>", "<|tool_response_end|>"),
)
_GPT_OSS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>")
_GEMMA4 = (
    *("<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<|think|>"),
)

_LLAMA_BOS, _GEMMA_BOS = "<|begin_of_text|>", "<bos>"
_QWEN = Family((*_CHATML, *_CALLS), "<|im_end|>", tools=True)
_THINKING = Family((*_CHATML, *_CALLS, *_THINK), "<|im_end|>", tools=True)
_NEMOTRON = Family((*_CHATML, *_CALLS, *_THINK), "<|im_end|>", "<s>", tools=True)
_LFM2 = Family((*_CHATML, *_LFM), "<|im_end|>", "<|startoftext|>", tools=True)
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_DEEPSEEK_FAMILY = Family(_DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>")

FAMILIES = {
    "cohere": Family(_COHERE, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"),
    "cohere2": Family(
        (*_COHERE, "<|START_RESPONSE|>"), "<|END_RESPONSE|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"
    ),
    "deepseek_r1_distill": _DEEPSEEK_FAMILY,
    "deepseekv3": _DEEPSEEK_FAMILY,
    "gemma": Family(
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", _GEMMA_BOS, "<eos>", system=False
    ),
    "gemma3": Family(("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", _GEMMA_BOS, "<eos>"),
    "gemma4_v5": Family(
        _GEMMA4, "<turn|>", _GEMMA_BOS, "<eos>", stops=("<|tool_response>",), tools=True
    ),
    "glm4moe": Family(
        ("[gMASK]", "<sop>", *_PHI[:3], "<|observation|>", *_CALLS, *_THINK),
        "<|endoftext|>",
        tools=True,
    ),
    "gptoss": Family(_GPT_OSS, "<|return|>", stops=("<|call|>",), tools=True),
    "lfm2": Family((*_CHATML, *_LFM), "<|im_end|>", "<|startoftext|>"),
    "lfm2_2_5_v2": Family(
        (*_CHATML, *_LFM[2:], *_THINK), "<|im_end|>", "<|startoftext|>", tools=True
    ),
    "lfm2_v2": _LFM2,
    "llama3": Family(_LLAMA[:3], "<|eot_id|>", _LLAMA_BOS, "<|end_of_text|>"),
    "llama3_1": Family(
        _LLAMA, "<|eot_id|>", _LLAMA_BOS, stops=("<|eom_id|>",), tools=True, says_and_calls=False
    ),
    "llama3_2": Family(
        _LLAMA, "<|eot_id|>", _LLAMA_BOS, stops=("<|eom_id|>",), tools=True, says_and_calls=False
    ),
    "muse_glimmer": Family(
        ("<|start|>", "<|message|>", "<|eot|>", "<|eom|>"),
        "<|eot|>",
        "<|bot|>",
        tools=True,
        says_and_calls=False,
    ),
    "nemotron_3_5_lightning": _NEMOTRON,
    "nemotron_3_nano": _NEMOTRON,
    "nemotron_3_super": _NEMOTRON,
    "nemotron_3_ultra": _NEMOTRON,
    "phi3": Family(_PHI, "<|end|>", "<s>", "<|endoftext|>", swallows=True),
    "phi3_5": Family(_PHI, "<|end|>", "<s>", "<|endoftext|>", swallows=True),
    "qwen2_5": _QWEN,
    "qwen3": _THINKING,
    "qwen3_5_nothink": _THINKING,
    "qwen3_5_think": _THINKING,
    "qwen3_6": _THINKING,
    "qwen3_8": _THINKING,
    "qwen3_instruct_2507": _QWEN,
}


def template_file(name: str) -> Path:
    """A template's file."""
    return _TEMPLATES / f"{name}.jinja"


def write_tokenizer(name: str, family: Family, directory: Path, source: Path = STARTER) -> Path:
    """Write a tokenizer with a family's control tokens and template into a directory."""
    described = json.loads(source.read_text(encoding="utf-8"))
    for token in described["added_tokens"]:
        token["rstrip"] = family.swallows
    known = {token["content"] for token in described["added_tokens"]}
    ids = [*described["model"]["vocab"].values(), *(t["id"] for t in described["added_tokens"])]
    wanted = (family.bos, family.eos, family.stop, *family.stops, *family.control)
    new = [token for token in dict.fromkeys(wanted) if token and token not in known]
    for place, content in enumerate(new, max(ids) + 1):
        flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
        token = {"id": place, "content": content, "rstrip": family.swallows, **flags}
        described["added_tokens"].append(token)
    number = {token["content"]: token["id"] for token in described["added_tokens"]}
    eos = family.eos or family.stop
    config = {
        "eos_token": eos,
        "pad_token": eos,
        "chat_template": template_file(name).read_text(encoding="utf-8"),
        **({"bos_token": family.bos} if family.bos else {}),
    }
    stops = {"eos_token_id": [number[token] for token in (eos, *family.stops)]}
    for file, content in {
        "tokenizer.json": described,
        "tokenizer_config.json": config,
        "generation_config.json": stops,
    }.items():
        (directory / file).write_text(json.dumps(content), encoding="utf-8")
    return directory
