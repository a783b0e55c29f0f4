"""Rows of one batch that read their prompts and then write side by side.

Prompts are read in chunks padded on the right, where causal attention needs no mask; what they
have in common at the start is read once. Their keys and values then lie padded on the left in
buffers with free slots, so that all rows write their next token at the same place::

    slot      0   1   2   3   4   5   6  ...
    row 0     -   a   b   c   d   e   .        - blank   . free
    row 1     -   -   -   -   x   y   .

On a processor what they have in common stays apart, once for all rows (`attention.Start`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from metier.errors import ModelError
from metier.model.attention import BY_PRODUCTS, Start, behind_start
from metier.model.backbone import inner
from metier.model.prelude import prelude, repeated, virtual_tokens

Ids = Sequence[int]

# Prompt tokens read at once: enough to keep the device busy, few enough for a processor's cache.
_CHUNK_CPU, _CHUNK = 1024, 8192
# A shorter common start is not worth reading apart.
_SHARED = 16
# Slots that buffers grow by.
_BLOCK = 64


class Decoder:
    """Rows that write side by side.

    Models whose memory is more than keys and values (state-space, linear attention) need prompts
    of one length, and no row can leave.

    Attributes:
        logits: of each row's next token, shape (rows, vocabulary).

    """

    def __init__(self, model: Any, prompts: Sequence[Ids], pad_id: int) -> None:
        self._model = inner(model)
        self._device = model.device
        self._cache: Any = None
        self._mask: torch.Tensor | None = None
        self._start: Start | None = None
        if not has_plain_cache(model):
            self._next = torch.tensor([[len(prompt)] for prompt in prompts], device=self._device)
            ids = torch.tensor([list(prompt) for prompt in prompts], device=self._device)
            self.logits = self._forward(ids, None)
            return
        self._start = _start_of(model, prompts)
        self._read(model, prompts, pad_id)
        if self._start and not self._start.was_read:  # a family that attends in a way of its own
            self._start = None
            self._read(model, prompts, pad_id)

    def _read(self, model: Any, prompts: Sequence[Ids], pad_id: int) -> None:
        """Read prompts, of which the last token gives the first logits."""
        with evaluating(model):
            self._cache = _read(model, [prompt[:-1] for prompt in prompts], pad_id, self._start)
        before = virtual_tokens(model)
        counts = torch.tensor([[before + len(prompt)] for prompt in prompts], device=self._device)
        own = counts - (self._start.length if self._start else 0)
        # Slot 0 is blank in every row: with nothing masked at all, PyTorch's attention takes a
        # path that is several times slower for grouped heads in bfloat16.
        self._used = int(own.max())
        slots = torch.arange(_blocks(self._used), device=self._device)
        self._mask = (slots > self._used - own) & (slots < self._used)
        self._next = counts - 1
        self.push(torch.tensor([prompt[-1] for prompt in prompts], device=self._device))

    def push(self, tokens: torch.Tensor) -> None:
        """Append one token to each row; tokens has shape (rows,)."""
        if self._mask is not None:
            self._used += 1
            more = _blocks(self._used) - self._mask.shape[1]
            self._mask = torch.nn.functional.pad(self._mask, (0, more))
            self._mask[:, self._used - 1] = True
        self.logits = self._forward(tokens[:, None], self._next)
        self._next = self._next + 1

    def keep(self, rows: torch.Tensor) -> None:
        """Let all other rows leave."""
        self._cache.batch_select_indices(rows)
        self._next = self._next[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        with evaluating(self._model), _attending_by_products(self._model, self._start):
            output = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ModelError(
                type(self._model).__name__,
                "remembers what it read in a way of its own, which cannot be continued here",
                "choose a base with an attention cache",
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class _Buffers(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, shape (rows, heads, slots, size).

    Slots come in blocks: those behind the last one in use are blank and masked. So the buffers lie
    in one piece, which products need, and are rarely made anew.
    """

    def __init__(self, rows: int, used: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows, self._used = rows, used

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers for heads like these."""
        self.keys, self.values = self._make(key_states), self._make(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next slots of all rows; returns all slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._used = self._used, self._used + key_states.shape[-2]
        more = _blocks(self._used) - self.keys.shape[-2]
        if more > 0:
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))
        self.keys[:, :, start : self._used] = key_states
        self.values[:, :, start : self._used] = value_states
        return self.keys, self.values

    def place(self, row: int, count: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the first `count` keys and values, (heads, n, size), at the end of a row."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        start = self._used - count
        self.keys[row, :, start : self._used] = keys[:, :count]
        self.values[row, :, start : self._used] = values[:, :count]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots there will be once so many tokens are written, and the first of them."""
        return _blocks(self._used + query_length), 0

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self._used

    def _make(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._rows, like.shape[1], _blocks(self._used), like.shape[3])


def _blocks(slots: int) -> int:
    """Slots in whole blocks."""
    return math.ceil(slots / _BLOCK) * _BLOCK


@contextlib.contextmanager
def _attending_by_products(model: Any, start: Start | None) -> Iterator[None]:
    """Let a model on a processor attend by `attention.by_products` instead of the fused kernel."""
    if not _can_attend_by_products(model):
        yield
        return
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = BY_PRODUCTS
    try:
        with behind_start(start):
            yield
    finally:
        config._attn_implementation = usual


def _can_attend_by_products(model: Any) -> bool:
    usual = model.config.get_text_config()._attn_implementation
    return bool(model.device.type == "cpu" and usual in ("sdpa", BY_PRODUCTS))


def _keeps_start_apart(model: Any) -> bool:
    """Whether what rows have in common can lie in memory once."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    whole = all(type(layer) is DynamicLayer for layer in layers)  # none forgets what is far away
    return whole and _can_attend_by_products(model)


def _start_of(model: Any, prompts: Sequence[Ids]) -> Start | None:
    """What all prompts have in common, virtual tokens included, if it is to be kept apart."""
    if len(prompts) == 1 or not _keeps_start_apart(model):
        return None
    bodies = [prompt[:-1] for prompt in prompts]
    with evaluating(model):
        cache = read_prefix(model, bodies[0][: _common_start(bodies)])
    return Start([(layer.keys[0], layer.values[0]) for layer in cache.layers]) if cache else None


def room(model: Any, prompts: Sequence[Ids], new_tokens: int) -> list[int]:
    """Tokens that are held for each prompt and its answer, without those that are held once."""
    bodies = [prompt[:-1] for prompt in prompts]
    once = _common_start(bodies) if bodies and _keeps_start_apart(model) else 0
    return [len(prompt) - once + new_tokens for prompt in prompts]


def has_plain_cache(model: Any) -> bool:
    """Whether a model remembers by keys and values alone."""
    if getattr(model, "_is_stateful", False):
        return False
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def read_prefix(model: Any, prefix: Ids) -> Any:
    """Cache of one prefix behind the model's virtual tokens, for `repeated`; None for nothing."""
    before = prelude(model)
    return _read_chunk(model, before, [prefix], 0) if prefix else before


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, each within a token budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found: list[list[int]] = []
    for index in order:
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= budget:
            found[-1].append(index)
        else:
            found.append([index])
    return found


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients and no dropout, whatever the model was doing before."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def _read(model: Any, bodies: Sequence[Ids], pad_id: int, start: Start | None) -> Cache:
    """Read prompts into buffers, without the start that is kept apart."""
    before = virtual_tokens(model)
    common = start.length - before if start else _common_start(bodies)
    prefix = None if start else read_prefix(model, bodies[0][:common])
    # What of the tokens before a row's own lies in its buffer.
    copied = 0 if start else before + common
    make = partial(_Buffers, len(bodies), 1 + copied - common + max(len(body) for body in bodies))
    layers: list[_Buffers] = []
    budget = _CHUNK_CPU if model.device.type == "cpu" else _CHUNK
    for chunk in batches([len(body) - common for body in bodies], budget):
        rows = [bodies[row][common:] for row in chunk]
        if not prefix and not any(rows):
            continue
        with _attending_by_products(model, start) if start else contextlib.nullcontext():
            found = _read_chunk(model, prefix, rows, pad_id, start.length if start else 0)
        layers = layers or [make() for _ in found.layers]
        for layer, read in zip(layers, found.layers, strict=True):
            for place, row in enumerate(rows):
                layer.place(chunk[place], copied + len(row), read.keys[place], read.values[place])
    if not layers:  # prompts of one token: nothing was read yet
        layers = [make() for _ in range(model.config.get_text_config().num_hidden_layers)]
    return Cache(layers=list(layers))


def _read_chunk(
    model: Any, prefix: Any, suffixes: list[Ids], pad_id: int, position: int = 0
) -> Any:
    """Cache of some prompts, the prefix included, padded on the right.

    Where what stands before them is no part of the cache, `position` is that of their first token.
    """
    cache = repeated(prefix, len(suffixes)) if prefix else DynamicCache()
    length = max(len(suffix) for suffix in suffixes)
    if length == 0:
        return cache
    padded = [[*suffix, *[pad_id] * (length - len(suffix))] for suffix in suffixes]
    ids = torch.tensor(padded, device=model.device)
    places = torch.arange(position, position + length, device=model.device)[None]
    return inner(model)(
        input_ids=ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **({"position_ids": places} if position else {}),
    ).past_key_values


def _common_start(bodies: Sequence[Ids]) -> int:
    """Length of what all prompts begin with; 0 where it is not worth reading apart."""
    first, last = min(bodies, key=tuple), max(bodies, key=tuple)
    pairs = zip(first, last, strict=False)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
    return common if len(bodies) > 1 and common >= _SHARED else 0
