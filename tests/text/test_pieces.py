"""Streamed pieces joined are the whole answer, and no piece shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.text.pieces import Pieces
from metier.text.tokenizer import Tokenizer
from tests.text.conftest import MakeTokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"), max_size=20)


@pytest.fixture(scope="module", params=["small", "stories260k"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(request.param)


def stream(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Pieces]:
    pieces = Pieces(tokenizer, stop)
    shown = []
    for token in tokenizer.encode(text):
        shown.append(pieces.push(token))
        if pieces.stopped:
            break
    return [*shown, pieces.finish()], pieces


@settings(max_examples=150)
@given(text=TEXT)
def test_the_pieces_are_the_answer(tokenizer: Tokenizer, text: str) -> None:
    shown, pieces = stream(tokenizer, text)
    assert "".join(shown) == text.strip() == pieces.text()
    assert "\ufffd" not in "".join(shown)


def test_half_a_character_is_held_back(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("small")
    ids = tokenizer.encode("🦜")
    assert len(ids) > 1, "the hazard is real: the character is several tokens"
    shown, _ = stream(tokenizer, "a🦜")
    assert shown[1:] == [""] * (len(ids) - 1) + ["🦜", ""]


def test_text_shows_as_soon_as_it_is_certain(make_tokenizer: MakeTokenizer) -> None:
    shown, _ = stream(make_tokenizer("small"), "One two three")
    assert shown == ["One", " two", " three", ""]


@settings(max_examples=150)
@given(text=st.text("ab#\n ", max_size=16), stop=st.text("ab#\n", min_size=1, max_size=3))
def test_a_stop_string_ends_the_answer(tokenizer: Tokenizer, text: str, stop: str) -> None:
    shown, pieces = stream(tokenizer, text, (stop,))
    whole = text.lstrip()
    assert "".join(shown) == whole.split(stop)[0].strip()
    assert pieces.stopped == (stop in whole)


def test_of_several_stop_strings_the_first_in_the_text_counts(
    make_tokenizer: MakeTokenizer,
) -> None:
    shown, _ = stream(make_tokenizer("small"), "one two three", ("three", " two"))
    assert "".join(shown) == "one"


def test_the_start_of_a_stop_string_is_held_back(make_tokenizer: MakeTokenizer) -> None:
    shown, pieces = stream(make_tokenizer("small"), "end #", ("##",))
    assert shown == ["end", "", " #"]
    assert not pieces.stopped
