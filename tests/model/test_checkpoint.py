"""Whatever happens to the bytes of a checkpoint: what is loaded was saved so, or is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from metier.errors import RunError
from metier.model import checkpoint
from metier.model.checkpoint import Checkpoint

FILES = ("model.safetensors", "best.safetensors", "optimizer.safetensors", "state.json")


def snapshot(step: int) -> Checkpoint:
    moments = {"exp_avg": torch.full((2,), step / 7), "step": torch.tensor(float(step))}
    return Checkpoint(
        tensors={"weight": torch.full((2, 3), float(step)), "bias": torch.tensor([step / 3])},
        optimizers=[{"bias": moments, "weight": {"buffer": torch.ones(1), "count": step}}],
        state={"step": step, "curve": [{"loss": step / 9}], "finished": False},
        best={"weight": torch.full((2, 3), -float(step))},
    )


def content(found: Checkpoint) -> str:
    """All of it as text, exactly."""
    optimizers = [
        {
            name: {key: str(value) for key, value in sorted(state.items())}
            for name, state in sorted(o.items())
        }
        for o in found.optimizers
    ]
    named = [
        {name: t.tolist() for name, t in sorted(part.items())}
        for part in (found.tensors, found.best)
    ]
    return repr((named, optimizers, dict(found.state)))


def loaded(directory: Path) -> tuple[int, tuple[str, ...]]:
    """Step of the checkpoint that is loaded, which must be what was saved, and the problems."""
    found, problems = checkpoint.load_newest(directory)
    assert found
    assert content(found) == content(snapshot(found.state["step"]))
    return found.state["step"], problems


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (4, 6):
        checkpoint.save(tmp_path, snapshot(step), step)
    assert loaded(tmp_path) == (6, ())
    return tmp_path


def damages(path: Path) -> Iterator[bytes]:
    """A bit of each byte flipped, one after the other; then the file cut at every place."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        yield whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
    for place in range(len(whole)):
        yield whole[:place]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_wherever_it_is_damaged(saved: Path, name: str) -> None:
    path = saved / "step-000000006" / name
    count = 0
    for damaged in damages(path):
        path.write_bytes(damaged)
        step, problems = loaded(saved)
        assert step == 4
        assert problems == (f"{path} differs from its recorded SHA-256",)
        count += 1
    assert count > 100
    path.unlink()
    assert loaded(saved) == (4, (f"{path} is missing",))


def test_a_damaged_manifest_is_refused_or_harmless(saved: Path) -> None:
    """Beside the hashes it holds the time, which nothing depends on."""
    path = saved / "step-000000006" / "manifest.json"
    whole = path.read_text()
    hashes = whole[: whole.index("}") + 1]
    harmless = 0
    for damaged in damages(path):
        path.write_bytes(damaged)
        step, problems = loaded(saved)
        if step == 6:
            harmless += 1
            assert damaged.startswith(hashes.encode())
        else:
            assert len(problems) == 1
    assert harmless < len(whole) - len(hashes)


def test_without_the_hashes_damage_is_not_noticed(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of these tests."""
    path = saved / "step-000000006" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x41")
    monkeypatch.setattr(checkpoint.runs, "verify", lambda _: {})
    with pytest.raises(AssertionError):
        loaded(saved)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_without_a_whole_checkpoint_nothing_is_guessed(
    saved: Path, harm: Callable[[Path], None]
) -> None:
    for directory in saved.iterdir():
        harm(directory / "model.safetensors")
    with pytest.raises(RunError, match="none of its 2 checkpoints is whole") as caught:
        checkpoint.load_newest(saved)
    assert str(saved / "step-000000006" / "model.safetensors") in caught.value.cause
    assert "train anew" in caught.value.remedy
    shutil.rmtree(saved)
    assert checkpoint.load_newest(saved) == (None, ())


def test_two_whole_checkpoints_are_kept_also_after_a_damaged_one(saved: Path) -> None:
    def names() -> list[str]:
        return sorted(path.name[-1] for path in saved.iterdir())

    cut(saved / "step-000000006" / "model.safetensors")
    assert loaded(saved)[0] == 4
    checkpoint.save(saved, snapshot(5), 5)
    assert names() == ["4", "5"]
    checkpoint.save(saved, snapshot(6), 6)
    assert names() == ["5", "6"]
    assert loaded(saved) == (6, ())


def test_a_checkpoint_of_another_layout_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "_EDITION", 1)
        checkpoint.save(tmp_path, snapshot(1), 1)
        assert loaded(tmp_path) == (1, ()), "its own version reads it"
    with pytest.raises(RunError, match="another version of metier") as refusal:
        checkpoint.load_newest(tmp_path)
    assert str(tmp_path) in refusal.value.remedy
