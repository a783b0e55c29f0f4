"""A classification head on a language model: one probability for each label of a closed set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metier.errors import ModelError
from metier.model.backbone import hidden_states, inner
from metier.records import Chat, Completion

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from metier.text.template import Renderer

_WEIGHTS = "head.safetensors"
_LABELS = "labels.json"
_BATCH_TOKENS = 8192


class Headed(Protocol):
    """A language model with a head that knows names for its logits."""

    labels: tuple[str, ...]
    head: nn.Linear

    def eval(self) -> Self:
        """Turn dropout off."""
        ...


H = TypeVar("H", bound=Headed)


class Classifier(nn.Module):
    """A language model with a linear head over its pooled hidden states.

    The head sees the mean over the prompt and its last token, side by side. It starts at zero,
    so training starts from equal probabilities.

    Args:
        model: a causal language model, with or without an adapter.
        labels: the closed label set, in the order of the logits.

    """

    def __init__(self, model: PreTrainedModel | PeftModel, labels: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.labels = tuple(labels)
        width = inner(model).config.get_text_config().hidden_size
        self.head = nn.Linear(2 * width, len(self.labels)).to(model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits, shape (rows, labels), of prompts.

        Args:
            ids: of the prompts one behind the other, shape (tokens,).
            lengths: of the prompts, longest first.

        """
        return self.logits(hidden_states(self.model, ids, lengths), lengths)

    def logits(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits from final hidden states, shape (tokens, hidden)."""
        rows = torch.split(hidden.to(self.head.weight.dtype), list(lengths))
        pooled = [torch.cat((row.mean(0), row[-1])) for row in rows]
        found: Tensor = self.head(torch.stack(pooled))
        return found


class HeadGenerator:
    """Answers with the likeliest label; satisfies `records.Generator`."""

    def __init__(self, classifier: Classifier, renderer: Renderer) -> None:
        self._classifier, self._renderer = classifier, renderer

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """The likeliest label of each chat with its probability."""
        prompts = [self._renderer.prompt(chat) for chat in chats]
        found: list[Completion | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            count = max(1, _BATCH_TOKENS // len(prompts[order[0]]))
            batch, order = order[:count], order[count:]
            chances = self._probabilities([prompts[i] for i in batch])
            for place, row in zip(batch, chances, strict=True):
                best = int(row.argmax())
                found[place] = Completion(
                    text=self._classifier.labels[best],
                    prompt_tokens=len(prompts[place]),
                    probability=float(row[best]),
                )
        return [completion for completion in found if completion is not None]

    @torch.inference_mode()
    def _probabilities(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._classifier.eval()
        ids = torch.tensor(list(chain(*prompts)), device=self._classifier.head.weight.device)
        return torch.softmax(self._classifier(ids, [len(prompt) for prompt in prompts]), dim=-1)


def save_head(headed: Headed, directory: Path) -> None:
    """Write the head and its labels beside the adapter or model."""
    state = {name: t.detach().cpu().contiguous() for name, t in headed.head.state_dict().items()}
    save_file(state, directory / _WEIGHTS)
    (directory / _LABELS).write_text(json.dumps(headed.labels, ensure_ascii=False))


def load_head(model: PreTrainedModel | PeftModel, directory: Path) -> Classifier:
    """Put a saved classification head on a model; see `with_head`."""
    return with_head(Classifier, model, directory)


def with_head(
    kind: Callable[[Any, Sequence[str]], H], model: PreTrainedModel | PeftModel, directory: Path
) -> H:
    """Put a saved head of some kind on a model.

    Raises:
        ModelError: the head is missing or does not fit the model.

    """
    try:
        headed = kind(model, json.loads((directory / _LABELS).read_text()))
        headed.head.load_state_dict(load_file(directory / _WEIGHTS))
    except (OSError, ValueError, RuntimeError) as error:
        cause = f"has no head that fits ({str(error).splitlines()[0]})"
        raise ModelError(str(directory), cause, "train the arm again") from None
    return headed.eval()
