"""Bits per byte of held-out text while a base is pre-trained, source by source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metier.data.stream import TokenFile
from metier.text.bpe import CONTROL_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one source.

    Attributes:
        name: of the source.
        ids: shape (windows, 1 + length), a BOS before each.
        text_bytes: UTF-8 bytes that the tokens after the first stand for.
        trained: False for a source that is only watched.

    """

    name: str
    ids: Tensor
    text_bytes: int
    trained: bool


def spaced_windows(
    file: TokenFile, sizes: NDArray[np.int64], *, count: int, length: int, bos: int
) -> tuple[Tensor, int]:
    """At most `count` evenly spaced windows, shape (windows, 1 + length), and the bytes in them.

    Args:
        file: held-out text.
        sizes: bytes behind each token, from `token_bytes`.
        count: windows wanted; shorter text has fewer, or none.
        length: tokens after the BOS.
        bos: id put in front.

    """
    count = min(count, len(file.ids) // length)
    starts = np.linspace(0, max(0, len(file.ids) - length), count).astype(int)
    rows = [np.asarray(file.ids[start : start + length], dtype=np.int64) for start in starts]
    windows = np.array(rows, dtype=np.int64).reshape(count, length)
    ids = torch.from_numpy(np.insert(windows, 0, bos, axis=1))
    return ids, int(sizes[windows].sum())


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text behind each token, shape (vocabulary,); control tokens have none."""
    # A byte-level token is written with one character per byte.
    sizes = [len(tokenizer.id_to_token(token) or "") for token in range(tokenizer.get_vocab_size())]
    sizes[: len(CONTROL_TOKENS)] = [0] * len(CONTROL_TOKENS)
    return np.array(sizes, dtype=np.int64)


def bits_per_byte(
    loss: Callable[[Tensor], Tensor], held_out: Sequence[HeldOut]
) -> dict[str, float]:
    """Bits per byte of each source; ``loss`` is the mean of those that are trained on.

    Where only watched sources have held-out text, ``loss`` is NaN, which is never the best.

    Args:
        loss: sum of the losses of windows, in nats.
        held_out: the windows.

    """
    figures: dict[str, float] = {}
    for part in held_out:
        nats = sum(float(loss(rows)) for rows in torch.split(part.ids, 4))
        figures[part.name] = nats / math.log(2) / part.text_bytes
    trained = [figures[part.name] for part in held_out if part.trained]
    return figures | {"loss": sum(trained) / len(trained) if trained else math.nan}
