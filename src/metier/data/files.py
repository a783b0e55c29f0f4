"""Data files as rows: JSONL, JSON, CSV, TSV, Parquet and CoNLL, plain or compressed.

Every row carries its place (``file:line``). Whatever is wrong with a file ends in one `DataError`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from metier.data import conll
from metier.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_ROW = 10_000_000
_MAX_DOCUMENT = 1_000_000_000
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *conll.SUFFIXES)
_COMPRESSIONS = (".gz", ".zst")
_SUPPORTED = f"{', '.join(_SUFFIXES)}, each also as {' or '.join(_COMPRESSIONS)}"
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive or Excel file",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "gzip-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file; `place` is ``file:line``."""

    place: str
    values: dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Read a data file row by row; the format follows from the file's name.

    Raises:
        DataError: the file or a row is unreadable; the message names file and line.

    """
    suffix = _check(path)
    empty = True
    with open_binary(path) as handle, file_errors(path):
        try:
            for row in _reader(path, suffix, handle):
                empty = False
                yield row
        except DataError:
            # Damage inside a compressed file shows as broken rows first: its check sum decides.
            while path.suffix.lower() in _COMPRESSIONS and handle.read(1 << 20):
                pass
            raise
    if empty:
        raise DataError(str(path), "holds no rows", "give a file with at least one example")


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Errors of decompression and of the disk, as errors about the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _corrupt(path, f"is no complete gzip file ({error})") from None
    except OSError as error:
        raise DataError(
            str(path), f"cannot be read ({error})", "check the file and its disk"
        ) from None


def _corrupt(path: Path, cause: str) -> DataError:
    return DataError(str(path), cause, "copy or download the file again, or compress it anew")


def _check(path: Path) -> str:
    """The format suffix of a readable file, e.g. ``.csv`` for ``rows.csv.gz``."""
    if path.is_dir():
        raise DataError(str(path), "is a directory", f"name one file in it: {_SUPPORTED}")
    if not path.exists():
        raise DataError(str(path), "does not exist", _neighbours(path))
    if not path.is_file():
        raise DataError(str(path), "is not a regular file", "save the data to a file first")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _SUFFIXES:
        raise DataError(
            str(path), "has an unknown extension", f"save or rename it as one of {_SUPPORTED}"
        )
    if path.stat().st_size == 0:
        raise DataError(str(path), "is empty", "give a file with at least one example")
    return suffixes[-1]


def _neighbours(path: Path) -> str:
    import difflib

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else "check the path"


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a plain, .gz or .zst file; `file_errors` explains what goes wrong while it is read."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(
            str(path), f"cannot be opened ({error.strerror})", "check its permissions"
        ) from None
    with raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield unzipped  # type: ignore[misc]
        elif suffix == ".zst":
            yield io.BufferedReader(_ZstdReader(path, raw))
        else:
            yield raw


class _ZstdReader(io.RawIOBase):
    """zstd frames as a stream that refuses a file cut short (zstandard's own reader does not)."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        import zstandard

        self._path = path
        self._raw = raw
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        while not self._ready:
            chunk = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(1 << 17)
            if not chunk:
                if self._inside and not self._frame.eof:
                    raise _corrupt(self._path, "is a zstd file cut short")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._inside = True
            try:
                self._ready = self._frame.decompress(chunk)
            except self._error as error:
                raise _corrupt(self._path, f"is no valid zstd file ({error})") from None
        size = min(len(view), len(self._ready))
        view[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _reader(path: Path, suffix: str, handle: BinaryIO) -> Iterator[Row]:
    if suffix == ".parquet":
        return _parquet(path, handle)
    lines = text_lines(path, handle, document=suffix == ".json")
    if suffix == ".jsonl":
        return _json_lines(path, lines)
    if suffix == ".json":
        return _json_list(path, lines)
    lines, start = _peek(lines)
    if suffix in conll.SUFFIXES or (suffix == ".tsv" and conll.is_tagged(start)):
        return _sentences(path, lines)
    return _table(path, lines, "," if suffix == ".csv" else "\t")


def text_lines(path: Path, handle: BinaryIO, *, document: bool = False) -> Iterator[str]:
    """Lines of UTF-8 text with their ends; the first line's byte order mark is dropped.

    A line is a row and limited as one, but that of a document may be the whole of it.
    """
    limit = _MAX_DOCUMENT if document else MAX_ROW
    number, offset = 0, 0
    while raw := handle.readline(limit + 1):
        number += 1
        place = f"{path}:{number}"
        if number == 1:
            _check_signature(path, raw)
        if len(raw) > limit:
            raise _too_large(path) if document else _too_long(place)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                place,
                f"is not UTF-8: byte 0x{raw[error.start]:02X} at byte {offset + error.start}",
                "save the file as UTF-8: in Excel as 'CSV UTF-8', or, where it is Windows-1252, by "
                "'iconv -f CP1252 -t UTF-8 OLD > NEW'",
            ) from None
        if "\0" in text:
            raise DataError(
                place,
                f"holds a NUL byte at byte {offset + raw.index(0)}",
                "is this a binary or UTF-16 file? Save it as plain UTF-8 text",
            )
        offset += len(raw)
        yield text


def _check_signature(path: Path, start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:1", "is UTF-16 (byte order mark)", "save the file as UTF-8")
    for signature, what in _SIGNATURES.items():
        if start.startswith(signature):
            raise DataError(
                str(path), f"is {what}, whatever its name says", "rename or export it to match"
            )


def _too_long(place: str) -> DataError:
    return DataError(
        place, f"the row is longer than {MAX_ROW:,} bytes", "is a line end missing? Split the row"
    )


def _too_large(path: Path) -> DataError:
    return DataError(
        str(path),
        f"is a JSON list of more than {_MAX_DOCUMENT:,} bytes",
        "convert it to JSONL, which is read line by line",
    )


class _RepeatedKeyError(ValueError):
    """A JSON object names one key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        name = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _RepeatedKeyError(f"the key '{name}' stands twice in one object")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_BLANK = re.compile(r"[ \t\r\n]*")


def _decode(text: str, start: int, place: str) -> tuple[Any, int]:
    """One JSON value from `start` on, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        file, _, line = place.rpartition(":")
        where = f"{file}:{int(line) + text.count(chr(10), start, error.pos)}"
        raise DataError(
            where, f"is not valid JSON: {error.msg} (column {error.colno})", "mend this row"
        ) from None
    except _RepeatedKeyError as error:
        raise DataError(place, str(error), "keep one of the two") from None
    except ValueError:
        raise DataError(place, "holds a number with too many digits", "write it as text") from None
    except RecursionError:
        raise DataError(place, "is nested too deeply", "flatten the row") from None


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, text in enumerate(lines, start=1):
        start = _end_of_blank(text, 0)
        if start == len(text):
            continue
        place = f"{path}:{number}"
        if number == 1 and text[start] == "[":
            raise DataError(
                place, "is a JSON list, not JSON lines", "rename the file to end in .json"
            )
        value, end = _decode(text, start, place)
        if _end_of_blank(text, end) < len(text):
            raise DataError(
                place, f"has more text after the object (column {end + 1})", "one object per line"
            )
        yield _object(value, place)


def _end_of_blank(text: str, start: int) -> int:
    match = _BLANK.match(text, start)
    return match.end() if match else start


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            place,
            f"is {_kind_of(value)}, not an object",
            'write each row as an object, e.g. {"text": ..., "label": ...}',
        )
    return Row(place, value)


def _kind_of(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json_list(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    text = _document(path, lines)
    position = _end_of_blank(text, 0)
    if not text.startswith("[", position):
        raise DataError(
            f"{path}:1",
            "is not a JSON list of objects",
            "write [{...}, {...}]; one object per line goes into a .jsonl file",
        )
    line, counted = 1, 0
    position = _end_of_blank(text, position + 1)
    if text.startswith("]", position):
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        value, end = _decode(text, position, place)
        if end - position > MAX_ROW:
            raise _too_long(place)
        yield _object(value, place)
        position = _end_of_blank(text, end)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise DataError(place, "is not followed by ',' or ']'", "mend the JSON list here")
        position = _end_of_blank(text, position + 1)
    if _end_of_blank(text, position + 1) < len(text):
        raise DataError(str(path), "has more text after the JSON list", "remove it")


def _document(path: Path, lines: Iterator[str]) -> str:
    parts, size = [], 0
    for text in lines:
        size += len(text)
        if size > _MAX_DOCUMENT:
            raise _too_large(path)
        parts.append(text)
    return "".join(parts)


def _peek(lines: Iterator[str]) -> tuple[Iterator[str], str]:
    """The lines again, and the first that is not blank."""
    seen: list[str] = []
    for line in lines:
        seen.append(line)
        if line.strip():
            break
    return chain(seen, lines), seen[-1] if seen else ""


def _sentences(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, tokens, tags in conll.sentences(path, lines, MAX_ROW):
        yield Row(f"{path}:{number}", {"tokens": tokens, "tags": tags})


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's limit on a field is global: raise it, then put it back."""
    before = csv.field_size_limit(MAX_ROW)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(path: Path, lines: Iterator[str], delimiter: str) -> Iterator[Row]:
    """Rows of a table with a header line, quoted as RFC 4180 says."""
    first = "".join(islice(lines, 1))
    # Where ',' separates decimals, Excel writes tables with ';'.
    if delimiter == "," and ";" in first and "," not in first:
        delimiter = ";"
    reader = csv.reader(chain([first] if first else [], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            with _long_fields():
                cells = next(reader, None)
        except csv.Error as error:
            raise _bad_table(place, str(error)) from None
        if cells is None:
            break
        if header is None:
            header = _header(place, cells, delimiter)
        elif cells:
            yield Row(place, _cells(place, header, cells))
    if header is None:
        raise DataError(str(path), "has no header line", "name the columns in the first line")


def _bad_table(place: str, cause: str) -> DataError:
    if "field larger" in cause:
        return _too_long(place)
    return DataError(
        place, f"is quoted wrongly ({cause})", 'put the cell in "..." and write " inside as ""'
    )


def _header(place: str, cells: list[str], delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not any(names):
        raise DataError(place, "the header is blank", "name the columns in the first line")
    names = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise DataError(place, f"the column '{name}' stands twice", "rename one of the two")
    other = next((sign for sign in (";", "\t", ",", "|") if sign in names[0]), None)
    if len(names) == 1 and other and other != delimiter:
        raise DataError(
            place,
            f"has one column, but {other!r} in its header",
            "separate cells by ',' or ';' in .csv files and by tabs in .tsv files",
        )
    return names


def _cells(place: str, header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(
            place,
            f"has {len(cells)} cells where the header has {len(header)}",
            'put cells with separators or line ends in "..."',
        )
    if sum(map(len, cells)) > MAX_ROW:
        raise _too_long(place)
    return dict(zip(header, cells, strict=True))


def _parquet(path: Path, handle: BinaryIO) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = handle if path.suffix.lower() == ".parquet" else pa.BufferReader(handle.read())
    number = 0
    try:
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise DataError(str(path), "names a column twice", "rename one of the two")
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}:{number}", values)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        cause = str(error).splitlines()[0]
        raise _corrupt(path, f"is no readable Parquet file after row {number} ({cause})") from None
