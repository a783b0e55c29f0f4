"""Read large corpora as streams, in constant memory, and keep them as token files.

A corpus is several weighted *sources*. Their documents are tokenised once into flat files, of which
training reads only the windows that it needs; these are a function of (seed, index) alone, so a run
resumes exactly and a corpus larger than memory costs no more of it.
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
from typing import Annotated, Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, model_validator

from metier import runs
from metier.config import Config
from metier.data.files import file_errors, open_binary, text_lines
from metier.errors import DataError

MAX_DOCUMENT = 16_000_000
_PIECE = 20_000
_BATCH = 256
_BATCH_BYTES = 2_000_000
# Tokenizers that split text before they merge keep a single line end, and spaces before a word, in
# tokens of their own or with what stands there: they see the same on both sides of these places.
_BETWEEN_TOKENS = re.compile(r"(?s).+(?:(?<=\S\n)(?=\S)|(?<=\S)(?= ))")


class Source(Config):
    """One part of a corpus."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name in logs and figures."""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs: JSON lines or plain text (one document a file, several in a file of more
    than 16 million characters), also .gz and .zst."""
    weight: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    """Passes over this source in one pass of the corpus, as in The Pile (Gao et al. 2020,
    arXiv 2101.00027); 0 keeps it for evaluation only."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `weight`: share of all training tokens that come from this source, however long it
    is. Replay of general text is a source with a share."""
    field: str = "text"
    """Field of a JSON line that holds the text."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents kept for held-out figures, chosen by hash."""

    @model_validator(mode="after")
    def _weight_or_share(self) -> Self:
        if self.share and "weight" in self.model_fields_set:
            raise ValueError("give weight or share, not both")
        return self

    @property
    def trained(self) -> bool:
        """Whether it is trained on, or only watched."""
        return self.weight > 0


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
    """A flat file of token ids, little-endian uint16 or uint32.

    It is read and not mapped: what was touched of a map would count as this process's memory.

    Attributes:
        name: of the source it was made from.
        size: tokens in it.
        text_bytes: UTF-8 bytes of the text behind them.

    """

    def __init__(self, path: Path) -> None:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.name = path.stem
        self.text_bytes: int = about["bytes"]
        self._path, self._dtype = path, np.dtype(about["dtype"])
        self.size = path.stat().st_size // self._dtype.itemsize

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens from `start` on, shape (count,); after the last one comes the first, once."""
        start %= self.size
        found = self._stretch(start, min(count, self.size - start))
        return np.concatenate((found, self._stretch(0, count - len(found))))

    def _stretch(self, start: int, count: int) -> NDArray[np.int64]:
        offset = start * self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, count, offset=offset).astype(np.int64)


def write_tokens(
    texts: Iterator[str],
    encode: Callable[[list[str], list[bool]], list[list[int]]],
    path: Path,
    *,
    bos: int | None,
    eos: int,
    vocabulary: int,
) -> None:
    """Tokenise a stream of documents into a TokenFile: ``bos text eos`` for each.

    Args:
        texts: the documents.
        encode: ids of texts, of each of which it is told whether it begins a document or goes on
            one. It is given at most 2 MB at once, so a long document in several pieces.
        path: file to write.
        bos: id before every document, or None where the one before it is enough.
        eos: id behind every document.
        vocabulary: number of ids.

    """
    dtype = "<u2" if vocabulary <= 65_536 else "<u4"
    opening = [] if bos is None else [bos]
    size = 0
    with path.open("wb") as handle:
        for batch in _batches(_pieces(texts)):
            size += sum(piece.bytes for piece in batch)
            found = encode([piece.text for piece in batch], [piece.first for piece in batch])
            for piece, ids in zip(batch, found, strict=True):
                row = opening * piece.first + ids + [eos] * piece.last
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


def pass_weights(sources: Sequence[Source], sizes: Sequence[int]) -> list[float]:
    """Passes over each source in one pass of the corpus, so that shares of the tokens are kept.

    Args:
        sources: not all of those that are trained on have a share.
        sizes: tokens of each.

    """
    shared = sum(source.share or 0.0 for source in sources)
    rest = sum(
        source.weight * size
        for source, size in zip(sources, sizes, strict=True)
        if source.share is None
    )
    whole = rest / (1 - shared)
    return [
        source.weight if source.share is None else source.share * whole / max(1, size)
        for source, size in zip(sources, sizes, strict=True)
    ]


class Windows:
    """Windows of ``1 + length`` tokens over weighted token files, in a seeded endless order.

    A file is a ring of slots of `length` tokens, and in every pass each slot starts as many windows
    as its file's weight says. A window is the opening token and `length` tokens from the first
    paragraph that begins in its slot, so that the opening means the start of one wherever there is
    one. Each pass shifts the slots, so that their edges fall elsewhere.
    """

    def __init__(
        self,
        files: Sequence[tuple[TokenFile, float]],
        *,
        length: int,
        seed: int,
        opening: int,
        eos: int,
        breaks: NDArray[Any],
    ) -> None:
        """Lay windows over the files.

        Args:
            files: token files with their weights.
            length: tokens after the opening one.
            seed: of the order.
            opening: id put in front.
            eos: id that ends a document, which no paragraph begins with.
            breaks: shape (vocabulary,), True for tokens after which a paragraph may begin.

        """
        self._files = [(file, weight) for file, weight in files if weight > 0]
        self.length, self._seed, self._breaks = length, seed, breaks
        self._opening, self._eos = np.array([opening]), eos
        for file, _ in self._files:
            if file.size < length:
                raise DataError(
                    f"source '{file.name}'",
                    f"has {file.size:,} tokens to train on, less than a window of {length:,}",
                    "give more text or shorter windows, or leave it out",
                )
        self._counts = [max(1, round(file.size // length * weight)) for file, weight in self._files]
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
        start = place % (file.size // self.length) * self.length + shift
        slot = file.read(start, self.length + 1)
        found = np.flatnonzero(self._breaks[slot[:-1]] & (slot[1:] != self._eos))
        start += int(found[0]) + 1 if len(found) else 0
        return np.concatenate((self._opening, file.read(start, self.length)))
