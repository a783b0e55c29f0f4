import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from metier.data.stream import TokenFile, write_tokens
from metier.text.bpe import train_bpe
from metier.training.held_out import HeldOut, bits_per_byte, spaced_windows, token_bytes


def token_file(path: Path, ids: list[int]) -> TokenFile:
    write_tokens(iter(["x"]), lambda _: [ids], path, bos=0, eos=1, vocabulary=300)
    return TokenFile(path)


def test_windows_are_spaced_from_the_first_token_to_the_last(tmp_path: Path) -> None:
    file = token_file(tmp_path / "a.bin", list(range(2, 100)))
    sizes = np.array([0, 0, *[3] * 98])
    ids, size = spaced_windows(file, sizes, count=3, length=10, bos=7)
    assert ids.shape == (3, 11)
    assert (ids[:, 0] == 7).all()
    assert ids[0, 1:].tolist() == file.ids[:10].tolist()
    assert ids[2, 1:].tolist() == file.ids[-10:].tolist()
    assert size == 3 * (30 - 2)  # BOS and EOS stand for no text


@pytest.mark.parametrize("length", [3, 10])
def test_text_without_windows_or_bytes(tmp_path: Path, length: int) -> None:
    file = token_file(tmp_path / "a.bin", [1, 0, 1, 0, 1])
    ids, size = spaced_windows(file, np.zeros(2, dtype=np.int64), count=4, length=length, bos=0)
    assert ids.shape == (2 if length == 3 else 0, 1 + length)
    assert size == 0


def test_bytes_behind_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    train_bpe(["the cat sat on the mat, été 日本"] * 20, 300, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    sizes = token_bytes(tokenizer)
    for text in ("the cat", "été", "日本 🙂", "\n\t"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sizes[ids].sum() == len(text.encode())
    assert not sizes[:6].any()


def test_only_trained_sources_choose_the_best() -> None:
    def part(name: str, size: int, trained: bool) -> HeldOut:
        return HeldOut(name, torch.ones(6, 5, dtype=torch.long), size, trained)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor(ids[:, 1:].numel() * math.log(2))  # one bit a token

    parts = [part("a", 24, True), part("b", 12, True), part("watched", 1, False)]
    assert bits_per_byte(loss, parts) == pytest.approx({"a": 1, "b": 2, "watched": 24, "loss": 1.5})
    alone = bits_per_byte(loss, parts[2:])
    assert alone["watched"] == pytest.approx(24)
    assert math.isnan(alone["loss"])
