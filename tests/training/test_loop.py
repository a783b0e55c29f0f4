import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metier.errors import TrainingError
from metier.progress import Silent
from metier.runs import file_hash
from metier.training.loop import Loop, Plan, cosine, trapezoid


@dataclass(frozen=True)
class Points:
    x: Tensor
    y: Tensor
    tokens: int = 0

    @property
    def weight(self) -> float:
        return float(len(self.x))


class Stream:
    """Fresh points every step; the same step is cut into `parts` pieces."""

    def __init__(self, parts: int = 1, poison: set[int] | None = None) -> None:
        self.parts, self.poison = parts, poison or set()

    def step(self, index: int) -> list[Points]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        y = x.sum(1, keepdim=True)
        if index in self.poison:
            y = y * math.nan
        pieces = zip(x.chunk(self.parts), y.chunk(self.parts), strict=True)
        return [Points(a, b) for a, b in pieces]


def make(
    stream: Stream,
    *,
    steps: int = 30,
    directory: Path | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    patience: int = 0,
    every: int = 5,
    progress: Silent | None = None,
) -> tuple[nn.Module, Loop[Points]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)).double()
    plan = Plan(
        steps, cosine(steps, 0.1), evaluate_every=every, patience=patience, checkpoint_seconds=0.0
    )

    def loss(batch: Points) -> Tensor:
        return ((model(batch.x) - batch.y) ** 2).sum()

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return model, Loop(
        model, loss, stream, [optimizer], plan, directory=directory, evaluate=evaluate,
        progress=progress,
    )  # fmt: skip


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_loss_falls() -> None:
    model, loop = make(Stream(), steps=200)
    loop.run()
    model.eval()
    batch = Stream().step(9999)[0]
    with torch.no_grad():
        assert float(((model(batch.x) - batch.y) ** 2).mean()) < 1.0


def test_what_is_added_to_a_step_counts_once_however_it_is_cut(tmp_path: Path) -> None:
    """A pull on the weights that is far stronger than the data."""
    for parts in (1, 3):
        directory = tmp_path / str(parts)
        model, loop = make(Stream(parts), steps=60, directory=directory)
        start = float((weights(model) ** 2).sum())
        loop._also = lambda _, m=model: 1e3 * sum((p**2).sum() for p in m.parameters())
        loop.run()
        assert float((weights(model) ** 2).sum()) < start / 4
        first = json.loads((directory / "log.jsonl").read_text().splitlines()[0])
        assert first["added"] == pytest.approx(1e3 * start)
        assert first["loss"] < first["added"] / 10, "is told apart"


def test_gradient_does_not_depend_on_how_a_step_is_cut() -> None:
    def gradient(parts: int) -> Tensor:
        model, loop = make(Stream(parts), steps=1)
        model[1].p = 0.0
        seen: list[Tensor] = []
        first = next(model.parameters())
        first.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loop.run()
        return seen[-1]

    whole = gradient(1)
    assert all((gradient(parts) - whole).abs().max() < 1e-12 for parts in (2, 3, 4))


class Killed(BaseException):
    pass


class DyingStream(Stream):
    def __init__(self, at: int, poison: set[int] | None = None) -> None:
        super().__init__(poison=poison)
        self.at = at

    def step(self, index: int) -> list[Points]:
        if index == self.at:
            raise Killed
        return super().step(index)


@pytest.mark.parametrize("at", [1, 7, 29])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, at: int) -> None:
    figures = {"loss": 1.0}
    whole, loop = make(Stream(), directory=tmp_path / "whole", evaluate=lambda: dict(figures))
    expected = loop.run()

    _, loop = make(DyingStream(at), directory=tmp_path / "cut", evaluate=lambda: dict(figures))
    with pytest.raises(Killed):
        loop.run()
    continued, loop = make(Stream(), directory=tmp_path / "cut", evaluate=lambda: dict(figures))
    found = loop.run()

    assert torch.equal(weights(whole), weights(continued))
    assert found == expected, "but for the seconds"
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 30


