import gzip
import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from metier.data import stream
from metier.data.stream import (
    Document,
    Source,
    TokenFile,
    Windows,
    documents,
    file_hashes,
    is_held_out,
    pass_weights,
    permute,
    write_tokens,
)
from metier.errors import ConfigError, DataError
from metier.text.bpe import train_bpe
from metier.text.tokenizer import Tokenizer


def source(*files: str, **values: object) -> Source:
    return Source.parse({"name": "part", "files": files, **values}, "test")


NOISE = np.random.default_rng(0).bytes(4000).hex().encode()


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
        ("a.jsonl", b"[" * 100_000, "no JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a character"),
        ("a.jsonl", b'{"text": "x"}\n\0\n', "NUL byte"),
        ("a.jsonl", b'{"text": "' + b"x" * 10_000_000 + b'"}\n', "longer than"),
        ("a.jsonl", lines("fine") + b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", "text".encode("utf-16-le"), "NUL byte"),
        ("a.jsonl.gz", gzip.compress(lines("x" * 4000), mtime=0)[:-9], "no complete gzip"),
        ("a.jsonl.gz", gzip.compress(NOISE, mtime=0)[:40] + bytes(40), "no complete gzip"),
        ("a.jsonl.gz", b"plain", "no complete gzip"),
        ("a.jsonl.zst", b"plain", "no valid zstd"),
        ("a.txt.zst", zstandard.compress(NOISE)[:-2000], "cut short"),
    ],
)
def test_unreadable_files_name_their_place(
    tmp_path: Path, name: str, content: bytes, cause: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=cause) as caught:
        list(documents(source("a.*"), tmp_path))
    assert name in caught.value.place


def test_the_place_is_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one", "two") + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError) as caught:
        list(documents(source("a.jsonl"), tmp_path))
    assert caught.value.place.endswith("a.jsonl:3")


@pytest.mark.parametrize("pattern", ["*.jsonl", "", "**/none*", "/no/such/*.txt", "folder"])
def test_a_pattern_without_files_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no file matches"):
        list(documents(source(pattern), tmp_path))


