"""Read large corpora as streams, in constant memory, and keep them as token files.

A corpus is several weighted *sources*. Their documents are tokenised once into flat files that
training maps into memory; the windows it reads there are a function of (seed, index) alone, so a
run resumes exactly and a corpus larger than memory costs no more of it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from metier.config import Config
from metier.errors import DataError

_BATCH = 256
_MAX_DOCUMENT = 64_000_000


class Source(Config):
    """One part of a corpus."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name in logs and figures."""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths or globs: JSON lines or plain text (one document a file), also .gz and .zst."""
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
        if _plain_name(path).endswith((".jsonl", ".json")):
            yield from _json_lines(path, source.field)
        else:
            yield from _whole_text(path)


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is kept for held-out figures: a function of its text alone."""
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def open_text(path: Path) -> IO[str]:
    """Open a plain, .gz or .zst file as UTF-8 text."""
    binary: IO[bytes]
    if path.suffix == ".gz":
        import gzip

        binary = cast(IO[bytes], gzip.open(path, "rb"))  # noqa: SIM115
    elif path.suffix == ".zst":
        import zstandard

        binary = cast(IO[bytes], zstandard.open(path, "rb"))
    else:
        binary = path.open("rb")
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n")


def matching_files(source: Source, base: Path) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        DataError: a path or glob matches no file.

    """
    found: set[Path] = set()
    for pattern in source.files:
        path = Path(pattern)
        matches = list(base.glob(pattern)) if not path.is_absolute() else [path]
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise DataError(
                f"source '{source.name}'", f"no file matches '{base / path}'", "check the path"
            )
        found.update(matches)
    return sorted(found)


def _plain_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".zst")


def _whole_text(path: Path) -> Iterator[Document]:
    for piece in _guarded(path, lambda handle: iter(lambda: handle.read(_MAX_DOCUMENT), "")):
        yield Document(_unix(piece[1]), str(path))


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    for number, line in _guarded(path, iter):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                place, f"is no JSON object with the field '{field}' ({error})", "mend the line"
            ) from None
        if not isinstance(text, str):
            raise DataError(place, f"the field '{field}' is not text", "give text")
        yield Document(_unix(text), place)


def _guarded(path: Path, parts: Callable[[IO[str]], Iterator[str]]) -> Iterator[tuple[int, str]]:
    """Number the parts of a file; unreadable bytes become a DataError with their place."""
    number = 0
    try:
        with open_text(path) as handle:
            for number, part in enumerate(parts(handle), start=1):
                yield number, part
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number + 1}", f"is not UTF-8 ({error.reason})", "save the file as UTF-8"
        ) from None
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path}:{number + 1}", f"cannot be read ({error})", "check the file"
        ) from None
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise DataError(str(path), f"is damaged ({error})", "make the file again") from None
        raise


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


class TokenFile:
    """A flat file of token ids, mapped into memory.

    Attributes:
        ids: shape (tokens,), little-endian uint16 or uint32.
        text_bytes: UTF-8 bytes of the text behind them.

    """

    def __init__(self, path: Path) -> None:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.text_bytes: int = about["bytes"]
        self.documents: int = about["documents"]
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
    """Tokenise a stream of documents into a TokenFile: ``bos text eos`` for each."""
    dtype = "<u2" if vocabulary <= 65_536 else "<u4"
    size, count = 0, 0
    with path.open("wb") as handle:
        for batch in _batches(texts):
            size += sum(len(text.encode()) for text in batch)
            count += len(batch)
            for ids in encode(batch):
                handle.write(np.array([bos, *ids, eos], dtype=dtype).tobytes())
    about = {"dtype": dtype, "bytes": size, "documents": count}
    path.with_suffix(".json").write_text(json.dumps(about))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
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

    A window is one BOS and `length` tokens that begin at a paragraph, so that BOS always means the
    start of one. Each pass shifts the windows, so that their edges fall elsewhere.
    """

    def __init__(
        self,
        files: list[tuple[TokenFile, float]],
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
        self._counts = [
            round(max(0, len(file.ids) // length - 2) * weight) for file, weight in self._files
        ]
        self.count = sum(self._counts)
        if self.count == 0:
            raise DataError(
                "corpus", f"has fewer than three windows of {length} tokens", "give more text"
            )

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
        possible = len(file.ids) // self.length - 2
        shift = permute(epoch % self.length, self.length, self._seed)
        start = (place % possible) * self.length + shift
        found = np.flatnonzero(self._breaks[file.ids[start : start + self.length]])
        start += int(found[0]) + 1 if len(found) else 0
        window = file.ids[start : start + self.length].astype(np.int64)
        return np.concatenate((np.array([self._bos]), window))
