import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.data.stream import (
    Document,
    Source,
    TokenFile,
    Windows,
    documents,
    is_held_out,
    permute,
    write_tokens,
)
from metier.errors import DataError


def source(*files: str, **values: object) -> Source:
    return Source.parse({"name": "part", "files": files, **values}, "test")


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_documents_of_every_format_in_the_order_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two\r\nlines"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("three")))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines("four")))
    (tmp_path / "d.txt").write_text("five")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"six"))
    found = documents(source("*.jsonl*", "*.txt*"), tmp_path)
    assert [document.text for document in found] == [
        "one", "two\nlines", "three", "four", "five", "six"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl", b'{"text": 1}\n', "is not text"),
        ("a.jsonl", b'{"body": "x"}\n', "field 'text'"),
        ("a.jsonl", b'{"text": "x"\n', "no JSON object"),
        ("a.jsonl", b'["text"]\n', "no JSON object"),
        ("a.jsonl", lines("fine") + b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(lines("x" * 4000))[:-9], "cannot be read"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("a.jsonl.zst", b"plain", "damaged"),
    ],
)
def test_unreadable_files_name_their_place(
    tmp_path: Path, name: str, content: bytes, cause: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=cause) as caught:
        list(documents(source("a.*"), tmp_path))
    assert name in caught.value.place


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        list(documents(source("*.jsonl"), tmp_path))


def test_held_out_documents_are_chosen_by_their_text() -> None:
    chosen = [is_held_out(Document(f"text {i}", ""), 0.1) for i in range(5000)]
    assert 0.08 < np.mean(chosen) < 0.12
    assert is_held_out(Document("text 3", "here"), 0.1) == chosen[3]
    assert not any(is_held_out(Document(f"text {i}", ""), 0.0) for i in range(100))


@given(st.integers(1, 300), st.integers(0, 10**9))
@settings(deadline=None, max_examples=40)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    order = np.array([permute(i, 1000, 7) for i in range(1000)])
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert (order != [permute(i, 1000, 8) for i in range(1000)]).mean() > 0.9


def token_file(path: Path, *texts: str) -> TokenFile:
    """One token per character: its code point."""
    write_tokens(
        iter(texts),
        lambda batch: [[ord(c) for c in text] for text in batch],
        path,
        bos=1,
        eos=2,
        vocabulary=300,
    )
    return TokenFile(path)


def test_token_files_keep_documents_apart(tmp_path: Path) -> None:
    found = token_file(tmp_path / "a.bin", "ab", "é")
    assert found.ids.tolist() == [1, 97, 98, 2, 1, 233, 2]
    assert (found.documents, found.text_bytes) == (2, 4)
    assert token_file(tmp_path / "b.bin").ids.tolist() == []


def breaks() -> np.ndarray:
    found = np.zeros(300, dtype=bool)
    found[[1, ord("\n")]] = True
    return found


def test_windows_begin_with_bos_at_a_paragraph(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} of this text\n" for i in range(400))
    file = token_file(tmp_path / "a.bin", text)
    windows = Windows([(file, 1.0)], length=64, seed=0, bos=1, breaks=breaks())
    for index in range(50):
        window = windows[index]
        assert window.shape == (65,)
        assert window[0] == 1
        assert "".join(map(chr, window[1:11])) == "paragraph "
    again = Windows([(file, 1.0)], length=64, seed=0, bos=1, breaks=breaks())
    assert np.array_equal(windows[17], again[17])


def test_weights_set_the_share_of_each_file(tmp_path: Path) -> None:
    first, second = (token_file(tmp_path / f"{c}.bin", c * 50_000) for c in "ab")
    windows = Windows(
        [(first, 3.0), (second, 1.0)], length=50, seed=0, bos=1, breaks=np.zeros(300, bool)
    )
    share = np.mean([windows[i][20] == ord("a") for i in range(windows.count)])
    assert share == pytest.approx(0.75, abs=0.01)


def test_a_corpus_shorter_than_its_windows_is_refused(tmp_path: Path) -> None:
    file = token_file(tmp_path / "a.bin", "short")
    with pytest.raises(DataError, match="three windows"):
        Windows([(file, 1.0)], length=64, seed=0, bos=1, breaks=breaks())
