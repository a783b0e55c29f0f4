"""Which change of a task makes which stage anew: a table, so that every stage is looked at."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from metier.recipes.keys import Keys
from metier.recipes.workbench import Workbench, open_workbench, read_task
from metier.runs import fingerprint
from metier.task import Arm, Lora, Remote, Retrieval
from tests.recipes.conftest import write_task

Change = Callable[[Workbench], Workbench]


def of_task(**fields: object) -> Change:
    return lambda bench: dataclasses.replace(bench, task=bench.task.model_copy(update=fields))


def of_training(**fields: object) -> Change:
    return lambda bench: of_task(training=bench.task.training.model_copy(update=fields))(bench)


def other_answer(part: str, *, field: str = "messages") -> Change:
    def change(bench: Workbench) -> Workbench:
        first, *rest = getattr(bench.parts, part)
        messages = (*first.messages[:-1], {"role": "assistant", "content": "food, too"})
        row = dataclasses.replace(first, **{field: messages if field == "messages" else "new"})
        return dataclasses.replace(
            bench, parts=dataclasses.replace(bench.parts, **{part: (row, *rest)})
        )

    return change


def other_base(bench: Workbench) -> Workbench:
    base = bench.base_dir / "base"
    config = base / "config.json"
    config.write_text(config.read_text() + " ")
    return bench


CHANGES: dict[str, Change] = {
    "instruction": of_task(instruction="Say what it is."),
    "good": of_task(good="The right label."),
    "bad": of_task(bad="A sentence."),
    "kind": of_task(kind="extraction"),
    "template": of_task(template="question-answer"),
    "max_new_tokens": of_task(max_new_tokens=7),
    "grader": of_task(grader="rouge_l"),
    "max_length": of_training(max_length=64),
    "shots": of_task(retrieval=Retrieval(shots=2)),
    "epochs": of_training(epochs=3),
    "rank": of_training(lora=Lora(rank=4)),
    "rehearsal": of_training(rehearsal=0.5),
    "virtual_tokens": of_training(virtual_tokens=5),
    "layers": of_training(layers=(0, -1)),
    "added_tokens": of_training(added_tokens=("<gene>",)),
    "remote": of_task(remote=Remote(base_url="http://127.0.0.1:1/v1", model="other")),
    "prices": lambda bench: of_task(
        remote=bench.task.remote.model_copy(
            update={"input_price": 2.0, "output_price": 8.0, "api_key_env": "OTHER_KEY"}
        )
    )(bench),
    "labels": lambda bench: dataclasses.replace(bench, labels=(*bench.labels, "tool")),
    "documents": lambda bench: dataclasses.replace(bench, passages=("A dog barks.",)),
    "training row": other_answer("train"),
    "validation row": other_answer("validation"),
    "what a grader reads": other_answer("validation", field="time"),
    "base": other_base,
    "seeds": of_training(seeds=(5, 6)),
    "forgetting": lambda bench: of_task(
        forgetting=bench.task.forgetting.model_copy(update={"skill_tolerance": 0.5})
    )(bench),
    "margin": of_task(margin=0.1, better="Sure.", machine_hour=9.0, name="other"),
}
ROWS = {"training row", "validation row"}
BASE = {"base", "template"}
LENGTH = {"max_new_tokens", "max_length", "labels"}
ASKED = {"instruction", "good", "bad", "kind", "grader"} | LENGTH
PROMPT = ROWS | BASE | ASKED | {"what a grader reads"}
FEW_SHOT = PROMPT | {"shots"}
TUNED = ROWS | BASE | {"epochs", "rehearsal", "max_length"}
FULL = TUNED | {"layers", "added_tokens"}
LORA = FULL | {"rank"}
MAKING = {
    "prompt": PROMPT,
    "prompt/likelihood": PROMPT,
    "few-shot": FEW_SHOT,
    "rag": FEW_SHOT | {"documents"},
    "remote": (PROMPT - BASE - {"max_length"}) | {"remote"},
    "classical": ROWS,
    "lora": LORA,
    "lora/head": (LORA - {"rehearsal"}) | {"labels"},
    "lora/tags": LORA - {"rehearsal"},
    "full": FULL,
    "full/head": (FULL - {"rehearsal"}) | {"labels"},
    "lora+rag": LORA | LENGTH | {"shots", "documents"},
    "dora": LORA,
    "ia3": TUNED | {"layers"},
    "prompt-tuning": TUNED | {"virtual_tokens"},
    "prefix-tuning+rag": TUNED | LENGTH | {"virtual_tokens", "shots", "documents"},
}
ANSWERED = {"kind"} | LENGTH
GRADED = {"grader", "validation row", "what a grader reads"}


@pytest.fixture
def bench(tmp_path: Path, stories260k: Path) -> Workbench:
    shutil.copytree(stories260k, tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        file.chmod(0o644)
    remote = {"base_url": "http://a/v1", "model": "m"}
    task = write_task(tmp_path, tmp_path / "base", remote=remote, max_new_tokens=None)
    return open_workbench(read_task(task), tmp_path)


def changed_by(bench: Workbench, key: Callable[[Workbench], object]) -> set[str]:
    """The changes that make another key; the last one of the base stays on the disk."""
    before = fingerprint(key(bench))
    assert fingerprint(key(dataclasses.replace(bench))) == before
    # A base is hashed by its files, so that change comes last.
    ordered = sorted(CHANGES, key=lambda name: name == "base")
    return {name for name in ordered if fingerprint(key(CHANGES[name](bench))) != before}


@pytest.mark.parametrize("name", MAKING)
def test_an_arm_is_made_anew_by_what_it_is_made_of_and_nothing_else(
    bench: Workbench, name: str
) -> None:
    assert changed_by(bench, lambda b: Keys(b).making(Arm.of(name))) == MAKING[name]
    if Arm.of(name).tuned:
        assert Keys(bench).making(Arm.of(name), 1) != Keys(bench).making(Arm.of(name), 2)


@pytest.mark.parametrize("name", MAKING)
def test_answers_are_given_anew_by_what_is_read_when_an_arm_is_built(
    bench: Workbench, name: str
) -> None:
    made = Path("arm-made-of-all-the-rest")
    arm = Arm.of(name)
    expected = {"classical": set(), "remote": ANSWERED - {"max_length"}}.get(name, ANSWERED)
    assert changed_by(bench, lambda b: Keys(b).cost(arm, made)) == expected
    found = changed_by(bench, lambda b: Keys(b).answers(arm, made, b.parts.validation))
    assert found == expected | GRADED | {"kind"}, "the kind decides what auto grades by"
    assert Keys(bench).answers(arm, Path("other"), ()) != Keys(bench).answers(arm, made, ())


def test_a_length_that_is_set_is_found_from_nothing_else(bench: Workbench) -> None:
    bench = of_task(max_new_tokens=6)(bench)
    assert "max_length" not in changed_by(bench, lambda b: Keys(b).making(Arm.of("rag")))


def test_what_a_base_knows_depends_on_no_template(bench: Workbench) -> None:
    arm = Arm.of("lora")
    assert changed_by(bench, lambda b: Keys(b).ability(arm, None)) == {"base"}
    assert changed_by(bench, lambda b: Keys(b).ability(arm, Path("arm-lora"))) == set()


def test_what_a_base_knows_depends_on_the_room_that_all_arms_have(bench: Workbench) -> None:
    bench = of_task(arms=("prompt", "lora", "prompt-tuning"))(bench)
    for directory, more in ((None, {"base"}), (Path("arm-lora"), set())):
        found = changed_by(bench, lambda b, d=directory: Keys(b).ability(Arm.of("lora"), d))
        assert found == {"virtual_tokens"} | more


def test_what_a_base_writes_depends_on_itself_alone(bench: Workbench) -> None:
    assert changed_by(bench, lambda b: Keys(b).rehearsal(Arm.of("lora"))) == {"base"}


def test_what_a_specialist_reads_later_is_written_anew(bench: Workbench, tmp_path: Path) -> None:
    assert changed_by(bench, lambda b: Keys(b).data()) == set(CHANGES) - {"base"}
    moved = dataclasses.replace(bench, base_dir=tmp_path / "elsewhere")
    assert Keys(moved).data() != Keys(bench).data()


def test_arms_without_a_base_need_none(bench: Workbench) -> None:
    shutil.rmtree(bench.base_dir / "base")
    for name in ("classical", "remote"):
        Keys(bench).making(Arm.of(name))
    with pytest.raises(Exception, match="base"):
        Keys(bench).making(Arm.of("prompt"))


def test_a_task_that_was_moved_keeps_its_answers(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    remote = bench.task.remote.model_dump()
    task = write_task(tmp_path / "moved", tmp_path / "base", remote=remote, max_new_tokens=None)
    moved = open_workbench(read_task(task), tmp_path / "moved")
    for name in ("prompt", "lora"):
        arm = Arm.of(name)
        assert Keys(moved).making(arm) == Keys(bench).making(arm)
        answers = [Keys(b).answers(arm, Path("made"), b.parts.test) for b in (moved, bench)]
        assert answers[0] == answers[1]