@pytest.mark.parametrize("at", [1, 5, 29, 30])
def test_a_paused_run_ends_like_one_that_was_not(tmp_path: Path, at: int) -> None:
    figures = {"loss": 1.0}
    whole, loop = make(Stream(), directory=tmp_path / "whole", evaluate=lambda: dict(figures))
    expected = loop.run()

    _, loop = make(Stream(), directory=tmp_path / "paused", evaluate=lambda: dict(figures))
    state = loop.run(at)
    assert (state.step, state.finished) == (at, at == 30)
    assert loop.figures() == figures
    continued, loop = make(Stream(), directory=tmp_path / "paused", evaluate=lambda: dict(figures))
    assert loop.run() == expected
    assert torch.equal(weights(whole), weights(continued))
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "paused")]
    assert logs[0] == logs[1]


class SlowStream(DyingStream):
    """Every step takes a tenth of a second."""

    def step(self, index: int) -> list[Points]:
        time.sleep(0.1)
        return super().step(index)


def test_seconds_are_those_of_all_starts(tmp_path: Path) -> None:
    _, loop = make(SlowStream(at=4), steps=6, directory=tmp_path)
    with pytest.raises(Killed):
        loop.run()
    _, loop = make(SlowStream(at=99), steps=6, directory=tmp_path)
    state = loop.run()
    assert state.seconds >= 0.6, "two of the six steps belong to the second start"
    _, loop = make(SlowStream(at=0), steps=6, directory=tmp_path)
    assert loop.run().seconds == state.seconds, "nothing was left to do"


