"""A tagging head on a language model: the spans of a text, such as its entities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metier.model.backbone import hidden_states, inner
from metier.records import Chat, Completion
from metier.text.spans import answer_of
from metier.text.tags import Reading, best_classes, read, spans_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from metier.text.template import Renderer

_BATCH_TOKENS = 8192


class Tagger(nn.Module):
    """A language model with a linear head over the hidden state of each token.

    The head starts at zero, so training starts from equal probabilities.

    Args:
        model: gives hidden states, with or without an adapter.
        labels: names of the classes in the order of the logits: O, then B and I of each type.

    """

    def __init__(self, model: PreTrainedModel | PeftModel, labels: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.labels = tuple(labels)
        width = inner(model).config.get_text_config().hidden_size
        self.head = nn.Linear(width, len(self.labels)).to(model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the spans."""
        return tuple(label.removeprefix("B-") for label in self.labels[1::2])

    def forward(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits of every token, shape (tokens, classes).

        Args:
            ids: of rows one behind the other, shape (tokens,).
            lengths: of the rows, longest first.

        """
        return self.logits(hidden_states(self.model, ids, lengths))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits from final hidden states, shape (tokens, hidden)."""
        found: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return found


class TagGenerator:
    """Answers with the spans of the last user message; satisfies `records.Generator`."""

    def __init__(self, tagger: Tagger, renderer: Renderer) -> None:
        self._tagger, self._renderer = tagger, renderer

    def tokens(self, chat: Chat) -> int:
        """How many tokens are read of a chat."""
        return len(read(self._renderer, chat).ids)

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """The spans of each chat by type, as `text.spans.answer_of` writes them."""
        readings = [read(self._renderer, chat) for chat in chats]
        answers = [""] * len(readings)
        order = sorted(range(len(readings)), key=lambda i: -len(readings[i].ids))
        while order:
            count = max(1, _BATCH_TOKENS // len(readings[order[0]].ids))
            batch, order = order[:count], order[count:]
            found = self._answers([readings[i] for i in batch])
            for place, answer in zip(batch, found, strict=True):
                answers[place] = answer
        return [
            Completion(text=answer, prompt_tokens=len(reading.ids))
            for answer, reading in zip(answers, readings, strict=True)
        ]

    @torch.inference_mode()
    def _answers(self, readings: Sequence[Reading]) -> list[str]:
        """Answers to readings, longest first."""
        self._tagger.eval()
        lengths = [len(reading.ids) for reading in readings]
        ids = torch.tensor(list(chain(*(reading.ids for reading in readings))))
        logits = self._tagger(ids.to(self._tagger.head.weight.device), lengths)
        scores = torch.log_softmax(logits.float(), dim=-1).cpu()
        types, answers = self._tagger.types, []
        for reading, rows in zip(readings, torch.split(scores, lengths), strict=True):
            tokens = [unit.token for unit in reading.units]
            classes = best_classes(rows[tokens].numpy())
            answers.append(answer_of(reading.text, spans_of(reading.units, classes, types)))
        return answers
