"""Near-duplicates, against a plain comparison of all pairs."""

from __future__ import annotations

import random
import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.data.prepare import components, near_duplicate_clusters, normalise, text_of
from metier.records import Example


def shingles(text: str) -> set[str]:
    """Character 5-grams; a shorter text is padded to one."""
    padded = text.ljust(5, "\0")
    return {padded[i : i + 5] for i in range(len(padded) - 4)}


def jaccard(left: str, right: str) -> float:
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def partition(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, own in enumerate(labels) if own == label) for label in set(labels)}


def all_pairs(texts: list[str], threshold: float) -> set[frozenset[int]]:
    """Connected components over all similar pairs, by breadth-first search."""
    near: dict[int, set[int]] = {i: {i} for i in range(len(texts))}
    for i, j in combinations(range(len(texts)), 2):
        if jaccard(texts[i], texts[j]) >= threshold - 1e-12:
            near[i].add(j)
            near[j].add(i)
    found, seen = set(), set()
    for start in near:
        if start in seen:
            continue
        component, edge = {start}, {start}
        while edge:
            edge = set().union(*(near[i] for i in edge)) - component
            component |= edge
        seen |= component
        found.add(frozenset(component))
    return found


# A first letter of its own for each text keeps the shared-frame rule out of the comparison.
WORDS = st.lists(
    st.sampled_from(["alpha", "beta", "gamma", "delta", "x", "yz"]), min_size=1, max_size=7
)


@given(
    texts=st.lists(WORDS.map(" ".join) | st.text("ab", min_size=1, max_size=8), max_size=12),
    threshold=st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9, 1.0]),
)
def test_all_pairs_above_the_threshold_are_found_and_no_others(
    texts: list[str], threshold: float
) -> None:
    framed = ["q" + texts[0], "w" + texts[0], *texts, "zend", "kk"] if texts else []
    normal = [normalise(text) for text in framed]
    found = near_duplicate_clusters(framed, threshold)
    assert partition(found) == all_pairs(normal, threshold)


@settings(max_examples=20)
@given(st.randoms(), st.sampled_from([0.5, 0.7, 0.8]))
def test_texts_close_to_the_threshold_are_told_apart(
    source: random.Random, threshold: float
) -> None:
    """Copies with more and more signs changed lie on both sides of any threshold."""
    bases = ["".join(source.choices("abcdefgh ", k=60)) for _ in range(2)]
    texts = ["q", "w"]
    for count in range(30):
        text = list(source.choice(bases))
        for at in source.sample(range(60), count // 4):
            text[at] = "z"
        texts.append(normalise("".join(text)))
    assert partition(near_duplicate_clusters(texts, threshold)) == all_pairs(texts, threshold)


@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=10), st.randoms())
def test_clusters_do_not_depend_on_the_order(texts: list[str], source: random.Random) -> None:
    order = list(range(len(texts)))
    source.shuffle(order)
    before = partition(near_duplicate_clusters(texts, 0.6))
    shuffled = partition(near_duplicate_clusters([texts[i] for i in order], 0.6))
    assert {frozenset(order[i] for i in cluster) for cluster in shuffled} == before


def test_cluster_is_named_by_its_first_text() -> None:
    texts = ["one text here", "another thing", "One  TEXT here", "ANOTHER thing!"]
    assert near_duplicate_clusters(texts, 0.8) == [0, 1, 0, 1]
    assert near_duplicate_clusters([], 0.8) == []
    assert near_duplicate_clusters([""], 0.8) == [0]


def test_what_all_texts_share_at_both_ends_does_not_make_them_alike() -> None:
    frame = "### Question:\n{}\n\n### Answer: please be so kind as to answer in one short sentence"
    texts = [frame.format(word) for word in ("cats", "dogs", "trees")]
    assert near_duplicate_clusters(texts, 0.5) == [0, 1, 2]
    assert jaccard(texts[0], texts[1]) > 0.5, "control: with the frame they would be alike"


def test_normalise_folds_case_width_and_white_space() -> None:
    assert normalise(" Straße\t\n１２ ") == "strasse 12"


def test_rows_are_compared_by_all_turns_but_the_system_and_the_answer() -> None:
    row = Example(
        "1",
        (
            {"role": "system", "content": "same for all"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "answer"},
        ),
    )
    assert text_of(row) == "a\nb\nc"


def test_components_join_over_shared_keys() -> None:
    assert components([("a",), ("b", "c"), ("a", "d"), ("c",), ("e",)]) == [0, 1, 0, 1, 4]


@pytest.mark.parametrize("kind", ["questions", "template", "one cluster"])
def test_many_rows_take_seconds(kind: str) -> None:
    source = random.Random(0)
    syllables = [a + b for a in "bdfklmnprst" for b in "aeiou"]
    words = ["".join(source.choices(syllables, k=3)) for _ in range(2000)]
    texts = {
        "questions": lambda i: " ".join(source.choices(words, k=12)),
        "template": lambda i: f"{i % 7} Where is order {source.randrange(10**6)}, day {i % 365}?",
        "one cluster": lambda i: f"{i % 7} text that all the rows have in common " * 3 + str(i),
    }[kind]
    rows = [texts(i) for i in range(4000 if kind == "one cluster" else 12_000)]
    start = time.process_time()
    clusters = near_duplicate_clusters([*rows, rows[0] + "!"], 0.8)
    assert time.process_time() - start < 10
    assert clusters[-1] == clusters[0]
