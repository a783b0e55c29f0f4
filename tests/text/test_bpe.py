import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Raw

from metier.errors import ConfigError
from metier.text.bpe import BOS, CONTROL_TOKENS, EOS, train_bpe
from metier.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    words = random.Random(0).choices(("the", "cat", "sat", "on", "a", "mat", "ran"), k=5000)
    train_bpe([" ".join(words)], 300, directory)
    return directory


def test_any_text_comes_back_byte_for_byte(trained: Path) -> None:
    tokenizer = Tokenizer.load(trained)
    for text in ("the cat", " ünïcödé\n\t日本 🙂", "a\r\nb   c", "12345,678"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_come_first_and_text_never_becomes_one(trained: Path) -> None:
    raw = Raw.from_file(str(trained / "tokenizer.json"))
    assert [raw.token_to_id(token) for token in CONTROL_TOKENS] == list(range(6))
    tokenizer = Tokenizer.load(trained)
    ids = tokenizer.encode(f"he said {EOS} and {BOS}")
    assert min(ids) >= len(CONTROL_TOKENS)


def test_frequent_words_become_one_token(trained: Path) -> None:
    assert len(Tokenizer.load(trained).encode(" the")) == 1


def test_a_vocabulary_too_small_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below 262"):
        train_bpe(["text"], 261, tmp_path)
    train_bpe(["text"], 262, tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == 262
