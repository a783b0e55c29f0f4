import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metier import recipes
from metier.errors import ConfigError
from metier.model import device
from metier.model.world import World
from metier.progress import Silent
from metier.recipes import tuning
from metier.recipes.keys import Keys
from metier.recipes.workbench import open_workbench, read_task
from metier.runs import fingerprint
from metier.task import Arm
from metier.training import classify, rehearsal
from tests.recipes.conftest import write_task


@pytest.mark.parametrize(
    ("flags", "dtype"), [((), torch.float32), (("avx512_bf16",), torch.bfloat16)]
)
def test_a_full_model_is_kept_in_what_the_device_computes_in(
    tmp_path: Path,
    stories260k: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(device, "processor_flags", lambda: frozenset(flags))
    training = {"epochs": 1, "seeds": [0], "max_length": 128, "batch_size": 16}
    task = write_task(tmp_path, stories260k, training=training)
    bench, out = open_workbench(read_task(task), tmp_path), tmp_path / "made"
    out.mkdir()
    tuning.tune(bench, Arm.of("full"), 0, None, Silent(), out, tmp_path / "scratch")
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    facts = tuning.read_facts(out)
    assert facts.seconds > 0
    assert facts.skipped == 0
    assert tuning.notes([facts]) == []


def test_every_step_of_a_text_arm_rehearses(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight is that of the task; a head, which says nothing, has nothing to keep."""
    weights: list[float] = []

    def loss(_: object, __: object, ___: int, weight: float) -> Callable[[int], torch.Tensor]:
        return lambda step: weights.append(weight) or torch.zeros(1, requires_grad=True).sum()

    monkeypatch.setattr(rehearsal, "loss", loss)
    training = {"epochs": 1, "seeds": [0], "max_length": 128, "batch_size": 16, "rehearsal": 0.3}
    bench = open_workbench(
        read_task(write_task(tmp_path, stories260k, training=training)), tmp_path
    )
    nothing = torch.zeros(0, dtype=torch.long)
    held = rehearsal.Rehearsal(nothing, (), nothing, nothing)
    for name in ("lora", "full", "lora/head"):
        out = tmp_path / name.replace("/", "-")
        out.mkdir()
        weights.clear()
        tuning.tune(bench, Arm.of(name), 0, held, Silent(), out, out.with_suffix(".scratch"))
        steps = 0 if name == "lora/head" else tuning.read_facts(out).steps
        assert weights == [0.3] * steps


def test_skipped_steps_are_told_of_every_seed(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first gradient of each training is made infinite."""
    clip = World.clip
    norms = iter([math.inf] + [1.0] * 99)
    monkeypatch.setattr(World, "clip", lambda *given: clip(*given) * next(norms))
    training = {"epochs": 1, "seeds": [0], "max_length": 128, "batch_size": 16}
    task = write_task(tmp_path, stories260k, training=training)
    bench, out = open_workbench(read_task(task), tmp_path), tmp_path / "made"
    out.mkdir()
    tuning.tune(bench, Arm.of("lora"), 0, None, Silent(), out, tmp_path / "scratch")
    facts = tuning.read_facts(out)
    assert facts.skipped == 1
    (note,) = tuning.notes([facts, dataclasses.replace(facts, steps=6, skipped=2)])
    assert note.startswith(f"3 of {facts.steps + 6} training steps changed nothing")


def test_rows_left_out_are_told_once() -> None:
    facts = tuning.Facts(0, 9, 9, 1.0, 1.0, 1, (), "", {"training rows": 4})
    assert tuning.notes([facts, facts]) == ["4 training rows were left out as too long"]
    assert tuning.notes([]) == []


def test_skipped_steps_stand_in_the_verdict(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    read = tuning.read_facts
    monkeypatch.setattr(
        tuning, "read_facts", lambda path: dataclasses.replace(read(path), skipped=1)
    )
    verdict = recipes.run(tmp_path / "copy" / "task.yaml", tmp_path / "copy" / "run")
    told = {
        arm.arm: "training steps changed nothing" in " ".join(arm.notes) for arm in verdict.arms
    }
    assert told == {"prompt": False, "classical": False, "lora": True, "lora/head": True}


@pytest.mark.parametrize("shard", [False, True])
def test_torchrun_trains_what_one_process_trains(
    tmp_path: Path, stories260k: Path, shard: bool
) -> None:
    """The same command, started twice; a run finds what the two have made."""
    training = {
        "epochs": 1,
        "seeds": [0],
        "max_length": 128,
        "batch_size": 16,
        "rehearsal": 1,
        "lora": {"rank": 4},
    }
    task = write_task(tmp_path, stories260k, training=training)
    alone = recipes.train(task, "lora", out=tmp_path / "alone")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "metier", "train", str(task), "lora", "--out", str(tmp_path / "both")]
    done = subprocess.run(
        [sys.executable, *launch, *command, "--json", "--set", f"training.shard={shard}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = Path(json.loads(done.stdout)["path"])
    assert together.name == alone.name
    expected, facts = tuning.read_facts(alone), tuning.read_facts(together)
    assert facts.steps == expected.steps > 1
    # Sharded layers are computed by Transformers, which rounds otherwise in bfloat16; in float64
    # they are the same (tests/training/test_gradients.py).
    assert facts.validation_loss == pytest.approx(
        expected.validation_loss, rel=3e-2 if shard else 1e-5
    )
    one, two = (load_file(path / "adapter_model.safetensors") for path in (alone, together))
    assert one.keys() == two.keys()
    assert all(one[name].shape == value.shape for name, value in two.items())


def test_weights_reach_the_loss_of_a_head_alone(
    tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with them the name of its stage; a text arm is as if there were none."""
    seen: list[list[float] | None] = []
    loss = classify.head_loss

    def spy(classifier: Any, weights: torch.Tensor | None = None) -> Any:
        seen.append(None if weights is None else weights.tolist())
        return loss(classifier, weights)

    monkeypatch.setattr(classify, "head_loss", spy)
    training = {"epochs": 1, "seeds": [0], "max_length": 128, "batch_size": 16}
    names: dict[str, list[str]] = {"lora": [], "lora/head": []}
    for number, weights in enumerate([None, "balanced", {"food": 3}]):
        task = write_task(
            tmp_path, stories260k, training={**training, "class_weights": weights}, arms=list(names)
        )
        bench, out = open_workbench(read_task(task), tmp_path), tmp_path / f"made{number}"
        out.mkdir()
        tuning.tune(bench, Arm.of("lora/head"), 0, None, Silent(), out, tmp_path / f"s{number}")
        for name, found in names.items():
            found.append(fingerprint(Keys(bench).making(Arm.of(name))))
    assert seen[0] is None
    assert seen[1] is not None
    assert sum(seen[1]) == pytest.approx(3, abs=0.2)
    assert seen[2] == [1, 3, 1]
    assert [len(set(found)) for found in names.values()] == [1, 3]


@pytest.mark.parametrize(
    ("weights", "arms", "cause"),
    [
        ("balanced", ["prompt", "lora"], "no arm has one"),
        ({"foot": 2}, ["lora/head"], "weighs 'foot', which is none of the 3 labels"),
        ({"food": 0}, ["lora/head"], "'food' has the weight 0: it must be above 0"),
        ("even", ["lora/head"], "'even' says no weights"),
    ],
)
def test_weights_that_count_for_nothing_are_refused(
    tmp_path: Path, stories260k: Path, weights: Any, arms: list[str], cause: str
) -> None:
    task = write_task(tmp_path, stories260k, training={"class_weights": weights}, arms=arms)
    with pytest.raises(ConfigError, match=cause):
        open_workbench(read_task(task), tmp_path)
