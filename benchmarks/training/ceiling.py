"""What a training needs in floating-point operations, and what the same cores can do at most."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from training.common import Spec

# Rows, inner size, columns: the products of a step of about 1,500 tokens, and three squares.
_SHAPES = (
    *((1536, 576, columns) for columns in (576, 960, 3072, 49_152)),
    *((1536, inner, 576) for inner in (1536, 3072, 49_152)),
    *((size, size, size) for size in (1024, 2048, 4096)),
)


def lora_operations(
    config: Mapping[str, Any], rank: int, lengths: Sequence[int], trained: int
) -> float:
    """Operations of a step of LoRA on all linear layers of a Llama, embeddings tied.

    ``4 N + 4 H f + 6 Nl`` for every token that is read, and 3 times the forward pass of causal
    attention, of which a token at place t looks at t others: N weights of the layers (forward, and
    the gradient of what they read), H of the head for the share f of tokens that is trained, Nl of
    the adapters (their own gradient besides).

    Args:
        config: of the model, as in config.json.
        rank: of the adapters.
        lengths: tokens that are read of each row: all but its last.
        trained: tokens that the loss looks at.

    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    keys = width // heads * config["num_key_value_heads"]
    sizes = [(width, width), (width, keys), (width, keys), (width, width)]
    sizes += [(width, inner), (width, inner), (inner, width)]
    weights = layers * sum(a * b for a, b in sizes)
    adapters = layers * rank * sum(a + b for a, b in sizes)
    tokens = sum(lengths)
    attention = 2 * width * layers * sum(length**2 for length in lengths)
    head = width * config["vocab_size"] * trained
    return 4.0 * weights * tokens + 4.0 * head + 6.0 * adapters * tokens + 3.0 * attention


def measure(spec: Spec) -> dict[str, Any]:
    """The most operations a second that a bfloat16 product of any shape reaches."""
    torch.set_num_threads(spec["threads"])
    found = {f"{m}x{k}x{n}": _rate(m, k, n, spec["seconds"]) for m, k, n in _SHAPES}
    return {"shapes": found, "operations_per_second": max(found.values())}


def _rate(rows: int, inner: int, columns: int, seconds: float) -> float:
    """Of the fastest of all products that fit into some seconds."""
    a = torch.randn(rows, inner).bfloat16()
    b = torch.randn(columns, inner).bfloat16()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * inner * columns / best
