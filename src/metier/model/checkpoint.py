"""Training checkpoints: complete or not there, in safetensors, the newest whole one wins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from metier import runs
from metier.errors import RunError

_PREFIX = "step-"
_KEPT = 2
_EDITION = 2  # of the files' layout; one of another edition is refused, not guessed at

States = Mapping[str, Mapping[str, Any]]
"""Of one optimiser: name of a parameter to what is kept of it, tensors and numbers."""


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on exactly.

    Attributes:
        tensors: trained parameters by name.
        optimizers: tensors and numbers of each optimiser, by parameter.
        state: plain values (step, best loss, ...).
        best: the parameters that were best on the validation part, or empty.

    """

    tensors: Mapping[str, Tensor]
    optimizers: Sequence[States]
    state: Mapping[str, Any]
    best: Mapping[str, Tensor]


def save(directory: Path, checkpoint: Checkpoint, step: int) -> Path:
    """Publish a checkpoint as `directory`/step-N; of the others only the one before it stays.

    One of a later step is damaged: training went on from one before it.
    """
    path = directory / f"{_PREFIX}{step:09d}"
    if path.exists():
        shutil.rmtree(path)
    tensors, numbers = _flatten(checkpoint.optimizers)
    with runs.publish(path) as target:
        _write(target / "model.safetensors", checkpoint.tensors)
        _write(target / "best.safetensors", checkpoint.best)
        _write(target / "optimizer.safetensors", tensors)
        state = {"edition": _EDITION, "state": dict(checkpoint.state), "optimizers": numbers}
        (target / "state.json").write_text(json.dumps(state))
    found = _found(directory)
    kept = found[: found.index(path) + 1][-_KEPT:]
    for other in set(found).difference(kept):
        shutil.rmtree(other, ignore_errors=True)
    return path


def load_newest(directory: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Load the newest checkpoint that is whole.

    Returns:
        the checkpoint, or None when there is none, and what was wrong with newer ones.

    Raises:
        RunError: checkpoints are there, but every one is damaged, or the newest whole one was
            written by a metier that lays them out otherwise.

    """
    problems: list[str] = []
    found = _found(directory)
    for path in reversed(found):
        try:
            runs.verify(path)
        except RunError as error:
            problems.append(f"{error.place} {error.cause}")
        else:
            return _read(path), tuple(problems)
    if found:
        raise RunError(
            str(directory),
            f"none of its {len(found)} checkpoints is whole ({problems[0]})",
            "delete the directory to train anew",
        )
    return None, ()


def _found(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*"))


def _read(path: Path) -> Checkpoint:
    saved = json.loads((path / "state.json").read_text())
    if saved.get("edition") != _EDITION:
        raise RunError(
            str(path),
            "was written by another version of metier, whose checkpoints this one cannot read",
            f"go on with that version, or delete {path.parent} to train anew",
        )
    tensors = load_file(path / "optimizer.safetensors")
    return Checkpoint(
        tensors=load_file(path / "model.safetensors"),
        optimizers=_unflatten(tensors, saved["optimizers"]),
        state=saved["state"],
        best=load_file(path / "best.safetensors"),
    )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _flatten(
    optimizers: Sequence[States],
) -> tuple[dict[str, Tensor], list[dict[str, dict[str, Any]]]]:
    """Tensors under ``optimiser/key/parameter``; everything else as JSON beside them."""
    tensors: dict[str, Tensor] = {}
    numbers: list[dict[str, dict[str, Any]]] = []
    for position, states in enumerate(optimizers):
        plain: dict[str, dict[str, Any]] = {}
        for name, state in states.items():
            plain[name] = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{position}/{key}/{name}"] = value.clone()
                else:
                    plain[name][key] = value
        numbers.append(plain)
    return tensors, numbers


def _unflatten(
    tensors: Mapping[str, Tensor], numbers: Sequence[Mapping[str, Mapping[str, Any]]]
) -> list[States]:
    optimizers = [{name: dict(values) for name, values in plain.items()} for plain in numbers]
    for path, tensor in tensors.items():
        position, key, name = path.split("/", 2)
        optimizers[int(position)][name][key] = tensor
    return list(optimizers)
