"""The split: nothing leaks, nothing moves, every label everywhere, everything counted."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metier.data.prepare import normalise
from metier.data.split import (
    PARTS,
    Parts,
    assemble,
    corpus_overlap,
    not_looked_for,
    read_parts,
    split,
)
from metier.errors import DataError
from metier.records import Example, Message
from metier.retrieval import chunks
from metier.task import Data, Split, Task

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrs"]


def example(number: int, text: str, answer: str, group: str = "") -> Example:
    """An example whose id is its number."""
    return Example(
        id=f"r{number:05}",
        messages=({"role": "user", "content": text}, {"role": "assistant", "content": answer}),
        group=group or text,
        source=f"rows:{number}",
    )


def rows(count: int, labels: int = 3, seed: int = 0, copies: float = 0.2) -> list[Example]:
    """Sentences of nine words, some of them near-duplicates or copies of earlier ones."""
    source = random.Random(seed)
    made: list[Example] = []
    for number in range(count):
        if made and source.random() < copies:
            text = source.choice(made).input + source.choice(["", "!", " ?", "s"])
        else:
            text = " ".join(source.choices(WORDS, k=9))
        group = f"g{source.randrange(count)}" if source.random() < 0.3 else ""
        made.append(example(number, text, f"label {source.randrange(labels)}", group))
    return made


def shingles(text: str) -> set[str]:
    normal = normalise(text)
    return {normal[i : i + 5] for i in range(max(1, len(normal) - 4))}


def part_of(parts: Parts) -> dict[str, str]:
    return {row.id: name for name in PARTS for row in getattr(parts, name)}


def check_sealed(parts: Parts, threshold: float) -> None:
    """No group, copy or near-duplicate stands in two parts."""
    for low, high in combinations(PARTS, 2):
        above = [(row.group, shingles(row.input)) for row in getattr(parts, high)]
        for row in getattr(parts, low):
            own = shingles(row.input)
            for group, other in above:
                assert row.group != group
                assert len(own & other) < threshold * len(own | other)


SEEDS = st.integers(0, 10**6)
CONFIG = Split(test=0.3, validation=0.2)


@settings(max_examples=15)
@given(SEEDS)
def test_no_group_or_near_duplicate_stands_in_two_parts(seed: int) -> None:
    made = rows(120, seed=seed)
    parts = split(made, CONFIG, "classification")
    check_sealed(parts, CONFIG.near_duplicate)
    assert len(part_of(parts)) + sum(parts.removed.values()) == len(made)


def test_control_without_removal_the_check_fails() -> None:
    made = rows(120, seed=1)
    leaky = Parts(tuple(made[:60]), (), tuple(made[60:]), {}, {}, ())
    with pytest.raises(AssertionError):
        check_sealed(leaky, 0.8)


@settings(max_examples=15)
@given(SEEDS, st.randoms())
def test_the_order_of_rows_does_not_matter(seed: int, source: random.Random) -> None:
    made = rows(100, seed=seed)
    config = CONFIG.model_copy(update={"max_train": 30, "max_test": 9})
    before = split(made, config, "classification")
    shuffled = made[:]
    source.shuffle(shuffled)
    assert split(shuffled, config, "classification") == before


@settings(max_examples=15)
@given(SEEDS, SEEDS)
def test_added_rows_never_move_a_row(seed: int, other: int) -> None:
    """With kind expansion no rare label is repaired, the one exception."""
    made = rows(80, seed=seed)
    added = [dataclasses.replace(r, id=f"x{r.id}") for r in rows(80, seed=other)]
    before = part_of(split(made, CONFIG, "expansion"))
    after = part_of(split([*made, *added], CONFIG, "expansion"))
    kept = before.keys() & after.keys()
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}


@settings(max_examples=15)
@given(SEEDS)
def test_rows_of_the_test_part_are_never_removed(seed: int) -> None:
    parts = split(rows(100, seed=seed), CONFIG, "expansion")
    assert not any(reason.startswith("test") for reason in parts.removed)


def test_another_seed_gives_another_test_part() -> None:
    made = rows(200)
    other = CONFIG.model_copy(update={"seed": 1})
    first, second = split(made, CONFIG, "expansion"), split(made, other, "expansion")
    assert {row.id for row in first.test} != {row.id for row in second.test}
    assert first.test_fingerprint != second.test_fingerprint


def test_shares_are_about_as_asked() -> None:
    parts = split(rows(3000, copies=0), Split(test=0.3, validation=0.1), "expansion")
    shares = [len(getattr(parts, name)) / 3000 for name in PARTS]
    assert shares == pytest.approx([0.6, 0.1, 0.3], abs=0.03)


def test_reasons_name_what_was_removed() -> None:
    sentence = "the quick brown fox jumps over the lazy dog and runs far away from there"
    fill = [example(i, f"{' '.join(WORDS[i : i + 8])} {i}", "a") for i in range(40)]
    train = [
        *fill[:20],
        example(100, sentence.upper(), "a", "own group"),
        example(101, sentence + "!", "a"),
        example(102, "something else entirely, with words of its own", "a", "shared"),
    ]
    test = [*fill[20:30], example(200, sentence, "a"), example(201, "as different", "a", "shared")]
    parts = assemble(train, fill[30:], test, Split(), "expansion")
    assert parts.removed == {
        "train-duplicate-of-test": 1,
        "train-group-of-test": 1,
        "train-near-duplicate-of-test": 1,
    }
    assert {row.id for row in parts.test} == {row.id for row in test}


def test_official_parts_stay_and_missing_ones_are_split_off() -> None:
    made = [dataclasses.replace(row, group=row.id) for row in rows(200, copies=0)]
    train, test = made[:150], made[150:]
    parts = assemble(train, None, test, Split(validation=0.2), "expansion")
    assert {row.id for row in parts.test} == {row.id for row in test}
    assert 15 <= len(parts.validation) <= 45
    both = assemble(train, made[150:170], made[170:], Split(), "expansion")
    assert {row.id for row in both.validation} == {row.id for row in made[150:170]}
    alone = assemble(train, made[150:170], None, Split(test=0.3), "expansion")
    assert 25 <= len(alone.test) <= 65
    assert {row.id for row in alone.validation} == {row.id for row in made[150:170]}


def test_official_parts_may_use_the_same_ids() -> None:
    train = [example(i, " ".join(WORDS[i : i + 9]), "a") for i in range(0, 90, 3)]
    test = [example(i, " ".join(WORDS[i + 100 : i + 109]), "a") for i in range(0, 90, 3)]
    parts = assemble(train, None, test, Split(validation=0.3), "expansion")
    assert len(part_of(parts)) == 60
    assert {row.id for row in parts.test} == {row.id for row in test}


@settings(max_examples=20)
@given(SEEDS, st.integers(2, 40))
def test_every_label_with_three_independent_groups_stands_in_every_part(
    seed: int, labels: int
) -> None:
    source = random.Random(seed)
    made = [
        example(i, " ".join(source.choices(WORDS, k=9)), f"label {i % labels}")
        for i in range(max(150, labels * source.choice([3, 4, 8])))
    ]
    parts = split(made, Split(test=0.2, validation=0.15), "classification")
    everywhere = {row.answer for row in made}
    for name in PARTS:
        assert {row.answer for row in getattr(parts, name)} == everywhere
    check_sealed(parts, 0.8)
    assert not any("lacks the labels" in warning for warning in parts.warnings)


def test_rare_labels_are_named_and_go_to_training_first() -> None:
    made = rows(200, labels=2, copies=0)
    made += [example(900, "one of its kind in the whole world", "unique")]
    made += [example(901 + i, f"a pair of rows {'xyz'[i] * 9}", "pair") for i in range(2)]
    parts = split(made, Split(), "classification")
    assert "unique" in {row.answer for row in parts.train}
    assert "pair" in {row.answer for row in parts.train}
    assert "pair" in {row.answer for row in parts.test}
    warnings = " / ".join(parts.warnings)
    assert "the test part lacks the labels 'unique'" in warnings
    assert "the validation part lacks the labels 'pair', 'unique'" in warnings


@settings(max_examples=40)
@given(SEEDS)
def test_a_move_never_takes_a_label_from_its_part(seed: int) -> None:
    """Groups of two labels: against the same split without the repair of labels."""
    source = random.Random(seed)
    made = []
    for number in range(60):
        for label in source.choices("abcdefghijklmnopqrst", k=2):
            text = " ".join(source.choices(WORDS, k=9))
            made.append(example(len(made), text, label, f"g{number}"))
    after = split(made, Split(test=0.25, validation=0.25), "classification")
    before = split(made, Split(test=0.25, validation=0.25), "expansion")
    groups = Counter(label for _, label in {(row.group, row.answer) for row in made})
    common = {label for label, count in groups.items() if count >= 3}
    for name in PARTS:
        labels_before = {row.answer for row in getattr(before, name)} & common
        assert labels_before <= {row.answer for row in getattr(after, name)}


def test_caps_keep_all_labels_in_their_shares() -> None:
    made = rows(1500, labels=2, copies=0)
    made += [example(5000 + i, f"rare {' '.join(WORDS[i : i + 8])}", "rare") for i in range(30)]
    config = Split(max_train=100, max_validation=20, max_test=40)
    parts = split(made, config, "classification")
    sizes = {name: len(getattr(parts, name)) for name in PARTS}
    assert sizes == {"train": 100, "validation": 20, "test": 40}
    counts = Counter(row.answer for row in parts.train)
    assert counts["rare"] == pytest.approx(2, abs=1)
    assert counts["label 0"] == pytest.approx(49, abs=4)
    assert parts.removed["over-max-train"] > 800
    with pytest.raises(DataError, match=r"split.max_train: 2 rows cannot hold all 3 labels"):
        split(made, Split(max_train=2), "classification")


def test_a_smaller_cap_keeps_a_subset() -> None:
    made = rows(600, copies=0)
    large = split(made, Split(max_train=200), "expansion")
    small = split(made, Split(max_train=50), "expansion")
    assert {row.id for row in small.train} < {row.id for row in large.train}


def test_clusters_join_groups_and_near_duplicates() -> None:
    made = rows(150, copies=0)
    sentence = "a sentence that stands there twice with one sign of difference"
    made += [example(900, sentence, "a", "one"), example(901, sentence + "!", "a", "two")]
    made += [example(902, "quite another text of the second group", "b", "two")]
    parts = assemble(
        made[:100], made[100:150], made[150:] * 1 + rows_of_test(), Split(), "expansion"
    )
    assert parts.clusters["r00900"] == parts.clusters["r00901"] == parts.clusters["r00902"]
    assert len(set(parts.clusters.values())) == 1 + len(rows_of_test()) + len(parts.validation)


def rows_of_test() -> list[Example]:
    return [example(2000 + i, " ".join(WORDS[3 * i : 3 * i + 7]), "a") for i in range(10)]


def test_conflicting_answers_are_warned_of_but_not_for_free_text() -> None:
    made = rows(100, copies=0)
    made += [
        dataclasses.replace(
            made[0],
            id="again",
            messages=(made[0].messages[0], {"role": "assistant", "content": "label 9"}),
        )
    ]
    made += [example(800 + i, " ".join(WORDS[i * 9 : i * 9 + 9]), "label 9") for i in range(8)]
    assert any("1 inputs" in w for w in split(made, Split(), "extraction").warnings)
    assert not any("1 inputs" in w for w in split(made, Split(), "expansion").warnings)


def test_few_rows_are_refused_with_the_number_needed() -> None:
    with pytest.raises(DataError, match="are needed") as caught:
        split(rows(8, copies=0), Split(), "expansion")
    assert "give about" in caught.value.remedy
    with pytest.raises(DataError, match="test part"):
        assemble(rows(50), None, rows(2, seed=5), Split(), "expansion")
    with pytest.raises(DataError, match="at least 5 are needed"):
        split([], Split(), "expansion")


def test_a_small_test_part_is_warned_of() -> None:
    assert any(
        "only large differences" in w for w in split(rows(200), Split(), "expansion").warnings
    )
    assert split(rows(900, copies=0), Split(), "expansion").warnings == ()


def test_one_label_is_no_classification() -> None:
    with pytest.raises(DataError, match="same label"):
        split(rows(100, labels=1), Split(), "classification")


def test_fingerprint_names_the_content_of_the_test_part() -> None:
    parts = split(rows(200), Split(), "expansion")
    backwards = dataclasses.replace(parts, test=parts.test[::-1])
    fewer = dataclasses.replace(parts, test=parts.test[1:])
    renamed = dataclasses.replace(
        parts, test=tuple(dataclasses.replace(r, id=f"x{r.id}") for r in parts.test)
    )
    assert backwards.test_fingerprint == parts.test_fingerprint == renamed.test_fingerprint
    assert fewer.test_fingerprint != parts.test_fingerprint


def test_a_test_row_is_known_by_its_input_alone() -> None:
    parts = split(rows(200), Split(), "expansion")
    chat = parts.test[0].messages
    again = dataclasses.replace(
        parts.test[0], id="x", messages=(*chat[:-1], {"role": "assistant", "content": "mended"})
    )
    other = dataclasses.replace(again, messages=({"role": "user", "content": "new"}, chat[-1]))
    known = dataclasses.replace(parts, test=(again, other)).test_rows
    assert known[0] == parts.test_rows[0]
    assert known[1] not in parts.test_rows
    assert len(parts.test_rows) == len(parts.test)


def test_passages_with_test_rows_are_found() -> None:
    test = [
        example(1, "What does the warranty cover when the device was opened?", "short"),
        example(2, "hi", "The warranty covers all defects of material for twenty-four months."),
    ]
    documents = [
        "FAQ. What does the  WARRANTY cover when the device was opened? See below.",
        "The warranty covers all defects of material for twenty-four months. Then it ends.",
        "hi, this is a short greeting; short",
        "Nothing of interest.",
    ]
    assert corpus_overlap([documents], test) == {"test-input": [0], "test-answer": [1]}
    assert corpus_overlap([documents[2:], documents[:2]], test) == {
        "test-input": [2],
        "test-answer": [3],
    }
    assert corpus_overlap([documents[2:]], test) == {}


def prose(draw: random.Random, words: int) -> str:
    """Sentences of 12 words that do not repeat."""
    text = [f"{draw.choice('abcdefgh')}{draw.randrange(10**6):06}" for _ in range(words)]
    return " ".join(f"{word}." if i % 12 == 11 else word for i, word in enumerate(text))


@pytest.mark.parametrize("words", [72, 700])
def test_a_leak_is_found_wherever_the_document_is_cut(words: int) -> None:
    """Every passage that holds a piece of it is found, and no other one."""
    draw = random.Random(words)
    leaks = [prose(draw, words) for _ in range(50)]
    test = [example(i, leak, "short") for i, leak in enumerate(leaks)]
    clean = chunks.split(prose(draw, 600), "clean.md")
    paragraphs = [f"{prose(draw, draw.randrange(36, 120, 12))} {leak} end." for leak in leaks]
    passages = [p.text for p in chunks.split("\n\n".join(paragraphs), "leaked.md")]
    pieces = {tuple(leak.split()[i : i + 2]) for leak in leaks for i in range(words - 1)}
    holding = [
        len(clean) + number
        for number, passage in enumerate(passages)
        if not pieces.isdisjoint(pairwise(passage.split()))
    ]
    documents = [[passage.text for passage in clean], passages]
    assert corpus_overlap(documents, test) == {"test-input": holding}
    assert len(holding) > 60, "some stand across a cut"
    for row in test:
        assert corpus_overlap(documents, [row])


def test_ordinary_text_holds_no_test_row() -> None:
    draw = random.Random(0)
    test = [example(i, prose(draw, 40), prose(draw, 40)) for i in range(200)]
    opened = [prose(draw, 30) + " " + " ".join(row.input.split()[:-1]) for row in test]
    assert corpus_overlap([opened], test) == {}, "the last word is missing"


def test_all_turns_of_a_chat_are_looked_for_and_the_last_alone() -> None:
    turns = [
        "Is it open today?",
        "Yes, until six.",
        "And is it open on the last Sunday of the year?",
    ]
    roles = ("user", "assistant", "user", "assistant")
    chat = tuple(
        Message(role=role, content=text) for role, text in zip(roles, [*turns, "No."], strict=True)
    )
    corpus = ["\n".join(turns[:2]), turns[2], "Is it open today?"]
    assert corpus_overlap([corpus], [Example("1", chat)]) == {"test-input": [0, 1]}
    assert corpus_overlap([corpus[1:]], [Example("1", chat)]) == {"test-input": [0]}


def test_texts_too_short_to_be_looked_for_are_counted() -> None:
    long = "a text of forty characters, that is looked for"
    test = [example(1, long, "yes"), example(2, "hi", "no"), example(3, long, "x" * 40)]
    assert [warning.split(" characters")[0] for warning in not_looked_for(test)] == [
        "1 of 3 test inputs are shorter than 40",
        "2 of 3 test answers are shorter than 40",
    ]
    assert not_looked_for(test[2:]) == []


@settings(max_examples=10)
@given(SEEDS)
def test_parts_are_read_from_files(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    import json

    folder = tmp_path_factory.mktemp("task")
    made = rows(120, seed=seed, copies=0)
    assume(len({row.input for row in made}) == 120)

    def write(name: str, chosen: list[Example]) -> None:
        lines = [json.dumps({"text": row.input, "label": row.answer}) for row in chosen]
        (folder / name).write_text("\n".join(lines), "utf-8")

    write("all.jsonl", made)
    write("train.jsonl", made[:80])
    write("test.jsonl", made[80:])
    shares = Split(test=0.3, validation=0.3)
    official = Data(train="train.jsonl", test="test.jsonl")
    one = Task(name="t", kind="extraction", data=Data(file="all.jsonl"), split=shares)
    two = Task(name="t", kind="extraction", data=official, split=shares)
    assert len(part_of(read_parts(one, folder))) == 120
    assert {row.input for row in read_parts(two, folder).test} == {r.input for r in made[80:]}


def test_a_label_outside_the_closed_set_is_refused(tmp_path: Path) -> None:
    import json

    labels = ["yes", "no"] * 40 + ["Yes"]
    lines = [json.dumps({"text": f"row {i}", "label": label}) for i, label in enumerate(labels)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    task = Task(name="t", kind="classification", data=Data(file="a.jsonl"), labels=("yes", "no"))
    with pytest.raises(DataError, match="label 'Yes' is not among") as caught:
        read_parts(task, tmp_path)
    assert caught.value.place.endswith("a.jsonl:81")
    assert "is it 'yes'?" in caught.value.remedy


def test_banking77_split_has_all_labels_and_no_leak(data_dir: Path) -> None:
    task = Task(
        name="b", kind="classification", data=Data(file="banking77/train.csv"),
        split=Split(max_train=2000, max_validation=200, max_test=400),
    )  # fmt: skip
    parts = read_parts(task, data_dir)
    for name in PARTS:
        assert len({row.answer for row in getattr(parts, name)}) == 77
    assert parts.removed["train-near-duplicate-of-test"] > 10
    sample = dataclasses.replace(parts, train=parts.train[:300], test=parts.test[:100])
    check_sealed(sample, 0.8)
