"""The one generation engine: evaluation and serving both call it.

Greedy answers come in batches of prompts of similar length; rows that have stopped leave their
batch. How rows are read and written is in decoder.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from metier.errors import ModelError
from metier.model.backbone import context_of, inner
from metier.model.decoder import (
    Decoder,
    Ids,
    batches,
    evaluating,
    has_plain_cache,
    read_prefix,
    room,
)
from metier.model.prelude import behind
from metier.model.seq2seq import Seq2SeqDecoder, is_seq2seq
from metier.model.seq2seq import logprobs as seq2seq_logprobs
from metier.records import Chat, Completion
from metier.text.pieces import Pieces, before
from metier.text.template import Renderer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Logits held at once when continuations are scored: 2^25 float32 values are 128 MB.
_LOGITS = 1 << 25
# Rows leave a batch once no more than this share of it is still writing.
_LEAVE = 0.75
_IGNORED = -100
# Below this temperature only the likeliest token is left, and logits over it may overflow.
_COLDEST = 1e-5


class Engine:
    """Generates with one model through one renderer; satisfies `records.Generator`.

    Attributes:
        model: a causal language model or an encoder-decoder, with or without an adapter.
        renderer: chat to ids and ids to answer.
        max_new_tokens: longest answer in tokens, its stop token included.
        stop: strings that end every answer and are not part of it.
        batch_tokens: tokens (prompts, padding and answers) that one batch may hold.
        context: longest sequence the model can read, virtual tokens not counted; None where it
            names no limit.

    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        batch_tokens: int = 16_384,
    ) -> None:
        self.model = model
        self.renderer = renderer
        self.max_new_tokens = max_new_tokens
        self.stop = tuple(stop)
        self.batch_tokens = batch_tokens
        self.context = context_of(model)
        self._seq2seq = is_seq2seq(model)
        self._plain = self._seq2seq or has_plain_cache(model)
        self._stops = torch.tensor(sorted(renderer.stop_ids), device=model.device)

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """Greedy answers, in the order of the chats.

        Raises:
            DataError: a chat does not fit the template.
            ModelError: a prompt leaves no room for `max_new_tokens` in the model's context.

        """
        prompts = [self.renderer.prompt(chat) for chat in chats]
        written = self.generate_ids(prompts)
        return [
            Completion(
                text=before(self.renderer.answer(ids), self.stop)[0],
                prompt_tokens=len(prompt),
                completion_tokens=len(ids),
                finished=ids[-1] in self.renderer.stop_ids or self._reached(ids),
            )
            for prompt, ids in zip(prompts, written, strict=True)
        ]

    def generate_ids(self, prompts: Sequence[Ids]) -> list[list[int]]:
        """Greedy continuations of prompts, each with its stop unless it was cut.

        Raises:
            ModelError: a prompt is empty or leaves no room for `max_new_tokens`.

        """
        for index, prompt in enumerate(prompts):
            self._check_room(len(prompt), self.max_new_tokens, f"prompt {index}")
        written: list[list[int]] = [[] for _ in prompts]
        sizes = [len(prompt) for prompt in prompts]
        if self._plain:
            sizes = room(self.model, prompts, self.max_new_tokens)
        for batch in batches(sizes, self.batch_tokens if self._plain else 0):
            with evaluating(self.model):
                answers = self._greedy([prompts[i] for i in batch])
            for index, ids in zip(batch, answers, strict=True):
                written[index] = ids
        return written

    def stream(
        self,
        chat: Chat,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, Completion]:
        """One answer piece by piece; the pieces joined are the whole answer, stripped.

        Args:
            chat: the request, ending with a user message.
            max_new_tokens: longest answer in tokens; by default the engine's.
            temperature: 0 takes the likeliest token, more draws more freely.
            top_p: draw only among the likeliest tokens that hold this share of probability
                (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).
            seed: makes a drawn answer repeatable.
            stop: more strings that end the answer and are not part of it.

        Returns:
            The whole Completion, as the generator's return value.

        Raises:
            DataError: the chat does not fit the template.
            ModelError: the prompt leaves no room in the model's context.

        """
        prompt = self.renderer.prompt(chat)
        limit = max_new_tokens or self.max_new_tokens
        self._check_room(len(prompt), limit, "prompt")
        draw = _Draw(temperature, top_p, seed)
        pieces = Pieces(self.renderer.tokenizer, [*self.stop, *stop])
        finished = False
        for token in self._tokens(prompt, limit, draw):
            if token in self.renderer.stop_ids:
                finished = True
                break
            if piece := pieces.push(token):
                yield piece
            if pieces.stopped:
                finished = True
                break
        if piece := pieces.finish():
            yield piece
        return Completion(
            pieces.text(),
            len(prompt),
            pieces.count + (finished and not pieces.stopped),
            finished,
        )

    def logprobs(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Log-probability (nats) of each continuation given its prompt, summed over tokens.

        A prompt that stands in several pairs is read once.

        Args:
            pairs: (ids of the prompt, at least one; ids of the continuation).

        Raises:
            ModelError: a prompt is empty, or a pair is longer than the context.

        """
        for index, (prompt, continuation) in enumerate(pairs):
            self._check_room(len(prompt), len(continuation), f"pair {index}")
        if self._seq2seq:
            return seq2seq_logprobs(self.model, pairs, self.batch_tokens)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (prompt, _) in enumerate(pairs):
            groups.setdefault(tuple(prompt), []).append(index)
        sums = [0.0] * len(pairs)
        alone: list[_Row] = []
        for prompt, members in groups.items():
            if len(members) == 1 or not self._plain:
                alone += [_Row(i, (*prompt, *pairs[i][1]), len(prompt)) for i in members]
            else:
                after = [_Row(i, (prompt[-1], *pairs[i][1]), 1) for i in members]
                self._score(prompt[:-1], after, sums)
        self._score((), alone, sums)
        return sums

    def _check_room(self, prompt: int, room: int, place: str) -> None:
        if prompt == 0:
            raise ModelError(place, "is empty", "a model continues from at least one token")
        if self.context is not None and prompt + room > self.context:
            raise ModelError(
                place,
                f"has {prompt:,} tokens and {room:,} more are to follow, "
                f"but the model reads at most {self.context:,}",
                "shorten the input, use fewer shots or passages, or lower max_new_tokens",
            )

    def _greedy(self, prompts: list[Ids]) -> list[list[int]]:
        """Continuations of one batch."""
        decoder = self._decoder(prompts)
        device = self.model.device
        written = torch.zeros(len(prompts), self.max_new_tokens, dtype=torch.long, device=device)
        lengths = torch.full((len(prompts),), self.max_new_tokens, device=device)
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        rows = torch.arange(len(prompts), device=device)
        for step in range(self.max_new_tokens):
            tokens = likeliest(decoder.logits)
            written[rows, step] = tokens
            stopped = torch.isin(tokens, self._stops) & alive[rows]
            if self.stop:
                texts = [self._reached(ids) for ids in written[rows, : step + 1].tolist()]
                stopped |= torch.tensor(texts, device=device) & alive[rows]
            lengths[rows[stopped]] = step + 1
            alive[rows[stopped]] = False
            left = int(alive.sum())
            if left == 0 or step + 1 == self.max_new_tokens:
                break
            if left <= _LEAVE * len(rows):
                staying = alive[rows].nonzero().squeeze(1)
                decoder.keep(staying)
                rows, tokens = rows[staying], tokens[staying]
            decoder.push(tokens)
        return [
            ids[:length] for ids, length in zip(written.tolist(), lengths.tolist(), strict=True)
        ]

    def _decoder(self, prompts: list[Ids]) -> Decoder | Seq2SeqDecoder:
        if self._seq2seq:
            return Seq2SeqDecoder(self.model, prompts)
        return Decoder(self.model, prompts, self.renderer.tokenizer.pad_id)

    def _reached(self, ids: Ids) -> bool:
        """Whether the last of an answer's ids brought a stop string into it, or an earlier one."""
        decode = self.renderer.tokenizer.decode
        # Each of its bytes is at most one token: most answers need no more than this look.
        tail = decode(ids[-max((len(text.encode()) for text in self.stop), default=0) - 1 :])
        return any(text in tail for text in self.stop) and before(decode(ids), self.stop)[1]

    def _tokens(self, prompt: Ids, limit: int, draw: _Draw) -> Iterator[int]:
        decoder = self._decoder([prompt])
        for step in range(limit):
            token = draw(decoder.logits[0])
            yield token
            if step + 1 < limit:
                decoder.push(torch.tensor([token], device=self.model.device))

    def _score(self, prefix: Ids, rows: list[_Row], sums: list[float]) -> None:
        """Fill in the sums of rows that all follow one prefix."""
        with evaluating(self.model):
            cache = read_prefix(self.model, prefix)
            vocabulary: int = self.model.config.get_text_config().vocab_size
            # A row takes room for its keys and values, and for the logits of what is read.
            weight = vocabulary * self.batch_tokens / _LOGITS
            sizes = [max(len(prefix) + len(row.ids), int(weight * len(row.ids))) for row in rows]
            for batch in batches(sizes, self.batch_tokens):
                chosen = [rows[i] for i in batch]
                for row, value in zip(chosen, self._sums(cache, chosen), strict=True):
                    sums[row.place] = value

    def _sums(self, cache: Any, rows: list[_Row]) -> list[float]:
        """Sums of one batch, padded on the right, where causal attention never looks."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.renderer.tokenizer.pad_id)
        following = torch.full((len(rows), length), _IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            following[i, row.start - 1 : len(row.ids) - 1] = ids[i, row.start : len(row.ids)]
        first = min(row.start for row in rows) - 1
        output: Any = inner(self.model)(
            input_ids=ids.to(self.model.device),
            logits_to_keep=length - first,
            **behind(cache, len(rows)),
        )
        losses = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(),
            following[:, first:].flatten().to(self.model.device),
            ignore_index=_IGNORED,
            reduction="none",
        )
        sums: list[float] = (0 - losses.view(len(rows), -1).sum(1)).tolist()
        return sums


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the likeliest tokens, shape (...), of logits, (..., vocabulary).

    `argmax` of bfloat16 takes five times as long on a processor, about as long as the output head.
    """
    return logits.max(-1).indices


class _Row(NamedTuple):
    """A sequence to score: its ids from `start` on count, for `place` in the result."""

    place: int
    ids: tuple[int, ...]
    start: int


class _Draw:
    """Chooses a token from logits: the likeliest, or drawn at a temperature."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        if self._temperature < _COLDEST:
            return int(likeliest(logits))
        probabilities = (logits.float().cpu() / self._temperature).softmax(-1)
        ranked, tokens = probabilities.sort(descending=True, stable=True)
        # A token stays while the likelier ones hold less than top_p; the first always stays.
        beyond = ranked.cumsum(0) - ranked >= self._top_p
        beyond[0] = False
        ranked[beyond] = 0
        return int(tokens[torch.multinomial(ranked, 1, generator=self._generator)])