def test_patterns_may_be_absolute_or_deep_and_names_may_look_like_patterns(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/a.txt", "deep/b[1].txt"):
        (tmp_path / name).write_text(name)
    for pattern in ("**/*.txt", f"{tmp_path}/**/*.txt"):
        found = [document.text for document in documents(source(pattern), tmp_path)]
        assert found == ["deep/b[1].txt", "deep/er/a.txt"]
    (found,) = documents(source("deep/b[1].txt"), tmp_path)
    assert found.text == "deep/b[1].txt"


def test_empty_files_hold_no_documents(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", b""), ("a.jsonl", b"\n \n"), ("a.txt.gz", gzip.compress(b"")),
        ("a.jsonl.zst", zstandard.compress(b"")), ("b.txt.gz", b""),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert not list(documents(source("?.*"), tmp_path))


def test_a_large_text_file_becomes_several_documents_cut_between_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_DOCUMENT", 1000)
    for text in ("one two three\n" * 300, "word " * 600, "x" * 2500, "a" * 1000):
        (tmp_path / "a.txt").write_text(text)
        found = [document.text for document in documents(source("a.txt"), tmp_path)]
        assert "".join(found) == text
        assert max(map(len, found)) <= 1000
        assert len(found) <= len(text) // 980 + 1
        if " " in text:
            assert all(part[-1] == "\n" or part[0] == " " for part in found[1:-1])
    (tmp_path / "a.txt").write_bytes(b"line\n" * 300 + b"\xff")
    with pytest.raises(DataError, match="not UTF-8 in or after") as caught:
        list(documents(source("a.txt"), tmp_path))
    assert caught.value.place.endswith("a.txt:1")


def test_files_are_identified_by_path_and_content(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "a.txt"
    file.write_text("one")
    before = file_hashes(source("sub/*"), tmp_path)
    assert before == {
        "sub/a.txt": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    }
    file.touch()
    assert file_hashes(source("sub/*"), tmp_path) == before
    file.write_text("two")
    assert file_hashes(source("sub/*"), tmp_path) != before
    assert list(file_hashes(source(str(file)), tmp_path / "sub" / "other")) == [str(file)]


def test_held_out_documents_are_chosen_by_their_text() -> None:
    chosen = [is_held_out(Document(f"text {i}", ""), 0.1) for i in range(5000)]
    assert 0.08 < np.mean(chosen) < 0.12
    assert is_held_out(Document("text 3", "here"), 0.1) == chosen[3]
    assert not any(is_held_out(Document(f"text {i}", ""), 0.0) for i in range(100))


@given(st.integers(1, 300), st.integers(0, 10**9))
@settings(max_examples=40)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    order = np.array([permute(i, 1000, 7) for i in range(1000)])
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert (order != [permute(i, 1000, 8) for i in range(1000)]).mean() > 0.9


def ids(file: TokenFile) -> list[int]:
    return file.read(0, file.size).tolist()


def token_file(path: Path, *texts: str) -> TokenFile:
    """One token per character: its code point."""
    write_tokens(
        iter(texts),
        lambda batch, _: [[ord(c) for c in text] for text in batch],
        path,
        bos=1,
        eos=2,
        vocabulary=300,
    )
    return TokenFile(path)


def test_token_files_keep_documents_apart(tmp_path: Path) -> None:
    found = token_file(tmp_path / "a.bin", "ab", "é")
    assert ids(found) == [1, 97, 98, 2, 1, 233, 2]
    assert found.text_bytes == 4
    assert token_file(tmp_path / "b.bin").size == 0


class Batches:
    """An encoder that keeps what it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.seen: list[list[str]] = []

    def __call__(self, texts: list[str], begins: list[bool]) -> list[list[int]]:
        self.seen.append(texts)
        return self.tokenizer.encode_batch(texts, begins)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(["the cat sat on a mat.\n\n  It's 12345 \t birds!\r\n" * 50], 330, directory)
    return Batches(Tokenizer.load(directory))


def write(encode: Batches, path: Path, texts: list[str]) -> list[int]:
    encode.seen = []
    eos, size = encode.tokenizer.eos_id, encode.tokenizer.vocab_size
    write_tokens(iter(texts), encode, path, bos=encode.tokenizer.bos_id, eos=eos, vocabulary=size)
    found = TokenFile(path)
    assert ids(found).count(encode.tokenizer.eos_id) == len(texts)
    assert found.text_bytes == sum(len(text.encode()) for text in texts)
    return ids(found)


def test_batches_are_bounded_by_number_and_bytes(
    tmp_path: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_PIECE", 500)
    monkeypatch.setattr(stream, "_BATCH", 8)
    monkeypatch.setattr(stream, "_BATCH_BYTES", 2000)
    long = "the cat sat on a mat. " * 1000
    for texts in ([long], ["cat"] * 100, ["cat", long, "é" * 999, "", "🙂" * 5000]):
        write(batches, tmp_path / "a.bin", texts)
        assert "".join("".join(batch) for batch in batches.seen) == "".join(texts)
        for batch in batches.seen:
            assert len(batch) <= 8
            assert max(map(len, batch)) <= 500
            assert sum(len(text.encode()) for text in batch) <= 2000


def longest_unparted(text: str) -> int:
    """Characters between places where a space follows a word, or a single line end parts words."""
    places = [
        i
        for i in range(1, len(text))
        if (text[i] == " " and not text[i - 1].isspace())
        or (text[i - 1] == "\n" and i > 1 and not (text[i].isspace() or text[i - 2].isspace()))
    ]
    return int(np.diff([0, *places, len(text)]).max())


@given(
    st.text(st.sampled_from("ab1 \t\r\n.'!sé日\u00a0\u2028\x1c\x85<|eos|>"), max_size=80),
    st.integers(1, 5),
)
@settings(max_examples=150)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, batches: Batches, text: str, more: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.bin"
    whole = write(batches, path, [text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_PIECE", longest_unparted(text) + more)
        assert write(batches, path, [text]) == whole


def test_pieces_cut_anywhere_would_have_other_tokens(
    tmp_path: Path, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(batches, tmp_path / "a.bin", ["the cat sat on a mat"])
    monkeypatch.setattr(stream, "_PIECE", 5)
    monkeypatch.setattr(stream, "_cut", lambda text, start, end: end)
    assert write(batches, tmp_path / "a.bin", ["the cat sat on a mat"]) != whole


REAL = {
    "gpt2": ("tokenizers/gpt2", "<|endoftext|>"),
    "gpt_neox_20b": ("tokenizers/gpt_neox_20b", "<|endoftext|>"),
    "stories260k": ("models/stories260k/hf", "</s>"),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_see_the_same_in_pieces_as_in_the_whole(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place, eos = REAL[name]
    file = str(data_dir / place / "tokenizer.json")
    backend = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=eos)
    encode = Batches(Tokenizer(backend, name))
    prose = (data_dir / "tinyshakespeare" / "input.txt").read_text()[:4000]
    code = (data_dir / "docs_rust_book" / "ch03-02-data-types.md").read_text()[:8000]
    whole = [write(encode, tmp_path / "a.bin", [text]) for text in (prose, code)]
    monkeypatch.setattr(stream, "_PIECE", 150)
    assert [write(encode, tmp_path / "a.bin", [text]) for text in (prose, code)] == whole
    assert len(encode.seen[0]) > 50


def test_ids_above_two_bytes_are_kept(tmp_path: Path) -> None:
    large = [1, 65_535, 65_536, 151_000]
    write_tokens(
        iter(["x"]), lambda *_: [large], tmp_path / "a.bin", bos=None, eos=0, vocabulary=151_001
    )
    assert ids(TokenFile(tmp_path / "a.bin")) == [*large, 0]
    with pytest.raises(OverflowError):  # what a vocabulary said too small would do
        write_tokens(
            iter(["x"]), lambda *_: [large], tmp_path / "a.bin", bos=None, eos=0, vocabulary=9
        )


def test_a_file_is_a_ring(tmp_path: Path) -> None:
    file = token_file(tmp_path / "a.bin", "abcdef")
    whole = ids(file)
    for start in range(2 * file.size):
        for count in range(file.size + 1):
            rolled = (whole * 4)[start : start + count]
            assert file.read(start, count).tolist() == rolled


def test_windows_all_over_a_large_file_take_no_memory(tmp_path: Path) -> None:
    """A map of the file would: what was touched of it counts as this process's."""
    size, count = 100_000_000, 3000
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(2 * size)
    (tmp_path / "a.json").write_text('{"dtype": "<u2", "bytes": 0}')
    windows = Windows(
        [(TokenFile(tmp_path / "a.bin"), 1.0)],
        length=128, seed=0, opening=1, eos=2, breaks=breaks(),
    )  # fmt: skip
    assert windows[0].shape == (129,)
    memory = psutil.Process().memory_info
    before = memory().rss
    for index in range(count):
        windows[index]
    taken = memory().rss - before
    mapped = np.memmap(tmp_path / "a.bin", dtype="<u2", mode="r")
    for index in range(count):
        mapped[permute(index, count, 0) * (size // count)]
    assert taken < 4e6
    assert memory().rss - before - taken > 8e6, "control"


def test_shares_are_kept_whatever_the_sizes() -> None:
    sources = [
        source("a", name="domain"),
        source("b", name="twice", weight=2.0),
        source("c", name="replay", share=0.2),
        source("d", name="more", share=0.05),
    ]
    sizes = [1000, 300, 500_000, 40]
    weights = pass_weights(sources, sizes)
    assert weights[:2] == [1.0, 2.0]
    whole = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    assert weights[2] * 500_000 / whole == pytest.approx(0.2)
    assert weights[3] * 40 / whole == pytest.approx(0.05)
    with pytest.raises(ConfigError, match="weight or share"):
        source("a", weight=1.0, share=0.1)


def breaks(opening: int = 1) -> np.ndarray:
    found = np.zeros(300, dtype=bool)
    found[[opening, ord("\n")]] = True
    return found


def test_windows_begin_with_bos_at_a_paragraph(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} of this text\n" for i in range(400))
    file = token_file(tmp_path / "a.bin", text)
    windows = Windows([(file, 1.0)], length=64, seed=0, opening=1, eos=2, breaks=breaks())
    for index in range(50):
        window = windows[index]
        assert window.shape == (65,)
        assert window[0] == 1
        assert "".join(map(chr, window[1:11])) == "paragraph "
    again = Windows([(file, 1.0)], length=64, seed=0, opening=1, eos=2, breaks=breaks())
    assert np.array_equal(windows[17], again[17])


def test_no_window_begins_with_the_end_of_a_document(tmp_path: Path) -> None:
    """Where documents end in a line end, and where one token both opens and ends them."""
    texts = [f"{i}\n" for i in range(200)]
    found = [[ord(c) for c in text] for text in texts]
    path = tmp_path / "a.bin"
    for bos, opening in ((1, 1), (None, 2)):
        write_tokens(iter(texts), lambda *_: found, path, bos=bos, eos=2, vocabulary=300)
        windows = Windows(
            [(TokenFile(path), 1.0)],
            length=16, seed=0, opening=opening, eos=2, breaks=breaks(opening),
        )  # fmt: skip
        for index in range(3 * windows.count):
            window = windows[index].tolist()
            assert window[0] == opening
            assert chr(window[1]).isdigit()


def test_weights_set_the_share_of_each_file(tmp_path: Path) -> None:
    first, second = (token_file(tmp_path / f"{c}.bin", c * 50_000) for c in "ab")
    windows = Windows(
        [(first, 3.0), (second, 1.0)],
        length=50,
        seed=0,
        opening=1,
        eos=2,
        breaks=np.zeros(300, bool),
    )
    share = np.mean([windows[i][20] == ord("a") for i in range(windows.count)])
    assert share == pytest.approx(0.75, abs=0.01)


def numbered(path: Path, first: int, size: int) -> TokenFile:
    """A file of tokens that are all different."""
    ids = list(range(first + 1, first + size - 1))
    write_tokens(iter(["x"]), lambda *_: [ids], path, bos=first, eos=first + size - 1, vocabulary=2)
    return TokenFile(path)


@given(
    sizes=st.tuples(st.integers(10, 200), st.integers(10, 200)),
    weights=st.tuples(st.sampled_from([0.3, 1, 1.5, 2]), st.sampled_from([1, 2.5, 3])),
    length=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_a_pass_sees_every_slot_as_often_as_its_file_weighs(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int],
    weights: tuple[float, float],
    length: int,
    seed: int,
) -> None:
    directory = tmp_path_factory.getbasetemp()
    files = [
        numbered(directory / f"{part}.bin", part * 500, size) for part, size in enumerate(sizes)
    ]

    def windows() -> Windows:
        return Windows(
            list(zip(files, weights, strict=True)),
            length=length, seed=seed, opening=999, eos=-1, breaks=np.zeros(1000, bool),
        )  # fmt: skip

    made = windows()
    ever = np.zeros(1000, int)
    for epoch in range(length):
        rows = [made[epoch * made.count + i] for i in range(made.count)]
        assert all(row[0] == 999 for row in rows)
        assert np.array_equal(windows()[epoch * made.count], rows[0])
        seen = np.bincount(np.concatenate([row[1:] for row in rows]), minlength=1000)
        ever += seen
        for part, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            counts = seen[part * 500 : part * 500 + size]
            inside = np.sort(counts)[size % length :]  # the rest is no whole slot in this pass
            slots = size // length
            assert inside.sum() == length * max(1, round(slots * weight))
            assert inside.max() - inside.min() <= 1
            assert (np.sort(counts)[: size % length] == 0).all()
    if min(weights) >= 1:  # each of `length` passes shifts the slots by another number
        assert all(ever[part * 500 : part * 500 + size].all() for part, size in enumerate(sizes))


@given(
    st.text("ab\n", min_size=40, max_size=300),
    st.integers(1, 20),
    st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_a_window_is_a_stretch_of_the_file_and_begins_at_a_paragraph_if_its_slot_has_one(
    tmp_path_factory: pytest.TempPathFactory, text: str, length: int, index: int
) -> None:
    file = token_file(tmp_path_factory.getbasetemp() / "text.bin", text)
    first, again = (
        Windows([(file, 1.0)], length=length, seed=3, opening=1, eos=2, breaks=breaks())[index]
        for _ in range(2)
    )
    assert np.array_equal(first, again)
    assert first[0] == 1
    ring = "".join(map(chr, ids(file))) * 3
    window = "".join(map(chr, first[1:]))
    assert len(window) == length
    assert window in ring
    starts = [place for place in range(file.size) if ring.startswith(window, place)]
    before = [ring[(place - 1) % file.size] for place in starts]
    # Else a window's length before it is free of line ends.
    assert any(c in "\n\x01" for c in before) or any(
        not set("\n\x01") & set(ring[place : place + length]) for place in starts
    )


def test_a_source_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    long, short = token_file(tmp_path / "a.bin", "x" * 99), token_file(tmp_path / "b.bin", "short")
    with pytest.raises(DataError, match="has 7 tokens to train on") as caught:
        Windows([(long, 1.0), (short, 1.0)], length=64, seed=0, opening=1, eos=2, breaks=breaks())
    assert caught.value.place == "source 'b'"
    Windows([(long, 1.0), (short, 0.0)], length=64, seed=0, opening=1, eos=2, breaks=breaks())
