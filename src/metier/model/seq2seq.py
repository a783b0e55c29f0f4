"""Encoder-decoder models (Raffel et al. 2020, arXiv 1910.10683): read a prompt, write an answer.

The encoder reads the prompt, whose tokens look at each other both ways; the decoder writes the
answer behind a start token of its own and looks at all that the encoder read. A row is laid out as
for other models, its prompt and then its answer, and is taken apart here. Rows that are read side
by side are padded on the right: the encoder's padding is masked from both sides, and of the
decoder's, causal attention never sees any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from metier.errors import ModelError
from metier.model.backbone import inner
from metier.model.decoder import Ids, batches, evaluating
from metier.model.rows import cheapest_cut, padded

# Prompt tokens read at once, as in decoder.py: enough for a device, few enough for a processor.
_CHUNK_CPU, _CHUNK = 1024, 8192
# Logits held at once when continuations are scored: 2^25 float32 values are 128 MB.
_LOGITS = 1 << 25
_IGNORED = -100
# Rounding in bfloat16 moves the factor that is seen by less.
_CLOSE = 0.05


def is_seq2seq(model: Any) -> bool:
    """Whether a model has an encoder and a decoder."""
    return bool(model.config.is_encoder_decoder)


def cache_bytes(model: Any) -> int:
    """Bytes that a batch keeps for each of its tokens: keys and values, and what was encoded.

    A prompt's token has keys and values in the cross-attention of every decoder layer, an
    answer's in its self-attention.
    """
    config = model.config
    kept = 2 * config.num_decoder_layers * config.num_heads * config.d_kv + config.d_model
    return int(kept * model.dtype.itemsize)


def name_own_head(model: Any, directory: Path) -> None:
    """Say in a written config.json that the head is not the embeddings', where it is not.

    Transformers 5 sees it in the weights, and writes that they are one, whatever they are. Earlier
    versions, and programs that go by the config, would take the embeddings for the head.
    """
    if not is_seq2seq(model):
        return
    language_model = inner(model)
    head = language_model.get_output_embeddings().weight
    if head is not language_model.get_input_embeddings().weight:
        file = directory / "config.json"
        config = json.loads(file.read_text("utf-8")) | {"tie_word_embeddings": False}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def head_scale(model: Any) -> float:
    """Factor on the decoder's states before the output head.

    It is d_model^-1/2 in T5 1.0, whose head is the embeddings, and 1 in T5 1.1 and Flan-T5, which
    have a head of their own. Which it is, is seen in what the model gives.

    Raises:
        ModelError: its logits are no product of that kind.

    """
    language_model = inner(model)
    probe = torch.arange(8, device=model.device)[None]
    with evaluating(model):
        read = language_model(input_ids=probe, decoder_input_ids=probe)
        states = language_model.get_decoder()(
            input_ids=probe, encoder_hidden_states=read.encoder_last_hidden_state
        ).last_hidden_state
        plain = language_model.get_output_embeddings()(states).float()
        found = float((plain * read.logits.float()).sum() / plain.square().sum())
    for scale in (1.0, float(model.config.d_model**-0.5)):
        if math.isclose(found, scale, rel_tol=_CLOSE):
            return scale
    raise ModelError(
        type(language_model).__name__,
        f"makes its logits in an unknown way (factor {found:.3g})",
        "choose another base",
    )


def answer_states(model: Any, ids: Tensor, lengths: Sequence[int], wanted: Tensor) -> Tensor:
    """States of the decoder from which a row's wanted tokens are to be written.

    Args:
        model: an encoder-decoder.
        ids: of rows one behind the other, each a prompt and then its answer but for the last
            token, shape (tokens,).
        lengths: of the rows, longest first.
        wanted: behind which tokens an answer's token is to follow, shape (tokens,); in each row
            the first of them ends the prompt.

    Returns:
        shape (wanted tokens, hidden).

    """
    rows = torch.split(ids, list(lengths))
    counts = torch.split(wanted, list(lengths))
    ends = [count.tolist().index(True) for count in torch.split(wanted.cpu(), list(lengths))]
    parts = []
    for first, last in cheapest_cut([padded(length) for length in lengths]):
        own = range(first, last)
        encoded = encode(model, [rows[i][: ends[i] + 1] for i in own])
        states = _decode(model, encoded, [rows[i][ends[i] + 1 :] for i in own])
        parts.append(states[_side_by_side([counts[i][ends[i] :] for i in own], fill=0)])
    return torch.cat(parts)


class Encoded:
    """Prompts as the encoder read them.

    Attributes:
        states: shape (rows, longest, hidden).
        mask: 1 for a token, 0 for padding, shape (rows, longest).

    """

    def __init__(self, states: Tensor, mask: Tensor) -> None:
        self.states, self.mask = states, mask

    def rows(self, chosen: Tensor) -> Encoded:
        """Some rows, each as often as it is chosen."""
        return Encoded(self.states[chosen], self.mask[chosen])


def encode(model: Any, prompts: Sequence[Tensor]) -> Encoded:
    """Read prompts side by side; each has shape (length,)."""
    ids = _side_by_side(prompts, fill=0)
    mask = _side_by_side([torch.ones_like(prompt) for prompt in prompts], fill=0)
    encoder = inner(model).get_encoder()
    return Encoded(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def start_id(model: Any) -> int:
    """Id behind which the decoder writes an answer."""
    return int(model.config.decoder_start_token_id)


def forced_inputs(model: Any, ids: Ids, kept: int) -> dict[str, Any]:
    """What a model reads of a prompt and the first `kept` - 1 tokens of an answer behind it.

    It gives logits for `kept` tokens.
    """
    start = len(ids) - kept + 1
    written = [start_id(model), *ids[start:]]
    return {
        "input_ids": torch.tensor([list(ids[:start])], device=model.device),
        "decoder_input_ids": torch.tensor([written], device=model.device),
    }


def _decode(model: Any, encoded: Encoded, written: Sequence[Tensor]) -> Tensor:
    """States behind the start token and behind each token of answers, (rows, longest, hidden)."""
    start = written[0].new_tensor([start_id(model)])
    ids = _side_by_side([torch.cat((start, own)) for own in written], fill=0)
    read = inner(model).get_decoder()(
        input_ids=ids,
        encoder_hidden_states=encoded.states,
        encoder_attention_mask=encoded.mask,
        use_cache=False,
    )
    states: Tensor = read.last_hidden_state
    return states


def _side_by_side(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Rows padded on the right, to one of few lengths (see rows.py)."""
    found = pad_sequence(list(rows), batch_first=True, padding_value=fill)
    return F.pad(found, (0, padded(found.shape[1]) - found.shape[1]), value=fill)


