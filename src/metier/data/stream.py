"""Read large corpora as streams, in constant memory, and keep them as token files.

A corpus is several weighted *sources*. Their documents are tokenised once into flat files that
training maps into memory; the windows it reads there are a function of (seed, index) alone, so a
run resumes exactly and a corpus larger than memory costs no more of it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from metier import runs
from metier.config import Config
from metier.data.files import file_errors, open_binary, text_lines
from metier.errors import DataError

MAX_DOCUMENT = 16_000_000
_PIECE = 20_000
_BATCH = 256
_BATCH_BYTES = 2_000_000
# A tokenizer that keeps line ends, and spaces before words, in tokens of their own or with what
# follows (`text.bpe` does) sees the same two parts on both sides of these places.
_BETWEEN_TOKENS = re.compile(r"(?s).+(?:(?<=\n)(?=\S)|(?<=\S)(?= ))")


class Source(Config):
    """One part of a corpus."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name in logs and figures."""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs: JSON lines or plain text (one document a file, several in a file of more
    than 16 million characters), also .gz and .zst."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Passes over this source in one pass of the corpus, as in The Pile (Gao et al. 2020,
    arXiv 2101.00027); 0 keeps it for evaluation only."""
    field: str = "text"
    """Field of a JSON line that holds the text."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents kept for held-out figures, chosen by hash."""


@dataclass(frozen=True)
class Document:
    """One text and where it was read."""

    text: str
    place: str


