from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from metier.data.pairs import PHENOMENA, Pair, generate, read
from metier.errors import DataError


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return generate(seed=0, per_phenomenon=300)


def test_there_are_hundreds_of_each_phenomenon_and_none_twice(pairs):
    assert Counter(pair.phenomenon for pair in pairs) == dict.fromkeys(PHENOMENA, 300)
    assert len({(pair.good, pair.bad) for pair in pairs}) == len(pairs)


def test_both_sentences_have_the_same_words_but_for_one_point(pairs):
    for pair in pairs:
        good, bad = pair.good.rstrip(".?").lower().split(), pair.bad.rstrip(".?").lower().split()
        assert len(good) == len(bad)
        assert good != bad
        changed = sum(a != b for a, b in zip(good, bad, strict=True))
        if pair.phenomenon == "inversion in questions":
            assert sorted(good) == sorted(bad)
        else:
            assert changed == 1, pair


def test_sentences_look_like_sentences(pairs):
    for pair in pairs:
        for sentence in (pair.good, pair.bad):
            assert sentence[0].isupper()
            assert sentence[-1] == ("?" if pair.phenomenon == "inversion in questions" else ".")
            assert "  " not in sentence
            assert 5 <= len(sentence.split()) <= 14


def test_no_good_sentence_is_bad_elsewhere(pairs):
    assert not {pair.good for pair in pairs} & {pair.bad for pair in pairs}


@pytest.mark.parametrize(
    "phenomenon",
    [
        "subject-verb agreement",
        "agreement across a phrase",
        "agreement across a clause",
        "determiner-noun agreement",
        "reflexive number",
        "reflexive gender",
        "past participle",
        "pronoun case",
        "auxiliary and verb form",
        "indefinite article",
    ],
)
def test_a_liking_for_one_word_gains_nothing(pairs, phenomenon):
    """Always taking the word of a contrast that is more frequent among the good ones."""
    contrasts: dict[frozenset, Counter] = {}
    for pair in pairs:
        if pair.phenomenon == phenomenon:
            good, bad = set(pair.good.lower().split()), set(pair.bad.lower().split())
            better, worse = (good - bad).pop(), (bad - good).pop()
            contrasts.setdefault(frozenset((better, worse)), Counter())[better] += 1
    right = sum(max(counts.values()) for counts in contrasts.values())
    assert right / 300 < 0.65


def test_the_seed_alone_decides(pairs):
    assert generate(seed=0, per_phenomenon=300) == pairs
    other = generate(seed=1, per_phenomenon=300)
    assert other != pairs
    assert generate(seed=0, per_phenomenon=2)[:2] == pairs[:2]


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="there are not 700 different pairs"):
        generate(per_phenomenon=700)


def test_no_sentence_is_one_of_blimps(pairs, data_dir):
    folder = data_dir / "blimp"
    theirs = set()
    for file in folder.glob("*.jsonl.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                theirs |= {row["sentence_good"], row["sentence_bad"]}
    assert len(theirs) > 10_000, "control: BLiMP was read"
    assert not theirs & {sentence for pair in pairs for sentence in (pair.good, pair.bad)}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_users_pairs_are_read_from_several_files(tmp_path):
    first = write(tmp_path / "a.jsonl", {"good": "Dogs bark.", "bad": "Dogs barks."})
    second = write(tmp_path / "b.jsonl", {"good": "Ça va.", "bad": "Va ça.", "phenomenon": "order"})
    found = read([first, second])
    assert [(pair.good, pair.bad, pair.phenomenon) for pair in found] == [
        ("Dogs bark.", "Dogs barks.", ""),
        ("Ça va.", "Va ça.", "order"),
    ]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"good": "A."}, "no sentence in 'good' or in 'bad'"),
        ({"good": "A.", "bad": " "}, "no sentence"),
        ({"good": ["A."], "bad": "B."}, "no sentence"),
        ({"good": "A.", "bad": "A."}, "the same sentence"),
        (["A.", "B."], "is a list"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, cause):
    file = write(tmp_path / "a.jsonl", {"good": "A.", "bad": "B."}, row)
    with pytest.raises(DataError, match=cause) as caught:
        read([file])
    assert caught.value.place == f"{file}:2"
    assert caught.value.remedy
