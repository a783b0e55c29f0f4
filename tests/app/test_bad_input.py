"""Bad input through the whole program: one message, exit code 2, and nothing left on the disk."""

from __future__ import annotations

import fcntl
import json
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from metier import recipes
from metier.app.cli import app
from tests.data.test_malformed import CASES as MALFORMED
from tests.recipes.conftest import write_task

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
PRETRAIN: dict[str, Any] = {
    "name": "small",
    "tokens": 20_000,
    "sources": [{"name": "corpus", "files": ["corpus.jsonl"]}],
}
INFINITE = float("inf")
NOWHERE = {"base_url": "nowhere", "model": "m", "api_key_env": "PATH"}
REMOTE = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}


class Bad(NamedTuple):
    """What to change, and what the error must name: a part of its place, a pattern of its cause."""

    change: Any
    place: str
    cause: str
    remedy: str = ""


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content, and every directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"(directory)"
        for path in directory.rglob("*")
    }


@pytest.fixture
def place(tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a good task and a good pretrain.yaml, and the current one."""
    write_task(tmp_path, stories260k, arms=["prompt", "classical"])
    (tmp_path / "pretrain.yaml").write_text(json.dumps(PRETRAIN))
    (tmp_path / "corpus.jsonl").write_text('{"text": "One day."}\n' * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.delenv("METIER_DEBUG", raising=False)
    return tmp_path


def refuse(bad: Bad, *arguments: object) -> None:
    """Call the program in the current directory and check all that bad input must end in."""
    before = tree(Path())
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 2, done.output
    error = json.loads(done.stdout)["error"]
    assert bad.place in error["place"], error
    assert re.search(bad.cause, error["cause"]), error
    assert re.search(bad.remedy or ".", error["remedy"]), error
    assert done.stderr.count("error: ") == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("  remedy: ")
    assert "Traceback" not in done.output
    assert len(error["cause"]) < 500
    assert tree(Path()) == before


def each(table: dict[str, Bad]) -> Any:
    """One test for each entry of a table."""
    return pytest.mark.parametrize("bad", table.values(), ids=table.keys())


# --- data files


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_data_under_a_task(place: Path, stories260k: Path, case: Any) -> None:
    columns = case.columns.model_dump(exclude_none=True)
    data = {"file": case.name, "format": case.format, "columns": columns}
    write_task(place, stories260k, data=data, kind=case.kind, arms=["prompt"])
    (place / case.name).write_bytes(case.content)
    found = f"{case.name}:{case.line}" if case.line else case.name
    for command in ("audit", "run"):
        refuse(Bad(None, found, ""), command, "task.yaml")


@pytest.mark.parametrize(
    "name",
    ["empty", "latin-1", "Excel called csv", "gzip cut short", "broken JSON", "header only",
     "Parquet cut short", "unknown extension", "outputs of two shapes"],
)  # fmt: skip
def test_malformed_data_to_look_at(place: Path, name: str) -> None:
    (place / MALFORMED[name].name).write_bytes(MALFORMED[name].content)
    refuse(Bad(None, MALFORMED[name].name, ""), "init", MALFORMED[name].name, "--out", "new.yaml")


def test_init_writes_over_nothing(place: Path) -> None:
    refuse(Bad(None, "task.yaml", "exists already", "--force"), "init", "rows.jsonl")
    refuse(Bad(None, "none.csv", "", "check the path"), "init", "none.csv", "--out", "new.yaml")
    refuse(
        Bad(None, "rows.jsonl", "exists|ot a directory"),
        "init",
        "rows.jsonl",
        "--out",
        "rows.jsonl/t",
    )


# --- task.yaml as bytes

FILES = {
    "empty": Bad(b"", "task.yaml", "not a mapping"),
    "a list": Bad(b"- name\n", "task.yaml", "not a mapping"),
    "binary": Bad(b"\x7fELF\x02\x01\xff\xfe\x00", "task.yaml", "not UTF-8"),
    "NUL bytes": Bad(b"name: a\0b", "task.yaml", "not valid YAML"),
    "large": Bad(b"#" * 1_000_001, "task.yaml", "bytes long"),
    "tab": Bad(b"name: things\n\tkind: expansion\n", "task.yaml:2", "not valid YAML"),
    "unclosed": Bad(b"name: [things\n", "task.yaml:2", "not valid YAML"),
    "key twice": Bad(b"name: a\nname: b\n", "task.yaml:2", "'name' stands twice"),
    "nested key twice": Bad(b"split:\n  seed: 1\n  seed: 2\n", "task.yaml:3", "'seed' stands"),
    "alias bomb": Bad(BOMB.encode(), "task.yaml:2", "aliases"),
    "deep nesting": Bad(b"name: " + b"[" * 100_000, "task.yaml", "not valid YAML"),
    "python object": Bad(b"name: !!python/object/apply:os.getcwd []", "task.yaml:1", "tag"),
    "key is a number": Bad(b"1: a\n", "task.yaml:1", "is not text"),
    "no such date": Bad(b"name: 2020-13-45\n", "task.yaml", "not valid YAML"),
    "huge number": Bad(b"budget: " + b"9" * 5000, "task.yaml", "not valid YAML"),
    "NUL escape": Bad(b'name: x\ngood: "a\\0b"\n', "task.yaml:2", "NUL|surrogate"),
    "lone surrogate": Bad(b'name: x\ngood: "a\\ud800b"\n', "task.yaml:2", "surrogate"),
}


@each(FILES)
def test_unreadable_task_file(place: Path, bad: Bad) -> None:
    (place / "task.yaml").write_bytes(bad.change)
    refuse(bad, "run", "task.yaml")


def test_task_file_that_is_none(place: Path) -> None:
    for command in (["audit"], ["run"], ["plan"], ["pretrain"]):
        refuse(Bad(None, "no.yaml", "cannot be read", "check the path"), *command, "no.yaml")
        refuse(Bad(None, ".", "cannot be read"), *command, ".")


# --- fields of task.yaml

TEXT = {"kind": "expansion"}
FIELDS = {
    "unknown key": Bad({"lables": []}, "lables", "not a known key", "did you mean 'labels'"),
    "unknown nested key": Bad(
        {"training": {"lora": {"rnk": 8}}}, "training.lora.rnk", "not a known key", "'rank'"
    ),
    "no data": Bad({"data": None}, "task.yaml: data", "valid"),
    "wrong kind": Bad({"kind": "regression"}, "kind", "'classification'"),
    "name with a path": Bad({"name": "../up"}, "name", "pattern"),
    "text for a number": Bad({"training": {"epochs": "many"}}, "training.epochs", "integer"),
    "number for a list": Bad({"arms": 3}, "arms", "tuple"),
    "no seeds": Bad({"training": {"seeds": []}}, "training.seeds", "at least 1"),
    "seeds twice": Bad({"training": {"seeds": [1, 1]}}, "training.seeds", "same seed"),
    "seed too large": Bad({"training": {"seeds": [10**30]}}, "training.seeds", "less than"),
    "margin out of range": Bad({"margin": 1.5}, "margin", "less than 1"),
    "margin is NaN": Bad({"margin": float("nan")}, "margin", "."),
    "budget is NaN": Bad({"budget": float("nan")}, "budget", "."),
    "split leaves nothing": Bad({"split": {"test": 0.6, "validation": 0.5}}, "split", "nothing"),
    "infinite price of time": Bad({"machine_hour": INFINITE}, "machine_hour", "finite"),
    "infinite prices": Bad(
        {"remote": REMOTE | {"input_price": INFINITE}}, "remote.input_price", "finite"
    ),
    "infinite scale": Bad({"training": {"lora": {"alpha": INFINITE}}}, "lora.alpha", "finite"),
    "infinite tolerance": Bad(
        {"forgetting": {"text_tolerance": INFINITE}}, "text_tolerance", "finite"
    ),
    "budget of zero": Bad({"budget": 0}, "budget", "greater than 0"),
    "unknown arm": Bad({"arms": ["lorra"]}, "arms", "'lorra' is no arm"),
    "unknown mode": Bad({"arms": ["lora/heads"]}, "arms", "'heads' is no mode"),
    "arm twice": Bad({"arms": ["lora", "lora"]}, "arms", "stands twice"),
    "arm twice in other words": Bad({"arms": ["lora", "lora/text"]}, "arms", "stands twice"),
    "head without labels": Bad(TEXT | {"arms": ["lora/head"]}, "task.yaml", "classification"),
    "classical without labels": Bad(TEXT | {"arms": ["classical"]}, "task.yaml", "classification"),
    "head of a prompt": Bad({"arms": ["prompt/head"]}, "task.yaml", "can carry a head"),
    "remote without a section": Bad({"arms": ["remote"]}, "task.yaml", "section 'remote'"),
    "remote without a key": Bad(
        {"arms": ["classical", "remote"], "remote": REMOTE}, "NO_SUCH_KEY", "."
    ),
    "remote without an address": Bad(
        {"arms": ["classical", "remote"], "remote": NOWHERE},
        "remote.base_url",
        "not the address",
    ),
    "unknown grader": Bad({"grader": "exakt"}, "grader", "no grader", "did you mean 'exact'"),
    "unknown type of grader": Bad({"grader": {"type": "exact_match"}}, "grader", "no type"),
    "wrong pattern": Bad({"grader": "regex:("}, "grader", "."),
    "grader file missing": Bad({"grader": "python:no.py:grade"}, "no.py", "."),
    "both layouts of data": Bad({"data": {"file": "a", "train": "b"}}, "data", "either"),
    "data file missing": Bad({"data": {"file": "row.jsonl"}}, "row.jsonl", ".", "rows.jsonl"),
    "data file is a directory": Bad({"data": {"file": "."}}, "", "is a directory"),
    "unknown built-in": Bad({"data": {"file": "builtin:stdlb"}}, "builtin", ".", "builtin:stdlib"),
    "test part missing": Bad({"data": {"train": "rows.jsonl", "test": "t.jsonl"}}, "t.jsonl", "."),
    "label not listed": Bad({"labels": ["animal", "food"]}, "rows.jsonl:", "'place'"),
    "label twice": Bad({"labels": ["animal", "food", "place", "food"]}, "labels", "twice"),
    "document missing": Bad(
        {"arms": ["rag"], "data": {"file": "rows.jsonl", "documents": ["no.md"]}}, "no.md", "."
    ),
    "document is a model": Bad(
        {"arms": ["rag"], "data": {"file": "rows.jsonl", "documents": ["bin.md"]}}, "bin.md", "."
    ),
    "general text missing": Bad({"forgetting": {"texts": ["no.txt"]}}, "no.txt", "."),
    "pairs missing": Bad({"forgetting": {"pairs": ["no.jsonl"]}}, "no.jsonl", "."),
    "pairs malformed": Bad({"forgetting": {"pairs": ["rows.jsonl"]}}, "rows.jsonl:1", "."),
    "row longer than allowed": Bad(
        {"arms": ["classical", "lora"], "training": {"max_length": 8}}, "rows.jsonl:", "tokens long"
    ),
    "base without chat template": Bad({"template": "chat"}, "", "template"),
    "budget too small": Bad({"budget": 1e-6}, "budget", "would take"),
}  # fmt: skip


@each(FIELDS)
def test_wrong_field(place: Path, stories260k: Path, bad: Bad) -> None:
    (place / "bin.md").write_bytes(b"\0\xff")
    write_task(place, stories260k, **{"arms": ["prompt", "lora"]} | bad.change)
    refuse(bad, "run", "task.yaml", "--out", "run")


OVERRIDES = {
    "no value": Bad("training.epochs", "override 'training.epochs'", "key=value"),
    "no key": Bad("=3", "override", "key=value"),
    "unknown key": Bad("training.epoch=3", "training.epoch", "not a known", "'epochs'"),
    "field without parts": Bad("name.first=a", "override", "'name' has no fields"),
    "unclosed list": Bad("arms=[lora", "override", "unreadable"),
    "no such date": Bad("name=2020-13-45", "override", "unreadable"),
    "deep nesting": Bad("arms=" + "[" * 10_000, "override", "unreadable"),
    "alias": Bad("name=*a", "override", "aliases"),
    "NUL escape": Bad('data.file="a\\0b"', "override", "NUL"),
    "no base": Bad("base=[]", "base", "."),
    "base twice": Bad("base=[a, a]", "base", "."),
    "wrong type": Bad("margin=[1]", "margin", "number"),
}


@each(OVERRIDES)
def test_wrong_override(place: Path, bad: Bad) -> None:
    refuse(bad, "run", "task.yaml", "--set", bad.change)
    refuse(bad, "audit", "task.yaml", "--set", bad.change)


@pytest.mark.parametrize("arm", ["lorra", "lora', 'prompt", "lora]", 'lora"', "{}", ""])
def test_wrong_arm_to_train(place: Path, arm: str) -> None:
    refuse(Bad(None, "arms", f"'{re.escape(arm)}' is no arm"), "train", "task.yaml", arm)


def test_a_demo_that_cannot_run_leaves_nothing(place: Path) -> None:
    refuse(Bad(None, "training.epoch", "not a known key"), "demo", "--set", "training.epoch=1")
    refuse(Bad(None, "grader", "no grader"), "demo", "--set", "grader=exakt", "--out", "run")
    small = ["--set", "arms=[classical]", "--budget", 1e-9]
    refuse(Bad(None, "budget", "would take"), "demo", *small, "--out", "run")


def test_a_demo_keeps_what_is_not_its_own(place: Path, stories260k: Path) -> None:
    """The user's task stays, and so does a directory that stood before."""
    write_task(place, stories260k)
    refuse(Bad(None, "task.yaml", "is another task"), "demo", "--out", ".")
    (place / "mine").mkdir()
    small = ["--set", "arms=[classical]", "--budget", 1e-9]
    refuse(Bad(None, "budget", "would take"), "demo", *small, "--out", "mine")


# --- bases


def _pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _truncated(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _foreign_code(base: Path) -> None:
    (base / "config.json").write_text('{"auto_map": {"AutoConfig": "code.C"}, "model_type": "c"}')


BASES = {
    "weights missing": Bad(lambda base: (base / "model.safetensors").unlink(), "model.", "missing"),
    "weights pickled": Bad(_pickled, "copy", "pickle", "safetensors"),
    "weights cut short": Bad(_truncated, "model.safetensors", "cut short"),
    "config missing": Bad(lambda base: (base / "config.json").unlink(), "config.json", "missing"),
    "config broken": Bad(lambda base: (base / "config.json").write_text("{"), "config.json", "un"),
    "config wants code": Bad(_foreign_code, "config.json", "no model"),
    "tokenizer missing": Bad(lambda base: (base / "tokenizer.json").unlink(), "copy", "tokenizer"),
}


@each(BASES)
def test_damaged_base(place: Path, stories260k: Path, bad: Bad) -> None:
    shutil.copytree(stories260k, place / "copy")
    bad.change(place / "copy")
    write_task(place, Path("copy"), arms=["prompt"])
    refuse(bad, "run", "task.yaml", "--out", "run")


@pytest.mark.parametrize("name", ["./no/such/dir", "no-such/model", "a b"])
def test_base_that_is_nowhere(place: Path, name: str) -> None:
    refuse(Bad(None, name, "directory"), "run", "task.yaml", "--set", f"base={name}")


# --- pretrain.yaml

SOURCE = {"name": "corpus", "files": ["corpus.jsonl"]}
PRETRAINS = {
    "unknown key": Bad({"shape": {"hiden": 64}}, "shape.hiden", "not a known key", "'hidden'"),
    "no sources": Bad({"sources": []}, "sources", "at least 1"),
    "no tokens": Bad({"tokens": 0}, "tokens", "greater than 0"),
    "heads do not divide": Bad({"shape": {"heads": 7}}, "shape.heads", "divide"),
    "window beyond the context": Bad({"step_lengths": [4096]}, "step_lengths", "4096"),
    "nothing to train on": Bad({"sources": [SOURCE | {"weight": 0}]}, "sources", "weight"),
    "seed too large": Bad({"seed": 10**30}, "seed", "less than"),
    "source twice": Bad({"sources": [SOURCE, SOURCE]}, "sources", "twice"),
    "file missing": Bad({"sources": [SOURCE | {"files": ["no*.txt"]}]}, "'corpus'", "no file"),
    "field missing": Bad({"sources": [SOURCE | {"field": "body"}]}, "corpus.jsonl:1", "'body'"),
    "corpus is no text": Bad({"sources": [SOURCE | {"files": ["a.txt"]}]}, "a.txt:1", "not UTF-8"),
    "two bases": Bad({"base": "starter", "shape": {}}, "shape", "beside the base 'starter'"),
    "adapter of nothing": Bad({"adapter": {}}, "adapter", "without a base"),
    "base nowhere": Bad({"base": "./no/base"}, "./no/base", "no directory"),
    "weight and share": Bad(
        {"sources": [SOURCE | {"weight": 1, "share": 0.1}]}, "sources", "weight or share, not both"
    ),
    "nothing but shares": Bad({"sources": [SOURCE | {"share": 0.1}]}, "sources", "no other"),
    "corpus is no gzip": Bad({"sources": [SOURCE | {"files": ["a.txt.gz"]}]}, "a.txt.gz", "gzip"),
}


@each(PRETRAINS)
def test_wrong_pretraining(place: Path, bad: Bad) -> None:
    (place / "a.txt").write_bytes(b"caf\xe9")
    (place / "a.txt.gz").write_bytes(b"text")
    (place / "pretrain.yaml").write_text(json.dumps(PRETRAIN | bad.change))
    refuse(bad, "pretrain", "pretrain.yaml", "--out", "run")


# --- finished runs


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, stories260k: Path) -> Path:
    """A run of the arms that need no model."""
    directory = tmp_path_factory.mktemp("finished")
    task = write_task(directory, stories260k, arms=["classical"])
    recipes.run(task, directory / "run")
    return directory / "run"


def _file(pattern: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (found,) = run.glob(pattern)
        change(found)

    return damage


def _replaced(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


RUNS = {
    "missing": Bad(shutil.rmtree, "verdict.json", "cannot be read", "to its end"),
    "unfinished": Bad(_file("verdict.json", Path.unlink), "verdict.json", "cannot be read"),
    "verdict cut short": Bad(_file("verdict.json", _replaced("{")), "verdict.json", "."),
    "verdict is a list": Bad(_file("verdict.json", _replaced("[]")), "verdict.json", "."),
    "verdict of another program": Bad(
        _file("verdict.json", _replaced('{"a": 1}')), "verdict.json", "."
    ),
    "arms cut short": Bad(_file("arms.json", _replaced("{")), "arms.json", "cannot be read"),
    "arms are a list": Bad(_file("arms.json", _replaced("[]")), "arms.json", "dictionary"),
    "arms without data": Bad(
        _file("arms.json", _replaced('{"arms": {"classical": {}}}')), "arms.json", "missing"
    ),
    "model missing": Bad(_file("arm-classical-*", shutil.rmtree), "arm-classical", "manifest"),
    "model changed": Bad(
        _file("arm-classical-*/*.safetensors", _replaced("")), "arm-classical", "SHA-256"
    ),
    "data missing": Bad(_file("data-*", shutil.rmtree), "data-", "manifest"),
    "training rows missing": Bad(_file("data-*/train.jsonl", Path.unlink), "train.", "missing"),
}  # fmt: skip


@each(RUNS)
def test_damaged_run(place: Path, finished_run: Path, bad: Bad) -> None:
    shutil.copytree(finished_run, place / "run")
    bad.change(place / "run")
    refuse(bad, "predict", "run", "rows.jsonl")
    refuse(bad, "serve", "run", "--port", "0")


USES = {
    "unknown arm": Bad(["rows.jsonl", "--arm", "lora"], "run", "no arm 'lora'", "classical"),
    "input missing": Bad(["no.jsonl"], "no.jsonl", "."),
    "input broken": Bad(["broken.jsonl"], "broken.jsonl:1", "not valid JSON"),
    "output is a directory": Bad(["rows.jsonl", "--out", "run"], "run", "irectory"),
    "output below a file": Bad(
        ["rows.jsonl", "--out", "rows.jsonl/a"], "rows.jsonl", "ot a directory|exists"
    ),
}


@each(USES)
def test_wrong_prediction(place: Path, finished_run: Path, bad: Bad) -> None:
    shutil.copytree(finished_run, place / "run")
    (place / "broken.jsonl").write_text("{")
    refuse(bad, "predict", "run", *bad.change)


def test_wrong_address_to_serve(place: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run, place / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuse(Bad(None, str(port), "in use"), "serve", "run", "--port", port)
    refuse(Bad(None, "192.0.2.1", "."), "serve", "run", "--port", 0, "--host", "192.0.2.1")
    refuse(Bad(None, "", "key"), "serve", "run", "--port", 0, "--no-key", "--host", "0.0.0.0")


# --- places that cannot be written


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow: what a full disk is like, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(place: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run, place / "run")
    too_large = "File too large"
    with full_disk():
        refuse(Bad(None, "new.yaml", too_large), "init", "rows.jsonl", "--out", "new.yaml")
        refuse(Bad(None, "out.jsonl", too_large), "predict", "run", "rows.jsonl", "--out",
               "out.jsonl")  # fmt: skip
        refuse(Bad(None, "new", too_large), "run", "task.yaml", "--set", "arms=[classical]",
               "--out", "new")  # fmt: skip
        refuse(Bad(None, "new", too_large), "pretrain", "pretrain.yaml", "--out", "new")


def test_run_directory_that_cannot_be_one(place: Path) -> None:
    classical = ["--set", "arms=[classical]"]
    for command in (["run", "task.yaml", *classical], ["pretrain", "pretrain.yaml"]):
        refuse(Bad(None, "rows.jsonl", "exists"), *command, "--out", "rows.jsonl")
        refuse(Bad(None, "rows.jsonl", "ot a directory"), *command, "--out", "rows.jsonl/run")
        refuse(Bad(None, "/proc/none", "."), *command, "--out", "/proc/none")


def test_run_directory_in_use(place: Path) -> None:
    (place / "run").mkdir()
    with (place / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        in_use = Bad(None, "run", "in use by another process", "--out")
        refuse(in_use, "run", "task.yaml", "--set", "arms=[classical]", "--out", "run")
        refuse(in_use, "pretrain", "pretrain.yaml", "--out", "run")


# --- the control: the same files, unharmed


def test_what_is_not_bad_is_not_refused(place: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run, place / "run")
    for good in (
        ["init", "rows.jsonl", "--out", "new.yaml"],
        ["audit", "task.yaml"],
        ["predict", "run", "rows.jsonl"],
    ):
        done = CliRunner().invoke(app, good)
        assert done.exit_code == 0, done.output
    assert len((place / "rows.jsonl.answers.jsonl").read_text().splitlines()) == 90
    with pytest.raises(AssertionError):
        refuse(Bad(None, "", ""), "init", "rows.jsonl", "--out", "other.yaml")


def test_there_is_enough_bad_input() -> None:
    tables = (FILES, FIELDS, OVERRIDES, BASES, PRETRAINS, RUNS, USES)
    assert sum(map(len, tables)) >= 90
