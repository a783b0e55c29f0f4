from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metier.model import device
from metier.progress import Silent
from metier.recipes import tuning
from metier.recipes.workbench import open_workbench, read_task
from metier.task import Arm
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
    tuning.tune(bench, Arm.of("full"), 0, out, tmp_path / "scratch", Silent())
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert tuning.read_facts(out).seconds > 0
