"""Labels spelled alike: refused where graders see one, warned of where they see two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from metier.data.audit import audit
from metier.data.labels import alike, refuse_same
from metier.data.split import split
from metier.errors import DataError
from metier.graders import load_grader
from metier.task import Split
from tests.data.test_split import example, rows

SAME = [("Tech support", "Tech  support"), ("caf\u00e9", "cafe\u0301"), ("a b", "a\u00a0b")]
OTHER = [("Billing", "billing"), ("\ufb01t", "fit"), ("card", "cards")]


@pytest.mark.parametrize(("one", "other"), [*SAME, *OTHER])
def test_what_is_refused_is_what_the_grader_cannot_tell_apart(one: str, other: str) -> None:
    pair = [example(1, "a", one), example(2, "b", other)]
    grader = load_grader("exact", "classification", [one, other], Path())
    if grader.grade(other, pair[0]).value:
        with pytest.raises(DataError, match="white space alone"):
            refuse_same(pair)
    else:
        refuse_same(pair)


def test_a_split_refuses_one_label_written_twice() -> None:
    examples = rows(60)
    split(examples, Split(), "classification")
    first, *rest = examples
    answer = {"role": "assistant", "content": first.answer + "  x"}
    other = {"role": "assistant", "content": first.answer + " x"}
    twice = [
        dataclasses.replace(first, messages=(*first.prompt, answer)),
        dataclasses.replace(rest[0], messages=(*rest[0].prompt, other)),
        *rest[1:],
    ]
    with pytest.raises(DataError, match="differs from"):
        split(twice, Split(), "classification")
    split(twice, Split(), "expansion")


def test_labels_alike_are_named() -> None:
    assert alike(["Billing", "card", "refund"]) == ()
    (warning,) = alike(["Billing", "card", "billing", "Card ", "refund"])
    assert "'Billing' and 'billing'; 'Card ' and 'card'; if" in warning
    (warning,) = alike([label for n in range(7) for label in (f"a{n}", f"A{n}")])
    assert "and 2 more" in warning


def test_the_audit_warns_of_labels_alike() -> None:
    examples = rows(90, labels=1)
    mixed = [
        dataclasses.replace(
            row,
            messages=(*row.prompt, {"role": "assistant", "content": ("Yes", "yes", "no")[i % 3]}),
        )
        for i, row in enumerate(examples)
    ]
    parts = split(mixed, Split(), "classification")
    assert "'Yes' and 'yes'" in audit(parts, "classification", 0.8).warnings[-1]
    assert not any("Yes" in text for text in audit(parts, "expansion", 0.8).warnings)