class Seq2SeqDecoder:
    """Rows that write side by side; the interface is that of `decoder.Decoder`.

    All begin with the start token, so what they write has no padding. Prompts are read once.

    Attributes:
        logits: of each row's next token, shape (rows, vocabulary).

    """

    def __init__(self, model: Any, prompts: Sequence[Ids]) -> None:
        self._model = inner(model)
        self._cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with evaluating(self._model):
            self._encoded = _encode_in_chunks(model, prompts)
        self.push(torch.full((len(prompts),), start_id(model), device=model.device))

    def push(self, tokens: Tensor) -> None:
        """Append one token to each row; tokens has shape (rows,)."""
        with evaluating(self._model):
            self.logits: Tensor = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._encoded.states),
                attention_mask=self._encoded.mask,
                decoder_input_ids=tokens[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Let all other rows leave."""
        self._cache.batch_select_indices(rows)
        self._encoded = self._encoded.rows(rows)


def _encode_in_chunks(model: Any, prompts: Sequence[Ids]) -> Encoded:
    """Prompts of similar length are read together; the result is padded to the longest."""
    budget = _CHUNK_CPU if model.device.type == "cpu" else _CHUNK
    order: list[int] = []
    states, masks = [], []
    for chunk in batches([len(prompt) for prompt in prompts], budget):
        read = encode(model, [torch.tensor(prompts[i], device=model.device) for i in chunk])
        order += chunk
        states += list(read.states)
        masks += list(read.mask)
    back = torch.tensor(order, device=model.device).argsort()
    every = Encoded(pad_sequence(states, batch_first=True), pad_sequence(masks, batch_first=True))
    return every.rows(back)


def logprobs(model: Any, pairs: Sequence[tuple[Ids, Ids]], budget: int) -> list[float]:
    """Log-probability (nats) of each answer given its prompt, summed over its tokens.

    Args:
        model: an encoder-decoder.
        pairs: (ids of the prompt, at least one; ids of the answer); a prompt is read once.
        budget: tokens, padding included, that are read at once.

    """
    members: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(pairs):
        members.setdefault(tuple(prompt), []).append(index)
    prompts, sums = list(members), [0.0] * len(pairs)
    weight = model.config.vocab_size * budget / _LOGITS
    with evaluating(model):
        for batch in batches([len(prompt) for prompt in prompts], budget):
            encoded = _encode_in_chunks(model, [prompts[i] for i in batch])
            rows = [(at, index) for at, i in enumerate(batch) for index in members[prompts[i]]]
            room = encoded.mask.shape[1]
            lengths = [len(pairs[index][1]) for _, index in rows]
            sizes = [max(room + length, int(weight * length)) for length in lengths]
            for part in batches(sizes, budget):
                chosen = [rows[i] for i in part]
                own = encoded.rows(torch.tensor([at for at, _ in chosen], device=model.device))
                answers = [pairs[index][1] for _, index in chosen]
                for (_, index), value in zip(chosen, _sums(model, own, answers), strict=True):
                    sums[index] = value
    return sums


def _sums(model: Any, encoded: Encoded, answers: Sequence[Ids]) -> list[float]:
    """Log-probabilities of one batch of answers."""
    written = [torch.tensor([start_id(model), *ids], device=model.device) for ids in answers]
    logits = inner(model)(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
        attention_mask=encoded.mask,
        decoder_input_ids=_side_by_side([ids[:-1] for ids in written], fill=0),
        use_cache=False,
    ).logits
    following = _side_by_side([ids[1:] for ids in written], fill=_IGNORED)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    found: list[float] = (0 - losses.view(len(answers), -1).sum(1)).tolist()
    return found