def documents(source: Source, base: Path) -> Iterator[Document]:
    """Stream the documents of a source, in the order of its sorted files.

    Raises:
        DataError: no file matches, or a file or line cannot be read.

    """
    for path in matching_files(source, base):
        with open_binary(path) as handle, file_errors(path):
            if _plain_name(path).endswith((".jsonl", ".json")):
                yield from _json_lines(path, handle, source.field)
            else:
                yield from _whole_text(path, handle)


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is kept for held-out figures: a function of its text alone."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def matching_files(source: Source, base: Path) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        DataError: a path or glob matches no file.

    """
    found: set[Path] = set()
    for pattern in source.files:
        names = [pattern, *glob.glob(pattern, root_dir=base, recursive=True)]
        matches = [base / name for name in names if (base / name).is_file()]
        if not matches:
            raise DataError(
                f"source '{source.name}'", f"no file matches '{base / pattern}'", "check the path"
            )
        found.update(matches)
    return sorted(found)


def file_hashes(source: Source, base: Path) -> dict[str, str]:
    """SHA-256 of every file of a source, by its path from `base` (the whole path outside it).

    Content and not time of change: a copied or touched corpus is still the same one.
    """
    return {
        path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path): (
            runs.file_hash(path)
        )
        for path in matching_files(source, base)
    }


def refuse_edits(source: Source, base: Path, hashes: Mapping[str, str]) -> None:
    """Make sure that the files of a source are still those of `file_hashes`.

    Raises:
        DataError: one was changed, added or removed since.

    """
    found = file_hashes(source, base)
    for name in sorted(found.keys() | hashes.keys()):
        if found.get(name) != hashes.get(name):
            raise DataError(
                str(base / name),
                "was changed while it was read",
                "leave it as it is now and give the same command again: it begins with this text",
            )


def _plain_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".zst")


def _whole_text(path: Path, handle: BinaryIO) -> Iterator[Document]:
    line = 1
    try:
        for text in _blocks(handle):
            if "\0" in text:
                raise DataError(
                    f"{path}:{line}",
                    "a NUL byte stands in or after this line",
                    "is this a binary or UTF-16 file? Save it as plain UTF-8 text",
                )
            yield Document(_unix(text), f"{path}:{line}")
            line += text.count("\n")
    except UnicodeDecodeError as error:
        cause = f"is not UTF-8 in or after this line ({error.reason})"
        raise DataError(f"{path}:{line}", cause, "save the file as UTF-8") from None


def _blocks(handle: BinaryIO) -> Iterator[str]:
    """The text of a file, whole or in parts of at most MAX_DOCUMENT characters."""
    with io.TextIOWrapper(handle, encoding="utf-8-sig", newline="\n") as reader:
        text = reader.read(MAX_DOCUMENT)
        while len(text) == MAX_DOCUMENT:
            end = _cut(text, 0, MAX_DOCUMENT)
            yield text[:end]
            text = text[end:] + reader.read(end)
        if text:
            yield text


def _json_lines(path: Path, handle: BinaryIO, field: str) -> Iterator[Document]:
    for number, line in enumerate(text_lines(path, handle), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                place, f"is no JSON object with the field '{field}' ({error})", "mend the line"
            ) from None
        if not isinstance(text, str):
            raise DataError(place, f"the field '{field}' is not text", "give text")
        if re.search("[\ud800-\udfff]", text):
            raise DataError(
                place, f"the field '{field}' holds half a character", "mend the \\u escape"
            )
        yield Document(_unix(text), place)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


class TokenFile:
    """A flat file of token ids, mapped into memory.

    Attributes:
        name: of the source it was made from.
        ids: shape (tokens,), little-endian uint16 or uint32.
        text_bytes: UTF-8 bytes of the text behind them.

    """

    def __init__(self, path: Path) -> None:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.name = path.stem
        self.text_bytes: int = about["bytes"]
        empty = path.stat().st_size == 0  # which cannot be mapped
        self.ids: NDArray[Any] = (
            np.zeros(0, dtype=about["dtype"])
            if empty
            else np.memmap(path, dtype=about["dtype"], mode="r")
        )


def write_tokens(
    texts: Iterator[str],
    encode: Callable[[list[str]], list[list[int]]],
    path: Path,
    *,
    bos: int,
    eos: int,
    vocabulary: int,
) -> None:
    """Tokenise a stream of documents into a TokenFile: ``bos text eos`` for each.

    `encode` is given at most 2 MB of text at once, so a long document in several pieces.
    """
    dtype = "<u2" if vocabulary <= 65_536 else "<u4"
    size = 0
    with path.open("wb") as handle:
        for batch in _batches(_pieces(texts)):
            size += sum(piece.bytes for piece in batch)
            for piece, ids in zip(batch, encode([piece.text for piece in batch]), strict=True):
                row = [bos] * piece.first + ids + [eos] * piece.last
                handle.write(np.array(row, dtype=dtype).tobytes())
    about = {"dtype": dtype, "bytes": size}
    path.with_suffix(".json").write_text(json.dumps(about))


class _Piece(NamedTuple):
    """Part of a document, and whether it is the first and the last one."""

    text: str
    bytes: int
    first: bool
    last: bool


def _pieces(texts: Iterator[str]) -> Iterator[_Piece]:
    for text in texts:
        start, end = 0, -1
        while end < len(text):
            end = _cut(text, start, start + _PIECE) if len(text) > start + _PIECE else len(text)
            piece = text[start:end]
            yield _Piece(piece, len(piece.encode()), start == 0, end == len(text))
            start = end


def _cut(text: str, start: int, end: int) -> int:
    """Where to end a piece of ``text[start:end]``: the last place that parts no token, if any."""
    found = _BETWEEN_TOKENS.match(text, start, end)
    return found.end() if found else end


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in order, in batches bounded by their number and their bytes."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and (len(batch) == _BATCH or size + piece.bytes > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.bytes
    if batch:
        yield batch


def permute(index: int, size: int, key: int) -> int:
    """Place of `index` in a pseudo-random permutation of ``range(size)``, in constant memory.

    A four-round Feistel network over the next power of four, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(f"{key}:{turn}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "big") & mask)
        index = left << half | right
        if index < size:
            return index


class Windows:
    """Windows of ``1 + length`` tokens over weighted token files, in a seeded endless order.

    A file is a ring of slots of `length` tokens, and in every pass each slot starts as many windows
    as its file's weight says. A window is one BOS and `length` tokens from the first paragraph that
    begins in its slot, so that BOS means the start of one wherever there is one. Each pass shifts
    the slots, so that their edges fall elsewhere.
    """

    def __init__(
        self,
        files: Sequence[tuple[TokenFile, float]],
        *,
        length: int,
        seed: int,
        bos: int,
        breaks: NDArray[Any],
    ) -> None:
        """Lay windows over the files.

        Args:
            files: token files with their weights.
            length: tokens after the BOS.
            seed: of the order.
            bos: id put in front.
            breaks: shape (vocabulary,), True for tokens after which a paragraph may begin.

        """
        self._files = [(file, weight) for file, weight in files if weight > 0]
        self.length, self._seed, self._bos, self._breaks = length, seed, bos, breaks
        for file, _ in self._files:
            if len(file.ids) < length:
                raise DataError(
                    f"source '{file.name}'",
                    f"has {len(file.ids):,} tokens to train on, less than a window of {length:,}",
                    "give more text or shorter windows, or leave it out",
                )
        self._counts = [
            max(1, round(len(file.ids) // length * weight)) for file, weight in self._files
        ]
        self.count = sum(self._counts)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Token ids of window `index` (any non-negative number), shape (1 + length,)."""
        epoch, place = divmod(index, self.count)
        place = permute(place, self.count, self._seed * 1_000_003 + epoch)
        for (file, _), count in zip(self._files, self._counts, strict=True):
            if place < count:
                return self._window(file, place + epoch * count, epoch)
            place -= count
        raise IndexError(index)

    def _window(self, file: TokenFile, place: int, epoch: int) -> NDArray[np.int64]:
        shift = permute(epoch % self.length, self.length, self._seed)
        start = place % (len(file.ids) // self.length) * self.length + shift
        found = np.flatnonzero(self._breaks[self._slice(file, start)])
        start += int(found[0]) + 1 if len(found) else 0
        return np.concatenate((np.array([self._bos]), self._slice(file, start)))

    def _slice(self, file: TokenFile, start: int) -> NDArray[np.int64]:
        """`length` tokens from `start` on; after the last one comes the first."""
        places = np.arange(start, start + self.length)
        return file.ids.take(places, mode="wrap").astype(np.int64)