def test_a_checkpoint_from_before_seconds_were_kept_is_read(tmp_path: Path) -> None:
    _, loop = make(DyingStream(20), directory=tmp_path)
    with pytest.raises(Killed):
        loop.run()
    for path in (tmp_path / "checkpoints").iterdir():
        saved = json.loads((path / "state.json").read_text())
        del saved["state"]["seconds"]
        (path / "state.json").write_text(json.dumps(saved))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["state.json"] = file_hash(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
    _, loop = make(Stream(), directory=tmp_path)
    assert loop.run().step == 30
    assert loop.state.seconds > 0


class Told(Silent):
    """What a person is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """At any place of any of its files; what follows is as if nothing had been."""
    whole, loop = make(Stream(), directory=tmp_path / "whole")
    loop.run()
    log = (tmp_path / "whole" / "log.jsonl").read_bytes()
    _, loop = make(DyingStream(20), directory=tmp_path / "cut")
    with pytest.raises(Killed):
        loop.run()
    for broken in sorted((tmp_path / "cut" / "checkpoints" / "step-000000020").iterdir()):
        shutil.copytree(tmp_path / "cut", tmp_path / broken.name)
        broken = tmp_path / broken.name / "/".join(broken.parts[-3:])
        content = bytearray(broken.read_bytes())
        content[len(content) // 3] ^= 1
        broken.write_bytes(content)
        told = Told()
        continued, loop = make(Stream(), directory=tmp_path / broken.name, progress=told)
        loop.run()
        assert torch.equal(weights(whole), weights(continued))
        assert (tmp_path / broken.name / "log.jsonl").read_bytes() == log
        assert told.lines[0].startswith("a damaged checkpoint was passed over: ")
        assert str(broken.parent) in told.lines[0]
        assert told.lines[1:] == ["going on after step 19"]


@pytest.mark.parametrize(
    ("harm", "lost"),
    [
        (Path.unlink, 20),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), 1),
        (lambda path: path.write_bytes(b"\xff{]" + path.read_bytes()[3:]), 1),
        (lambda path: path.write_text('7\n"step"\n[]\n{}\n{"step": []}\n'), 20),
    ],
)
def test_a_damaged_log_does_not_stop_a_run(
    tmp_path: Path, harm: Callable[[Path], object], lost: int
) -> None:
    whole, loop = make(Stream(), directory=tmp_path / "whole")
    loop.run()
    _, loop = make(DyingStream(20), directory=tmp_path)
    with pytest.raises(Killed):
        loop.run()
    log = tmp_path / "log.jsonl"
    harm(log)
    told = Told()
    continued, loop = make(Stream(), directory=tmp_path, progress=told)
    loop.run()
    assert torch.equal(weights(whole), weights(continued))
    assert told.lines[0] == f"{log}: of the steps done, {lost} lines are lost"
    lines, expected = (p.read_text().splitlines() for p in (log, tmp_path / "whole" / "log.jsonl"))
    assert len(lines) == 30 - lost
    assert [line for line in expected if line in lines] == lines


def test_one_bad_gradient_is_skipped_and_three_in_a_row_stop_the_run() -> None:
    model, loop = make(Stream(poison={3, 5}))
    assert loop.run().skipped == 2
    assert torch.isfinite(weights(model)).all()
    _, loop = make(Stream(poison={3, 4, 5}))
    with pytest.raises(TrainingError, match="not finite 3 times"):
        loop.run()


def test_bad_gradients_are_counted_over_an_interruption(tmp_path: Path) -> None:
    _, loop = make(DyingStream(5, poison={3, 4}), directory=tmp_path)
    with pytest.raises(Killed):
        loop.run()
    _, loop = make(Stream(poison={5}), directory=tmp_path)
    with pytest.raises(TrainingError, match="not finite 3 times"):
        loop.run()
    assert loop.state.skipped == 3


def test_early_stopping_keeps_the_best_parameters(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.5])
    snapshots: list[Tensor] = []
    model, loop = make(
        Stream(),
        directory=tmp_path,
        patience=2,
        evaluate=lambda: (snapshots.append(weights(model)), {"loss": next(losses)})[1],
    )
    state = loop.run()
    assert (state.step, state.best_step, state.best_loss) == (20, 10, 1.0)
    assert torch.equal(weights(model), snapshots[1])
    assert [point["validation_loss"] for point in state.curve] == [3.0, 1.0, 2.0, 2.0]


def test_the_fewest_mistakes_choose_before_the_lowest_loss(tmp_path: Path) -> None:
    figures = [(3.0, 0.5), (1.0, 0.4), (2.0, 0.3), (1.5, 0.3), (math.nan, 0.0), (1.2, 0.4)]
    told = iter(figures)
    snapshots: list[Tensor] = []

    def evaluate() -> dict[str, float]:
        snapshots.append(weights(model))
        loss, mistakes = next(told)
        return {"loss": loss, "validation_mistakes": mistakes}

    model, loop = make(Stream(), directory=tmp_path, evaluate=evaluate)
    state = loop.run()
    assert (state.best_step, state.best_loss, state.best_mistakes) == (20, 1.5, 0.3)
    assert torch.equal(weights(model), snapshots[3])
    assert [point["validation_mistakes"] for point in state.curve] == [m for _, m in figures]


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    _, loop = make(Stream(), directory=tmp_path, steps=2)
    loop.run()
    wider = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    for model, first in ((nn.Linear(3, 1), "0.bias"), (wider, "0.weight")):
        optimizer = torch.optim.AdamW(model.parameters())
        other: Loop[Points] = Loop(
            model, lambda b: b.x.sum(), Stream(), [optimizer], Plan(2, cosine(2, 0)),
            directory=tmp_path,
        )  # fmt: skip
        with pytest.raises(TrainingError, match=f"other parameters.*{first}"):
            other.run()


def test_schedules() -> None:
    factor = cosine(100, 0.1)
    assert [factor(0), factor(9)] == [0.1, 1.0]
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.5)
    assert factor(99) < 0.001
    level = trapezoid(100, 10, 20)
    assert [level(0), level(9), level(50), level(80)] == [0.1, 1.0, 1.0, 1.0]
    assert level(90) == pytest.approx(0.5)
    assert level(99) == pytest.approx(0.05)


def test_log_lines_are_json(tmp_path: Path) -> None:
    _, loop = make(Stream(), steps=3, directory=tmp_path)
    loop.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines)
