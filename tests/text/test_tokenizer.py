"""Text never becomes a control token, and everything else is as Hugging Face encodes it."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Raw
from transformers import AutoTokenizer

from metier.errors import ConfigError, DataError, ModelError
from metier.text.tokenizer import Tokenizer
from tests.text.conftest import MakeTokenizer

CHATML = ("<|im_start|>", "<|im_end|>")
NAMES = ("gpt2", "gpt_neox_20b", "stories260k")
# Pieces that make collisions with control tokens likely.
TEXT = st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "<|endoftext|>",
            "<s>",
            "</s>",
            "<unk>",
            "<|",
            "|>",
            " ",
            "\n",
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(request.param, CHATML)


@cache
def raw(tokenizer: Tokenizer) -> Raw:
    """The very tokenizer.json, read by the tokenizers library alone."""
    return Raw.from_file(str(Path(tokenizer.name) / "tokenizer.json"))


@settings(max_examples=60)
@given(text=TEXT)
def test_text_never_yields_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    unknown = tokenizer.control_tokens.get("<unk>")
    control = set(tokenizer.control_tokens.values()) - {unknown}
    for after in ("start", "control", "text"):
        assert control.isdisjoint(tokenizer.encode(text, after))  # type: ignore[arg-type]


def test_the_hazard_is_real(tokenizer: Tokenizer) -> None:
    """Control of the test above: the plain library does yield the token."""
    end = tokenizer.control_tokens["<|im_end|>"]
    assert end in raw(tokenizer).encode("a<|im_end|>", add_special_tokens=False).ids
    assert end not in tokenizer.encode("a<|im_end|>")


@settings(max_examples=60)
@given(text=TEXT)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # as GPT-NeoX does
    text = text.replace("▁", "")  # SentencePiece's own mark of a space
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=40)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|"), max_size=30))
def test_ids_are_those_of_the_library(tokenizer: Tokenizer, text: str) -> None:
    library = raw(tokenizer)
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    after_token = library.encode(f"<|im_start|>{text}", add_special_tokens=False).ids[1:]
    assert tokenizer.encode(text, "control") == after_token


@settings(max_examples=40)
@given(first=st.text("ab \n", min_size=1, max_size=8), second=st.text("ab \n", max_size=8))
def test_text_that_goes_on_gets_no_space(tokenizer: Tokenizer, first: str, second: str) -> None:
    ids = tokenizer.encode(first) + tokenizer.encode(second, "text")
    if second[:1].isspace() and "<s>" in tokenizer.control_tokens:
        return  # SentencePiece cannot go on with white space without a mark
    assert tokenizer.decode(ids) == first + second


@settings(max_examples=25)
@given(texts=st.lists(st.tuples(TEXT, st.booleans()), max_size=6))
def test_many_texts_are_encoded_as_each_alone(
    tokenizer: Tokenizer, texts: list[tuple[str, bool]]
) -> None:
    alone = [tokenizer.encode(text, "start" if begins else "text") for text, begins in texts]
    found = tokenizer.encode_batch([text for text, _ in texts], [begins for _, begins in texts])
    assert found == alone


def test_added_tokens_that_are_text_keep_their_ids(make_tokenizer: MakeTokenizer) -> None:
    """GPT-NeoX has runs of spaces as added tokens; they come after control tokens here."""
    tokenizer = make_tokenizer("gpt_neox_20b", CHATML)
    text = "def f():\n        return 1"
    assert tokenizer.encode(text) == raw(tokenizer).encode(text, add_special_tokens=False).ids
    assert not any(token.isspace() for token in tokenizer.control_tokens)


def test_added_tokens_of_the_template_are_control_tokens(make_tokenizer: MakeTokenizer) -> None:
    template = "{{ '<|im_start|>' }}{{ messages[0].content }}{{ '<|im_end|>' }}"
    with_template = make_tokenizer("small", CHATML, template, special=False)
    assert set(CHATML) <= set(with_template.control_tokens)
    without = make_tokenizer("small", CHATML, special=False)
    assert set(CHATML).isdisjoint(without.control_tokens)


def save(directory: Path, library: Raw, **config: object) -> Path:
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def unigram(directory: Path) -> Path:
    """A Unigram vocabulary holds its control tokens as ordinary, very likely pieces."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0)]
    pieces += [(character, -5.0) for character in "abc </s>▁" if character not in "s"] + [
        ("s", -5.0)
    ]
    library = Raw(models.Unigram(list(dict(pieces).items()), unk_id=0))
    library.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "</s>", "<s>")])
    return save(directory, library, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def test_control_tokens_inside_the_vocabulary_are_cut(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(unigram(tmp_path))
    library = raw(tokenizer)
    library.encode_special_tokens = True
    assert 1 in library.encode("a</s>b").ids, "the library's own switch does not help here"
    ids = tokenizer.encode("a</s>b")
    assert 1 not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "a</s>b"
    assert tokenizer.encode_batch(["a</s>b", "c"], [True, True]) == [ids, tokenizer.encode("c")]


def test_a_character_that_is_a_control_token_is_refused(tmp_path: Path) -> None:
    library = Raw(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens([AddedToken("x", normalized=False)])
    tokenizer = Tokenizer.load(save(tmp_path, library, eos_token="x"))
    with pytest.raises(DataError, match="control token"):
        tokenizer.encode("z")


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_ids_of_the_ends(make_tokenizer: MakeTokenizer, stories260k: Path) -> None:
    stories = Tokenizer.load(stories260k)
    assert (stories.bos_id, stories.eos_id, stories.pad_id) == (1, 2, 2)
    assert stories.stop_ids == {1, 2}, "generation_config.json names both"
    assert stories.vocab_size == 512
    assert stories.opening_id == 1
    gpt2 = make_tokenizer("gpt2", CHATML, pad_token="<|im_end|>")
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id) == (None, 50256, 50258)
    assert gpt2.vocab_size == 50259
    assert gpt2.opening_id == 50256, "the end of the text before"


def test_the_fingerprint_follows_what_decides_ids(make_tokenizer: MakeTokenizer) -> None:
    one = make_tokenizer("stories260k")
    assert Tokenizer.load(one.name).fingerprint == one.fingerprint
    others = [
        make_tokenizer("stories260k", CHATML),
        make_tokenizer("stories260k", template="{{ messages }}"),
        make_tokenizer("stories260k", eos_token="<s>"),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_saved_files_load_again(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    one = make_tokenizer("stories260k", CHATML, "{{ messages[0].content }}")
    one.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("Once <s> upon") == one.encode("Once <s> upon")
    assert Tokenizer.load(tmp_path).chat_template == one.chat_template


def test_what_cannot_be_loaded_is_explained(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match="end-of-sequence"):
        Tokenizer.load(data_dir / "tokenizers" / "gpt2")


def test_an_older_format_is_converted(tmp_path: Path, data_dir: Path) -> None:
    words = (data_dir / "tokenizers" / "bert_base_uncased" / "vocab.txt").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(words)
    config = {"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a cat [SEP]")).replace(" ", "") == "acat[sep]"
    assert tokenizer.eos_id not in tokenizer.encode("a cat [SEP]")


def test_loading_needs_no_torch(stories260k: Path) -> None:
    code = (
        "import sys; from metier.text.template import Renderer;"
        "from metier.text.tokenizer import Tokenizer;"
        f"Renderer(Tokenizer.load({str(stories260k)!r}), 'plain').prompt("
        "[{'role': 'user', 'content': 'x'}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NEW = ("<gene>", "#TAG", "[x")
SENTENCE = "A <gene>is<gene> near #TAGged [x]."


@pytest.mark.parametrize("name", ["small", "gpt_neox_20b"])
def test_new_tokens_are_found_in_text_and_come_out_of_it(
    make_tokenizer: MakeTokenizer, name: str
) -> None:
    old = make_tokenizer(name)
    new = old.extended(NEW)
    assert new.vocab_size == old.vocab_size + len(NEW)
    ids = new.encode(SENTENCE)
    learned = [token for token in ids if token >= old.vocab_size]
    assert learned == [old.vocab_size + place for place in (0, 0, 1, 2)]
    assert new.decode(ids) == SENTENCE
    assert new.encode("a\n<gene>", "text")[-1] == new.encode("<gene>", "control")[-1] == learned[0]
    assert new.stop_ids == old.stop_ids
    assert new.control_tokens == old.control_tokens, "they are text, which a user may write"
    plain = "Other text, as before."
    assert new.encode(plain) == old.encode(plain)
    assert old.encode("<gene>") == make_tokenizer(name).encode("<gene>"), "the old one is as it was"


def test_a_tokenizer_with_new_tokens_comes_back(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    new = make_tokenizer("small").extended(NEW)
    new.save(tmp_path)
    stop = new.encode("a")
    again = Tokenizer.load(tmp_path, stop)
    assert again.encode(SENTENCE) == new.encode(SENTENCE)
    assert again.stop_ids == new.stop_ids | set(stop)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(SENTENCE) == new.encode(SENTENCE)


@pytest.mark.parametrize("known", ["<|endoftext|>", "the", "!"])
def test_a_token_that_is_known_already_is_refused(
    make_tokenizer: MakeTokenizer, known: str
) -> None:
    with pytest.raises(ConfigError, match="is a token of"):
        make_tokenizer("small").extended(["<gene>", known])


@pytest.mark.parametrize(
    ("name", "token", "back"),
    [("small", "µTAG", "a \ufffdTAGb"), ("stories260k", "<gene>", "a <gene> b")],
)
def test_a_token_that_would_change_text_is_refused(
    make_tokenizer: MakeTokenizer, name: str, token: str, back: str
) -> None:
    with pytest.raises(ConfigError, match=f"would read 'a {token}b' as '{back}'"):
        make_tokenizer(name).extended([token])
