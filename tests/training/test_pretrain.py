import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from metier.errors import ConfigError, DataError
from metier.evaluation.statistics import ratio
from metier.model.llama import has_compiler
from metier.progress import Silent
from metier.runs import verify
from metier.training import pretrain as module
from metier.training.mixture import Window
from metier.training.pretrain import pretrain, window_loss
from metier.training.pretrain_config import PretrainConfig, Shape
from metier.training.scoring import Scorer

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "two", "birds", "sang")


def recipe(directory: Path, **changes: object) -> Path:
    """A corpus of two sources and one that is only for evaluation, and a tiny recipe."""
    draw = random.Random(0)
    for name in ("first", "second", "other"):
        lines = [
            json.dumps({"text": "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(8))})
            for _ in range(60)
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    values: dict[str, object] = {
        "name": "tiny",
        "sources": [
            {"name": "first", "files": ["first.jsonl"], "held_out": 0.1},
            {"name": "second", "files": ["second.jsonl"], "weight": 2.0, "held_out": 0.1},
            {"name": "other", "files": ["other.jsonl"], "weight": 0},
        ],
        "shape": {
            "vocabulary": 300, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 48,
            "context": 64,
        },
        "tokens": 30 * 256 * 3,
        "step_lengths": [16, 32, 64],
        "micro_tokens": 256,
        "evaluate_every": 10,
        "warmup_steps": 3,
        **changes,
    }  # fmt: skip
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(path: Path, out: Path, progress: Silent | None = None) -> Path:
    return pretrain(
        PretrainConfig.load(path), path.parent, out, ratio,
        device=torch.device("cpu"), progress=progress,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("pretrain")
    return directory, run(recipe(directory), directory / "out")


def test_the_base_learns_and_loads_in_plain_transformers(trained: tuple[Path, Path]) -> None:
    _, base = trained
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < math.log(300) - 1
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    about = json.loads((base / "training.json").read_text())
    assert about["steps"] == 30
    assert about["tokens_seen"] == 30 * 256 * 3
    curve = about["curve"]
    assert set(curve[0]) >= {"first", "second", "other", "step", "validation_loss"}
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"]
    for point in curve:  # 'other' is only watched
        assert point["validation_loss"] == pytest.approx((point["first"] + point["second"]) / 2)
    verify(base)


def test_bits_per_byte_is_what_transformers_computes(trained: tuple[Path, Path]) -> None:
    directory, base = trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    nats, size = 0.0, 0
    for line in (directory / "other.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids[:, :64]).logits[0].float(), -1)
        targets = ids[0, 1:65]
        nats -= logs[: len(targets)].gather(1, targets[:, None]).sum().item()
        size += len(tokenizer.decode(targets).encode())
    curve = json.loads((base / "training.json").read_text())["curve"]
    # Windows there cross documents; the texts are alike, so the figures must nearly agree.
    assert nats / math.log(2) / size == pytest.approx(curve[-1]["other"], rel=0.08)


class Interrupted(Silent):
    """Ends the program at a stage, at a line that is told, or after so many steps of a stage."""

    def __init__(self, at: str, end: Callable[[], None]) -> None:
        self.at, self.end, self.steps = at, end, 0

    def stage(self, name: str, total: float | None = None) -> None:
        self.steps = 0
        if self.at in name:
            self.end()

    def advance(self, n: float = 1, **info: object) -> None:
        self.steps += n
        if self.at == str(self.steps):
            self.end()

    def say(self, text: str) -> None:
        if self.at in text and not self.at.isdigit():
            self.end()


KILLED = """
import os
from tests.training.test_pretrain import *
torch.set_num_threads(1)
end = lambda: os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[1])
run(path, path.parent / "out", Interrupted(sys.argv[2], end))
"""


def test_a_run_killed_in_every_stage_ends_with_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    _, expected = trained
    path = recipe(tmp_path, checkpoint_seconds=0.001)
    for at, left in (
        ("train tokenizer", set()),
        ("tokenise second", {"tokenizer", "held", "tokens"}),
        ("17", {"tokenizer", "tokens", "held", "training"}),
    ):
        done = subprocess.run([sys.executable, "-c", KILLED, str(path), at], check=False)
        assert done.returncode == -signal.SIGKILL
        found = {name.name.split("-")[0] for name in (tmp_path / "out").glob("[!.]*")}
        assert found == left
    assert list((tmp_path / "out").glob("training-*/checkpoints/step-*16"))
    continued = run(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".partial-*"))
    assert weights(continued) == weights(expected)


def weights(base: Path) -> bytes:
    return (base / "model.safetensors").read_bytes()


def test_an_interrupted_run_ends_with_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM arrive as KeyboardInterrupt."""
    _, expected = trained
    path = recipe(tmp_path, checkpoint_seconds=0.001)

    def end() -> None:
        raise KeyboardInterrupt

    for at in ("train tokenizer", "read first", "3", "bits per byte", "29"):
        with pytest.raises(KeyboardInterrupt):
            run(path, tmp_path / "out", Interrupted(at, end))
        assert not list((tmp_path / "out").glob("model-*"))
    assert weights(run(path, tmp_path / "out")) == weights(expected)


def test_changed_text_makes_new_stages(tmp_path: Path) -> None:
    def stages() -> set[str]:
        return {path.name for path in out.glob("[!.]*-*")}

    path, out = recipe(tmp_path, tokens=768), tmp_path / "out"
    run(path, out)
    first = stages()
    run(path, out)
    (tmp_path / "first.jsonl").touch()
    run(path, out)
    assert stages() == first

    with (tmp_path / "other.jsonl").open("a") as watched:
        watched.write("\n" + json.dumps({"text": "new"}))
    run(path, out)
    new = sorted(name.split("-")[0] for name in stages() - first)
    assert new == ["held", "model", "training"]  # nothing else reads it
    second = stages()

    with (tmp_path / "first.jsonl").open("a") as trained_on:
        trained_on.write("\n" + json.dumps({"text": "the new cat"}))
    run(path, out)
    new = sorted(name.split("-")[0] for name in stages() - second)
    assert new == ["held", "model", "tokenizer", "tokens", "tokens", "training"]


@pytest.mark.parametrize(
    ("at", "left"),
    [
        ("train tokenizer", set()),
        ("read second", {"tokenizer", "held"}),
        ("tokenise second", {"tokenizer", "held", "tokens"}),
    ],
)
def test_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, at: str, left: set[str]
) -> None:
    """Else a stage would be named by a text that it was not made of."""
    path, out = recipe(tmp_path, tokens=768), tmp_path / "out"

    def edit() -> None:
        with (tmp_path / "second.jsonl").open("a") as corpus:
            corpus.write("\n" + json.dumps({"text": "\n".join(["two birds sang"] * 20)}))

    with pytest.raises(DataError, match="was changed while it was read") as caught:
        run(path, out, Interrupted(at, edit))
    assert caught.value.place == str(tmp_path / "second.jsonl")
    assert {name.name.split("-")[0] for name in out.glob("[!.]*")} == left
    assert weights(run(path, out)) == weights(run(path, tmp_path / "clean"))


def test_text_that_changes_after_an_interruption_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path, 6, after=3)
    (begun,) = (tmp_path / "out").glob("training-*")
    with (tmp_path / "first.jsonl").open("a") as corpus:
        corpus.write("\n" + json.dumps({"text": "\n".join(["a new cat sat"] * 20)}))
    path, told = tmp_path / "tiny.yaml", Told()
    found = run(path, tmp_path / "out", told)
    (line,) = [line for line in told.lines if "begins anew" in line]
    assert f"{begun} is of other data, settings or code" in line
    assert weights(found) == weights(run(path, tmp_path / "clean"))
    assert not any("going on after" in line for line in told.lines)


def test_without_a_compiler_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is worth compiling for falls back, and gives what an uncompiled one gives."""
    path = recipe(tmp_path, tokens=3 * 768)
    expected = run(path, tmp_path / "plain")
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(0) or function)
    monkeypatch.setattr(module, "_WORTH_COMPILING", 0)
    if has_compiler():
        run(path, tmp_path / "compiled")
        assert compiled, "the control"
    compiled.clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert weights(run(path, tmp_path / "fallen back")) == weights(expected)
    assert not compiled


def test_without_held_out_text_of_its_own_the_last_parameters_are_kept(tmp_path: Path) -> None:
    sources = [
        {"name": "first", "files": ["first.jsonl"], "held_out": 0},
        {"name": "other", "files": ["other.jsonl"], "weight": 0},
    ]
    base = run(recipe(tmp_path, sources=sources, tokens=2 * 768), tmp_path / "out")
    (point,) = json.loads((base / "training.json").read_text())["curve"]
    assert point["other"] > 0
    assert "validation_loss" not in point


def test_the_default_device_is_the_fastest_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        module, "choose_device", lambda: (asked.append("here"), torch.device("cpu"))[1]
    )
    path = recipe(tmp_path, tokens=768)
    pretrain(PretrainConfig.load(path), tmp_path, tmp_path / "out", ratio)
    assert asked == ["here"]


def test_more_tokens_continue_and_another_recipe_starts_anew(tmp_path: Path) -> None:
    path = recipe(tmp_path, tokens=4 * 768)
    run(path, tmp_path / "out")
    longer = run(recipe(tmp_path, tokens=6 * 768), tmp_path / "out")
    assert json.loads((longer / "training.json").read_text())["steps"] == 6
    assert len(list((tmp_path / "out").glob("training-*"))) == 1
    run(recipe(tmp_path, tokens=4 * 768, seed=1), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("training-*"))) == 2


class Told(Silent):
    """Keeps what a person is told, and may end the program at a step."""

    def __init__(self, until: int = 0) -> None:
        self.lines: list[str] = []
        self.until, self.steps = until, 0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, n: float = 1, **info: object) -> None:
        self.steps += int(n)
        if self.until == self.steps and info:
            raise KeyboardInterrupt


