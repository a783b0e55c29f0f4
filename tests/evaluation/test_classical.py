from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import f1_score

from metier.errors import DataError, RunError
from metier.evaluation.classical import STRENGTHS, Classical, _features
from metier.graders.labels import write_labels
from metier.model.calibration import Calibration, calibration_error, temperature
from metier.records import Example
from metier.retrieval.lexical import tokenize
from tests.evaluation.talks import talk

LABELS = 8


def _example(text: str, answer: str) -> Example:
    return Example(
        text, ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
    )


@pytest.fixture(scope="module")
def parts(data_dir: Path) -> tuple[list[Example], list[Example], list[Example]]:
    """Eight intents of BANKING77's training file: three parts, every label in each."""
    with (data_dir / "banking77" / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kept = sorted({row["category"] for row in rows})[:LABELS]
    examples = [_example(r["text"], r["category"]) for r in rows if r["category"] in kept]
    train = [example for at, example in enumerate(examples) if at % 5 > 1]
    return train, examples[::5], examples[1::5]


@pytest.fixture(scope="module")
def fitted(parts: tuple[list[Example], list[Example], list[Example]]) -> Classical:
    return Classical.fit(parts[0], parts[1])


def _accuracy(model: Classical, examples: list[Example]) -> float:
    answers = model.generate([example.prompt for example in examples])
    return float(np.mean([a.text == e.answer for a, e in zip(answers, examples, strict=True)]))


def test_it_is_a_strong_baseline_on_real_intents(
    fitted: Classical, parts: tuple[list[Example], list[Example], list[Example]]
) -> None:
    assert len(fitted.labels) == LABELS
    assert _accuracy(fitted, parts[2]) > 0.95


def test_it_learns_from_the_labels(
    parts: tuple[list[Example], list[Example], list[Example]],
) -> None:
    train, validation, test = parts
    shuffled = np.random.default_rng(0).permutation([example.answer for example in train])
    pairs = zip(train, shuffled, strict=True)
    blind = Classical.fit([_example(e.input, str(label)) for e, label in pairs], validation)
    assert _accuracy(blind, test) < 0.5


def test_probabilities_are_those_of_a_plain_scikit_learn_pipeline(
    fitted: Classical, parts: tuple[list[Example], list[Example], list[Example]]
) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(
        analyzer=lambda text: [
            " ".join(tokenize(text)[at : at + n])
            for n in (1, 2)
            for at in range(len(tokenize(text)) - n + 1)
        ],
        sublinear_tf=True,
    )
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
    peer = make_pipeline(
        make_union(words, characters),
        OneVsRestClassifier(LogisticRegression(C=fitted.strength, solver="liblinear")),
    )
    peer.fit([e.input for e in parts[0]], [e.answer for e in parts[0]])
    texts = [example.input for example in parts[2]]
    assert peer.classes_.tolist() == list(fitted.labels)
    found = softmax(fitted.logits(texts), axis=1)
    np.testing.assert_allclose(found, peer.predict_proba(texts), atol=1e-4)


def test_the_answer_is_the_likeliest_under_the_temperature(fitted: Classical) -> None:
    texts = ["my card", "", "?!", "天気", "x " * 5000]
    logits = fitted.logits(texts)
    answers = fitted.generate([[{"role": "user", "content": text}] for text in texts])
    assert [answer.text for answer in answers] == [fitted.labels[at] for at in logits.argmax(1)]
    heat = fitted.calibration.temperature
    before, after = (softmax(logits / t, axis=1).max(1) for t in (1, heat))
    assert [answer.uncalibrated for answer in answers] == pytest.approx(before)
    assert [answer.probability for answer in answers] == pytest.approx(after)
    assert fitted.generate([]) == []


def test_probabilities_are_calibrated_on_validation(
    fitted: Classical, parts: tuple[list[Example], list[Example], list[Example]]
) -> None:
    """TF-IDF with one regression a label is far from sure enough; its test errors show it."""
    _, validation, test = parts
    rows = [example for example in validation if example.answer in fitted.labels]
    logits = fitted.logits([example.input for example in rows])
    wanted = np.array([[label == row.answer for label in fitted.labels] for row in rows])
    assert fitted.calibration == Calibration(temperature(logits, wanted))
    assert fitted.calibration.temperature < 0.8
    answers = fitted.generate([example.prompt for example in test])
    right = [a.text == e.answer for a, e in zip(answers, test, strict=True)]
    before = calibration_error([answer.uncalibrated or 0 for answer in answers], right)
    after = calibration_error([answer.probability or 0 for answer in answers], right)
    assert after < 0.05 < 0.1 < before


def test_validation_chooses_the_strength(
    fitted: Classical,
    parts: tuple[list[Example], list[Example], list[Example]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fitted.strength in STRENGTHS
    seen = {1.0: 0.4, 10.0: 0.9, 100.0: 0.9}
    monkeypatch.setattr(Classical, "_score", lambda self, examples, kind: seen[self.strength])
    assert Classical.fit(parts[0][::8], parts[1]).strength == 10.0


def test_training_twice_gives_the_same(
    fitted: Classical, parts: tuple[list[Example], list[Example], list[Example]]
) -> None:
    again = Classical.fit(parts[0], parts[1])
    texts = [example.input for example in parts[2]]
    assert np.array_equal(again.logits(texts), fitted.logits(texts))
    assert again.calibration == fitted.calibration


def test_what_was_saved_answers_the_same(
    fitted: Classical,
    parts: tuple[list[Example], list[Example], list[Example]],
    tmp_path: Path,
) -> None:
    fitted.save(tmp_path)
    loaded = Classical.load(tmp_path)
    prompts = [example.prompt for example in parts[2]]
    assert loaded.generate(prompts) == fitted.generate(prompts)
    assert (loaded.labels, loaded.strength) == (fitted.labels, fitted.strength)


def _several(text: str, *labels: str) -> Example:
    return _example(text, write_labels(labels))


@pytest.fixture(scope="module")
def emotions(data_dir: Path) -> list[Example]:
    """Rows of GoEmotions with four emotions, one of them or more; others with none."""
    wanted = {"0": "admiration", "4": "approval", "15": "gratitude", "18": "love"}
    with (data_dir / "goemotions" / "train.tsv").open(encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    found = [(row[0], [wanted[i] for i in row[1].split(",") if i in wanted]) for row in rows]
    many = [_several(text, *own) for text, own in found if len(own) > 1]
    single = [_several(text, *own) for text, own in found if len(own) == 1]
    none = [_several(text, *own) for text, own in found if not own]
    return [row for rows in zip(many, single, none, strict=False) for row in rows][:600]


def _indicators(rows: list[Example], labels: tuple[str, ...]) -> npt.NDArray[np.int64]:
    return np.array([[int(f'"{label}"' in row.answer) for label in labels] for row in rows])


def test_several_labels_are_those_of_scikit_learn(emotions: list[Example]) -> None:
    """One against the rest on an indicator matrix, the peer's way of the same."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    train, validation, test = emotions[:300], emotions[300:450], emotions[450:]
    fitted = Classical.fit(train, validation, "multi-label")
    assert fitted.labels == ("admiration", "approval", "gratitude", "love")
    features = [
        _features(fitted._vectorizers, [row.input for row in rows]) for rows in (train, test)
    ]
    wanted = [_indicators(rows, fitted.labels) for rows in (train, test)]
    peer = OneVsRestClassifier(LogisticRegression(C=fitted.strength, solver="liblinear"))
    chances = peer.fit(features[0], wanted[0]).predict_proba(features[1])
    found = expit(fitted.logits([row.input for row in test], one=False))
    np.testing.assert_allclose(found, chances, atol=1e-4)
    answers = fitted.generate([row.prompt for row in test])
    threshold = fitted.calibration.threshold
    assert threshold is not None
    for answer in answers:
        assert answer.text == write_labels(
            k for k, p in answer.probabilities.items() if p >= threshold
        )
    given = _indicators([_example("", answer.text) for answer in answers], fitted.labels)
    score = f1_score(wanted[1], given, average="samples", zero_division=1)
    assert score > 0.5, "a third has no label, and would be right with none"


def test_a_label_of_every_row_is_given_to_all(emotions: list[Example]) -> None:
    loved = [["all", "love"] if "love" in row.answer else ["all"] for row in emotions[:120]]
    rows = [_several(row.input, *own) for row, own in zip(emotions, loved, strict=False)]
    fitted = Classical.fit(rows[:80], rows[80:], "multi-label")
    assert all('"all"' in answer.text for answer in fitted.generate([row.prompt for row in rows]))


def test_several_labels_are_kept(emotions: list[Example], tmp_path: Path) -> None:
    fitted = Classical.fit(emotions[:100], emotions[100:150], "multi-label")
    fitted.save(tmp_path)
    prompts = [row.prompt for row in emotions[150:180]]
    loaded = Classical.load(tmp_path)
    assert loaded.generate(prompts) == fitted.generate(prompts)
    assert loaded.calibration == fitted.calibration


@pytest.mark.parametrize("name", ["classical.json", "classical.safetensors"])
def test_damaged_files_are_refused(fitted: Classical, tmp_path: Path, name: str) -> None:
    fitted.save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])
    with pytest.raises(RunError, match="no whole classical model"):
        Classical.load(tmp_path)


def test_two_labels_are_enough_and_one_is_not() -> None:
    two = [_example("good day", "yes"), _example("bad night", "no")] * 4
    assert _accuracy(Classical.fit(two, two), two) == 1.0
    with pytest.raises(DataError, match="1 different labels"):
        Classical.fit(two[::2], two)


def test_training_inputs_without_words_are_refused() -> None:
    silent = [_example("", "yes"), _example("…", "no")]
    with pytest.raises(DataError, match="holds no words"):
        Classical.fit(silent, silent)


def test_the_first_turn_decides() -> None:
    labels = ["cards", "cash", "fees", "loans", "pins", "rates", "tax"]
    rows = [talk(f"question {at} about {labels[at % 7]}", labels[at % 7]) for at in range(150)]
    model = Classical.fit(rows[:70], rows[70:110])
    assert _accuracy(model, rows[110:]) == 1.0
    cut = [talk("question", row.answer) for row in rows[110:]]
    assert _accuracy(model, cut) < 0.3, "control: nothing else tells the labels apart"


def test_of_single_messages_it_reads_just_that_message(
    fitted: Classical, parts: tuple[list[Example], list[Example], list[Example]]
) -> None:
    train, validation, test = parts
    instructed = [[_instructed(row) for row in part] for part in (train[::8], validation[::8])]
    plain = Classical.fit(train[::8], validation[::8])
    texts = [row.messages[0]["content"] or "" for row in test]
    same = Classical.fit(*instructed)
    assert np.array_equal(same.logits(texts), plain.logits(texts))
    answers = fitted.generate([row.prompt for row in test])
    assert fitted.generate([_instructed(row).prompt for row in test]) == answers
    rows = softmax(fitted.logits(texts) / fitted.calibration.temperature, axis=1)
    assert [answer.probability for answer in answers] == pytest.approx(rows.max(axis=1))


def _instructed(row: Example) -> Example:
    return Example(row.id, ({"role": "system", "content": "You answer."}, *row.messages))
