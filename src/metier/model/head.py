"""A classification head: one probability for each label of a closed set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metier.errors import ModelError
from metier.model.backbone import hidden_states, inner
from metier.model.calibration import Calibration
from metier.model.encoder import is_encoder
from metier.records import Chat, Completion

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from metier.text.template import Renderer

_WEIGHTS = "head.safetensors"
_LABELS = "labels.json"
_CALIBRATION = "calibration.json"
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
    """A language model or an encoder with a linear head over its pooled hidden states.

    Of a language model the head sees the mean over the prompt and its last token, side by side: no
    other token has read all of it. Of an encoder it sees the mean over all tokens, its special
    ones included: each has read the whole text, and the first of them says little where the
    encoder was not taught to gather a text there (Reimers and Gurevych 2019, arXiv 1908.10084).
    The head starts at zero, so training starts from equal probabilities.

    Args:
        model: with or without an adapter.
        labels: the closed label set, in the order of the logits.

    Attributes:
        calibration: how its logits become answers.

    """

    def __init__(self, model: PreTrainedModel | PeftModel, labels: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.labels = tuple(labels)
        self.calibration = Calibration()
        config = inner(model).config
        self._pool = _mean if is_encoder(config) else _mean_and_last
        pooled = (1 if is_encoder(config) else 2) * config.get_text_config().hidden_size
        self.head = nn.Linear(pooled, len(self.labels)).to(model.device)
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
        found: Tensor = self.head(torch.stack([self._pool(row) for row in rows]))
        return found


def _mean(row: Tensor) -> Tensor:
    """Of hidden states, shape (tokens, hidden)."""
    return row.mean(0)


def _mean_and_last(row: Tensor) -> Tensor:
    return torch.cat((row.mean(0), row[-1]))


class HeadGenerator:
    """Answers with the likeliest label, or all likely ones; satisfies `records.Generator`."""

    def __init__(self, classifier: Classifier, renderer: Renderer) -> None:
        self._classifier, self._renderer = classifier, renderer

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """The answer to each chat with its probability."""
        prompts = [self._renderer.prompt(chat) for chat in chats]
        found: list[Completion | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            count = max(1, _BATCH_TOKENS // len(prompts[order[0]]))
            batch, order = order[:count], order[count:]
            logits = self._logits([prompts[i] for i in batch]).double().cpu().numpy()
            lengths = [len(prompts[i]) for i in batch]
            classifier = self._classifier
            answers = classifier.calibration.answers(logits, classifier.labels, lengths)
            for place, answer in zip(batch, answers, strict=True):
                found[place] = answer
        return [completion for completion in found if completion is not None]

    @torch.inference_mode()
    def _logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._classifier.eval()
        ids = torch.tensor(list(chain(*prompts)), device=self._classifier.head.weight.device)
        found: Tensor = self._classifier(ids, [len(prompt) for prompt in prompts])
        return found


def save_head(headed: Headed, directory: Path) -> None:
    """Write the head and its labels, and its calibration if it has one, beside adapter or model."""
    state = {name: t.detach().cpu().contiguous() for name, t in headed.head.state_dict().items()}
    save_file(state, directory / _WEIGHTS)
    (directory / _LABELS).write_text(json.dumps(headed.labels, ensure_ascii=False))
    if isinstance(headed, Classifier):
        (directory / _CALIBRATION).write_text(json.dumps(asdict(headed.calibration)))


def load_head(model: PreTrainedModel | PeftModel, directory: Path) -> Classifier:
    """Put a saved classification head with its calibration on a model.

    Raises:
        ModelError: the head is missing or does not fit the model.

    """
    classifier = with_head(Classifier, model, directory)
    try:
        calibration = json.loads((directory / _CALIBRATION).read_text())
        temperature, threshold = calibration["temperature"], calibration["threshold"]
        threshold = None if threshold is None else float(threshold)
        classifier.calibration = Calibration(float(temperature), threshold)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unfit(directory, error) from None
    return classifier


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
        raise _unfit(directory, error) from None
    return headed.eval()


def _unfit(directory: Path, error: Exception) -> ModelError:
    cause = f"has no head that fits ({str(error).splitlines()[0]})"
    return ModelError(str(directory), cause, "train the arm again")
