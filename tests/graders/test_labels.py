"""Several labels in one answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.graders.json_text import NotJson
from metier.graders.labels import labels_of, read_labels, write_labels


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('["joy","anger"]', ("anger", "joy")),
        (' ["joy", "joy"] ', ("joy",)),
        ("[]", ()),
        ("joy, anger", ("anger", "joy")),
        ("joy|anger;love", ("anger", "joy", "love")),
        ("joy,", ("joy",)),
        ("joy", ("joy",)),
        ("4,27", ("27", "4")),
        ("27", ("27",)),
        ("1.0", ("1.0",)),
        ("[4, 27]", ("27", "4")),
        ("[true]", ("true",)),
        ('["very  sad"]', ("very sad",)),
        ('["a, b"]', ("a, b",)),
        ("", ()),
    ],
)
def test_labels_are_read(text: str, labels: tuple[str, ...]) -> None:
    assert read_labels(text) == labels


@pytest.mark.parametrize("text", ['{"joy": 1}', '[["joy"]]', "[null]", "null"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(NotJson, match="list"):
        read_labels(text)


@given(
    st.sets(st.text("abcé ,;|\"'\\", min_size=1).map(lambda t: " ".join(t.split())).filter(bool))
)
def test_what_is_written_is_read(labels: set[str]) -> None:
    assert set(read_labels(write_labels(labels))) == labels


def test_kinds_without_labels_have_none() -> None:
    assert labels_of("a, b", "classification") == ("a, b",)
    assert labels_of("a, b", "multi-label") == ("a", "b")
    assert labels_of("a, b", "extraction") == labels_of("a, b", "expansion") == ()
