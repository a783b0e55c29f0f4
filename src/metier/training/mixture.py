"""The micro-batches of pre-training: windows of several lengths over a weighted corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metier.data import stream
from metier.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """A micro-batch of windows: ids of shape (windows, 1 + length)."""

    ids: Tensor

    @property
    def weight(self) -> float:
        """Every token after the first is predicted."""
        return float(self.ids[:, 1:].numel())

    @property
    def tokens(self) -> int:
        """Tokens in it."""
        return self.ids[:, 1:].numel()


class Mixture:
    """The micro-batches of every optimiser step, as a function of the step.

    Args:
        files: tokens of each source, with its weight.
        lengths: window length of each micro-batch of a step.
        micro_tokens: tokens in a micro-batch, a multiple of every length.
        seed: seed of the order.
        tokenizer: tells which tokens end a line, and which one opens a window.

    """

    def __init__(
        self,
        files: Sequence[tuple[stream.TokenFile, float]],
        lengths: Sequence[int],
        micro_tokens: int,
        seed: int,
        tokenizer: Tokenizer,
    ) -> None:
        self._lengths, self._micro = tuple(lengths), micro_tokens
        breaks = _breaks(tokenizer)
        self._windows = {
            length: stream.Windows(
                files,
                length=length,
                seed=seed,
                opening=tokenizer.opening_id,
                eos=tokenizer.eos_id,
                breaks=breaks,
            )
            for length in set(lengths)
        }

    def step(self, index: int) -> list[Window]:
        """Micro-batches of step `index`."""
        done = {
            length: index * self._lengths.count(length) * (self._micro // length)
            for length in self._windows
        }
        batches = []
        for length in self._lengths:
            count = self._micro // length
            rows = [self._windows[length][done[length] + i] for i in range(count)]
            done[length] += count
            batches.append(Window(torch.from_numpy(np.stack(rows))))
        return batches


def _breaks(tokenizer: Tokenizer) -> NDArray[Any]:
    """Tokens after which a paragraph may begin: those that end a line, and the opening one."""
    found = np.zeros(tokenizer.vocab_size, dtype=bool)
    for token in range(len(found)):
        found[token] = tokenizer.decode([token]).endswith("\n")
    found[tokenizer.opening_id] = True
    return found
