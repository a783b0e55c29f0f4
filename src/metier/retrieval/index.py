"""What every index offers, and how two rankings become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from metier.errors import DataError

_RANK_OFFSET = 60


@dataclass(frozen=True, slots=True)
class Hit:
    """One text that an index found.

    Attributes:
        position: place of the text in the sequence that the index was built from.
        score: how well it matches; comparable only within one index.

    """

    position: int
    score: float


class Index(Protocol):
    """Finds texts of a fixed sequence."""

    def search(self, query: str, k: int) -> list[Hit]:
        """The at most `k` best texts, best first; equal scores keep the order of the sequence."""
        ...


def require_texts(texts: Sequence[str]) -> None:
    """Refuse an empty sequence.

    Raises:
        DataError: there is no text.

    """
    if not texts:
        raise DataError("retrieval", "there is no text to search in", "give examples or documents")


def reciprocal_rank_fusion(rankings: Sequence[Sequence[int]], k: int) -> list[Hit]:
    """Fuse rankings of positions, each best first, into one of at most `k` hits.

    The score of a position is the sum of 1 / (60 + rank) over the rankings that hold it, ranks
    counted from 1 (Cormack, Clarke and Büttcher 2009, SIGIR).
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, position in enumerate(ranking, start=1):
            scores[position] = scores.get(position, 0.0) + 1.0 / (_RANK_OFFSET + rank)
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return [Hit(position, score) for position, score in best[:k]]