def interrupted(directory: Path, steps: int, after: int) -> None:
    """A run of so many steps whose last checkpoint is after one of them."""
    path = recipe(directory, tokens=steps * 768, checkpoint_seconds=1e-9)
    with pytest.raises(KeyboardInterrupt):
        run(path, directory / "out", Told(until=after + 1))


@pytest.mark.parametrize("steps", [6, 7])
def test_fewer_tokens_than_are_done_are_refused(tmp_path: Path, steps: int) -> None:
    interrupted(tmp_path, 20, after=7)
    path = recipe(tmp_path, tokens=steps * 768)
    with pytest.raises(ConfigError, match=f"tokens.*{7 * 768:,} are done"):
        run(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*"))


def test_a_finished_recipe_returns_its_model_whatever_was_trained_since(tmp_path: Path) -> None:
    short = run(recipe(tmp_path, tokens=4 * 768), tmp_path / "out")
    run(recipe(tmp_path, tokens=6 * 768), tmp_path / "out")
    assert run(recipe(tmp_path, tokens=4 * 768), tmp_path / "out") == short


@pytest.mark.parametrize(
    ("steps", "after", "later", "told"),
    [
        (20, 7, 20, False),
        (20, 7, 30, False),
        (20, 15, 20, False),
        (20, 15, 30, True),
        (20, 10, 12, True),
    ],
)
def test_a_fall_that_begins_elsewhere_is_said(
    tmp_path: Path, steps: int, after: int, later: int, told: bool
) -> None:
    interrupted(tmp_path, steps, after)
    listener = Told()
    run(recipe(tmp_path, tokens=later * 768), tmp_path / "out", listener)
    assert any("its final fall begins elsewhere" in line for line in listener.lines) == told


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"shape": {"hidden": 33, "heads": 2}}, "does not divide"),
        ({"step_lengths": [48]}, "no divisor"),
        ({"step_lengths": [128]}, "above the context"),
        ({"step_lengths": [-16, 64]}, "no divisor"),
        ({"step_lengths": [16, 32]}, "above every step length"),
        ({"shape": {"hidden": 33, "heads": 3, "context": 64}}, "heads of 11 numbers"),
        ({"tokens": 767}, "less than one optimiser step of 768"),
        ({"sources": [{"name": "a", "files": ["first.jsonl"], "weight": 0}]}, "weight above 0"),
        ({"sources": [{"name": "loss", "files": ["first.jsonl"]}]}, "names a figure already"),
    ],
)
def test_impossible_recipes_are_refused(
    tmp_path: Path, changes: dict[str, object], cause: str
) -> None:
    with pytest.raises(ConfigError, match=cause):
        run(recipe(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "held_out", "cause"),
    [
        ("", 0.01, "no text to train on"),
        ('{"text": "all of it"}', 0.999999, "no text to train on"),
        ('{"text": "too little"}', 0.0, "less than a window"),
    ],
)
def test_too_little_text_is_refused_by_the_name_of_its_source(
    tmp_path: Path, text: str, held_out: float, cause: str
) -> None:
    source = {"name": "small", "files": ["small.jsonl"], "held_out": held_out}
    path = recipe(tmp_path, sources=[{"name": "first", "files": ["first.jsonl"]}, source])
    (tmp_path / "small.jsonl").write_text(text)
    with pytest.raises(DataError, match=cause) as caught:
        run(path, tmp_path / "out")
    assert caught.value.place == "source 'small'"


def test_held_out_text_without_a_window_is_said(tmp_path: Path) -> None:
    class Told(Silent):
        def say(self, text: str) -> None:
            told.append(text)

    told: list[str] = []
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    sources = [
        {"name": "first", "files": ["first.jsonl"], "held_out": 0.1},
        {"name": "nothing", "files": ["empty.jsonl"], "weight": 0},
    ]
    run(recipe(tmp_path, sources=sources, tokens=768), tmp_path / "out", Told())
    assert told[0] == "'nothing' has no held-out text for a figure"


def test_the_smallest_vocabulary_is_that_of_the_tokenizer() -> None:
    assert Shape(vocabulary=262).vocabulary == 262
    with pytest.raises(ConfigError, match="vocabulary"):
        Shape.parse({"vocabulary": 261}, "shape")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_window_does_not_see_another(compiled: bool) -> None:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        tie_word_embeddings=True,
    )
    loss = window_loss(Scorer(LlamaForCausalLM(config), compiled=compiled))
    ids = torch.randint(0, 30, (2, 17))
    with torch.no_grad():
        both, alone = loss(Window(ids)), [loss(Window(row[None])) for row in ids]
    assert both.item() == pytest.approx(sum(one.item() for one in alone), rel=1e-5)
