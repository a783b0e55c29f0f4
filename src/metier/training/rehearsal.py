"""Rehearsal against forgetting: a model goes on saying what its base says.

Before it is tuned, the base writes some text of its own, and its opinion of what follows each token
of it is kept. Each step of the training then also pulls the model towards that, by the divergence
between the two: learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282) on text that the
model wrote itself (pseudo-rehearsal, Robins 1995, doi 10.1080/09540099550039318). Nothing that
forgetting is measured on is looked at.

Of an opinion, the likeliest tokens are kept and some of the others, drawn, which stand for all of
them: so the divergence is right on average, as it is not where the others are left out (Anshumann
et al. 2025, arXiv 2503.16870). They are drawn once: a long training meets the same again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor

from metier.model.backbone import context_of
from metier.model.decoder import Decoder
from metier.progress import Progress, Silent
from metier.training.losses import Criterion, other_opinion
from metier.training.scoring import Scorer

if TYPE_CHECKING:
    from metier.model.load import Base

TEXTS, LENGTH = 512, 64
"""Texts that a base writes, and tokens of each at most, the first included."""
STEP_TEXTS = 2
"""Texts that are looked at in every step."""

_SIDE_BY_SIDE = 256
_LIKELY, _DRAWN = 64, 64
# The least probability, so that there is something to draw where the likely ones hold all.
_LEAST = 1e-30
_FILE = "rehearsal.safetensors"


@dataclass(frozen=True)
class Rehearsal:
    """Texts of a base's own, and its opinion of what follows each of their tokens.

    Attributes:
        ids: of the texts one behind the other, but for the last token of each, shape (tokens,).
        lengths: of the texts, as many as are in `ids`.
        following: tokens that may follow, the likeliest and then those drawn from the others, in
            32 bits, shape (tokens, some).
        logprobs: by the base, the same shape.

    """

    ids: Tensor
    lengths: tuple[int, ...]
    following: Tensor
    logprobs: Tensor

    def save(self, directory: Path) -> None:
        """Write it into a directory."""
        lengths = torch.tensor(self.lengths)
        safetensors.torch.save_file(vars(self) | {"lengths": lengths}, directory / _FILE)

    @classmethod
    def load(cls, directory: Path) -> Rehearsal:
        """Read it from a directory."""
        found = safetensors.torch.load_file(directory / _FILE)
        lengths = tuple(found.pop("lengths").tolist())
        return cls(lengths=lengths, **found)

    def to(self, device: torch.device) -> Rehearsal:
        """The same on a device."""
        moved = (tensor.to(device) for tensor in (self.ids, self.following, self.logprobs))
        ids, following, logprobs = moved
        return Rehearsal(ids, self.lengths, following, logprobs)

    def part(self, places: list[int]) -> Rehearsal:
        """The texts at some places, longest first."""
        places = sorted(places, key=lambda place: -self.lengths[place])
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        tokens = torch.cat([torch.arange(ends[p] - self.lengths[p], ends[p]) for p in places])
        lengths = tuple(self.lengths[place] for place in places)
        return Rehearsal(
            self.ids[tokens],
            lengths,
            self.following[tokens],
            self.logprobs[tokens],
        )

    def opinion(self) -> Criterion:
        """How far a model is from the base's opinion: a likely token counts as likely as it is."""
        likely = self.logprobs[:, :-_DRAWN].exp()
        rest = (1 - likely.sum(1, keepdim=True)).clamp_min(0) / _DRAWN
        weights = torch.cat([likely, rest.expand(-1, _DRAWN)], dim=1)
        return other_opinion(self.following.long(), weights, self.logprobs)


def write(base: Base, progress: Progress | None = None, seed: int = 0) -> Rehearsal:
    """Let a base write texts of its own, drawn by its own probabilities.

    Args:
        base: as it is before it is tuned.
        progress: is told every token.
        seed: of what is drawn.

    Raises:
        ModelError: the base cannot go on from what it read.

    """
    progress = progress or Silent()
    draw = torch.Generator().manual_seed(seed)
    rounds = math.ceil(TEXTS / _SIDE_BY_SIDE)
    progress.stage("the base writes text of its own, against forgetting", rounds * (LENGTH - 1))
    return _joined([part for _ in range(rounds) for part in _write(base, draw, progress)])


def loss(
    score: Scorer, rehearsal: Rehearsal, seed: int, weight: float = 1.0
) -> Callable[[int], Tensor]:
    """Mean divergence per token, in nats, over the texts of a step.

    Args:
        score: of the model in training.
        rehearsal: of its base.
        weight: factor on it.
        seed: which texts a step looks at depends on it and on the step alone.

    """

    def mean(step: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        order = torch.randperm(len(rehearsal.lengths), generator=draw)
        part = rehearsal.part(order[:STEP_TEXTS].tolist()).to(score.device)
        every = torch.ones_like(part.ids, dtype=torch.bool)
        total: Tensor = score(part.ids, part.lengths, every, part.opinion())
        return weight * total / len(part.ids)

    return mean


def _write(base: Base, draw: torch.Generator, progress: Progress) -> Iterator[Rehearsal]:
    """Texts from their beginning to their end, or to the longest that is wanted, one by one."""
    tokenizer, device = base.tokenizer, base.model.device
    first = tokenizer.opening_id
    decoder = Decoder(base.model, [[first]] * _SIDE_BY_SIDE, tokenizer.pad_id)
    tokens, opinions = [torch.full((_SIDE_BY_SIDE,), first)], []
    length = min(LENGTH, context_of(base.model) or LENGTH)
    for place in range(1, length):
        logprobs = torch.log_softmax(decoder.logits.float(), dim=-1).cpu()
        opinions.append(_opinion(logprobs, draw))
        tokens.append(_drawn(logprobs.exp(), 1, draw).squeeze(1))
        progress.advance()
        if place + 1 < length:
            decoder.push(tokens[-1].to(device))
    texts = torch.stack(tokens, dim=1)
    following, logprobs = (torch.stack(part, dim=1) for part in zip(*opinions, strict=True))
    for row, text in enumerate(texts.tolist()):
        end = _end(text, tokenizer.eos_id)
        yield Rehearsal(texts[row, :end], (end,), following[row, :end], logprobs[row, :end])


def _end(text: list[int], eos_id: int) -> int:
    """How many tokens of a text are read: what ends it is not, nor is its last token."""
    return next((at for at, token in enumerate(text) if at and token == eos_id), len(text) - 1)


def _opinion(logprobs: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some tokens of each row of log-probabilities, as `Rehearsal.following`, and theirs."""
    likely = logprobs.topk(min(_LIKELY, logprobs.shape[1] - 1))
    others = logprobs.exp().clamp_min(_LEAST).scatter(1, likely.indices, 0)
    drawn = _drawn(others, _DRAWN, draw)
    return (
        torch.cat([likely.indices, drawn], dim=1).int(),
        torch.cat([likely.values, logprobs.gather(1, drawn)], dim=1),
    )


def _drawn(weights: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Places drawn by weights, shape (rows, count): torch.multinomial takes six times as long."""
    summed = weights.double().cumsum(-1)
    aim = torch.rand((len(weights), count), generator=draw, dtype=torch.float64) * summed[:, -1:]
    return torch.searchsorted(summed, aim)


def _joined(parts: Sequence[Rehearsal]) -> Rehearsal:
    return Rehearsal(
        ids=torch.cat([part.ids for part in parts]),
        lengths=tuple(length for part in parts for length in part.lengths),
        following=torch.cat([part.following for part in parts]),
        logprobs=torch.cat([part.logprobs for part in parts]),
    )
