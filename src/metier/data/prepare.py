"""Exact and near-duplicate inputs, found exactly and independent of the order of rows.

Two texts are near-duplicates when the Jaccard similarity of their sets of character 5-grams,
after normalisation, reaches a threshold. All such pairs are found, none by chance: a pair above
the threshold must share one of the rarest 5-grams of both texts (prefix filter of Bayardo, Ma and
Srikant, "Scaling up all pairs similarity search", WWW 2007), so only texts that do are compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from metier.records import Example, input_text

_SHINGLE = 5
# Odd 64-bit constants: one multiplier for each character of a 5-gram (multilinear hashing).
_MULTIPLIERS = (
    0x9E3779B97F4A7C15,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0xD6E8FEB86659FD93,
    0xA0761D6478BD642F,
)
# Candidates compared at once: bounds memory for long texts.
_SLICE = 256
Hashes = npt.NDArray[np.uint64]


def text_of(example: Example) -> str:
    """What makes an input its own: all user, assistant and tool text before the answer."""
    return input_text(example.prompt)


def normalise(text: str) -> str:
    """Compatible Unicode form, case folded, runs of white space made one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def near_duplicate_clusters(texts: Sequence[str], threshold: float) -> list[int]:
    """Number of the near-duplicate cluster of each text.

    Clusters are the connected components of the pairs whose Jaccard similarity of character
    5-grams is at least `threshold`; a cluster's number is the index of its first text. What all
    texts begin and end with (an instruction, a template) is left out of the comparison.

    Args:
        texts: any texts; they are normalised first.
        threshold: between 0 and 1.

    """
    normal = [normalise(text) for text in texts]
    first: dict[str, int] = {}
    for index, text in enumerate(normal):
        first.setdefault(text, index)
    distinct = list(first)
    labels = _Join([_shingles(text) for text in _without_frame(distinct)], threshold).labels()
    cluster = {text: first[distinct[label]] for text, label in zip(distinct, labels, strict=True)}
    return [cluster[text] for text in normal]


def _without_frame(texts: list[str]) -> list[str]:
    """The texts without the prefix and the suffix that all of them share."""
    if len(texts) < 3:
        return texts
    start = _common_prefix(texts)
    rest = [text[start:] for text in texts]
    end = _common_prefix([text[::-1] for text in rest])
    return [text[: len(text) - end] for text in rest]


def _common_prefix(texts: list[str]) -> int:
    first, last = min(texts), max(texts)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def _shingles(text: str) -> Hashes:
    """Sorted 64-bit hashes of the distinct character 5-grams; a shorter text is one of its own."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < _SHINGLE:
        codes = np.pad(codes, (0, _SHINGLE - len(codes)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, _SHINGLE)
    return np.unique((windows * np.array(_MULTIPLIERS, dtype=np.uint64)).sum(1, dtype=np.uint64))


class _Join:
    """All pairs of sets whose Jaccard similarity reaches a threshold, joined into clusters.

    Tokens are numbered by rarity, so the first tokens of a sorted set are its rarest.
    """

    def __init__(self, sets: list[Hashes], threshold: float) -> None:
        self._threshold = threshold
        self._sizes = np.array([len(s) for s in sets], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._tokens = _by_rarity(sets, self._starts)
        self._marks = np.zeros(int(self._tokens.max(initial=0)) + 1, dtype=bool)
        required = np.ceil(threshold * self._sizes - 1e-9).astype(np.int64)
        self._prefixes = self._sizes - required + 1
        owners, at = _ranges(self._starts[:-1], self._prefixes)
        order = np.argsort(self._tokens[at], kind="stable")
        self._owners = owners[order]
        counts = np.bincount(self._tokens[at], minlength=len(self._marks))
        self._postings = np.concatenate([[0], np.cumsum(counts)])

    def labels(self) -> list[int]:
        """For each set, the index of the first set of its cluster."""
        labels = np.arange(len(self._sizes))
        for row in range(len(self._sizes)):
            candidates = self._candidates(row, labels)
            if len(candidates) == 0:
                continue
            slices = np.array_split(candidates, -(-len(candidates) // _SLICE))
            similar = [part[self._similar(row, part)] for part in slices]
            joined = np.unique(labels[np.concatenate(similar)])
            if len(joined):
                target = min(int(joined[0]), int(labels[row]))
                labels[np.isin(labels, [*joined, labels[row]])] = target
        return [int(label) for label in labels]

    def _row(self, row: int, length: int) -> npt.NDArray[np.int64]:
        return self._tokens[self._starts[row] : self._starts[row] + length]

    def _candidates(self, row: int, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows not larger than this one, of other clusters, that may be similar to it.

        Two rows share at most the tokens common to both prefixes and what lies behind one prefix;
        similar rows share at least t / (1 + t) of their sizes together.
        """
        prefix = self._row(row, self._prefixes[row])
        _, at = _ranges(self._postings[prefix], self._postings[prefix + 1] - self._postings[prefix])
        shared = np.bincount(self._owners[at], minlength=len(self._sizes))
        found = np.flatnonzero(shared)
        found = found[labels[found] != labels[row]]
        size, sizes = self._sizes[row], self._sizes[found]
        behind = np.maximum(size - self._prefixes[row], sizes - self._prefixes[found])
        needed = self._threshold / (1 + self._threshold) * (size + sizes) - 1e-9
        near = (sizes >= self._threshold * size - 1e-9) & (shared[found] + behind >= needed)
        smaller = (sizes < size) | ((sizes == size) & (found < row))
        chosen: npt.NDArray[np.int64] = found[near & smaller]
        return chosen

    def _similar(self, row: int, candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        own = self._row(row, self._sizes[row])
        self._marks[own] = True
        sizes = self._sizes[candidates]
        _, at = _ranges(self._starts[candidates], sizes)
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        common = np.add.reduceat(self._marks[self._tokens[at]], offsets, dtype=np.int64)
        self._marks[own] = False
        return common >= self._threshold * (len(own) + sizes - common) - 1e-9


def _ranges(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The positions start, start + 1, ... of several ranges, and which range each belongs to."""
    owners = np.repeat(np.arange(len(starts)), lengths)
    before = np.cumsum(lengths) - lengths
    return owners, np.arange(len(owners)) - before[owners] + starts[owners]


def _by_rarity(sets: list[Hashes], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """All sets one after the other, tokens numbered from the rarest and sorted in each set."""
    if not sets:
        return np.zeros(0, dtype=np.int64)
    _, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    owners = np.repeat(np.arange(len(sets)), np.diff(starts))
    tokens: npt.NDArray[np.int64] = rank[inverse]
    return tokens[np.lexsort((tokens, owners))]


def _find(parents: list[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def _join(parents: list[int], left: int, right: int) -> None:
    low, high = sorted((_find(parents, left), _find(parents, right)))
    parents[high] = low


def components(keys: Iterable[Sequence[str]]) -> list[int]:
    """Connected components of rows that share a key; named by the index of the first row."""
    rows = list(keys)
    parents = list(range(len(rows)))
    first: dict[str, int] = {}
    for row, names in enumerate(rows):
        for name in names:
            _join(parents, row, first.setdefault(name, row))
    return [_find(parents, row) for row in range(len(rows))]
