from __future__ import annotations

import pytest
import torch

from metier.errors import ModelError
from metier.model import device

CPU = torch.device("cpu")


def test_the_named_device_is_taken_and_a_missing_one_explained() -> None:
    assert device.choose_device("cpu") == CPU
    with pytest.raises(ModelError, match="device 'abacus'"):
        device.choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda'"):
            device.choose_device("cuda")
        assert device.choose_device().type in ("cpu", "mps")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16", "amx_tile"}, torch.bfloat16),
        ({"asimd", "bf16"}, torch.bfloat16),
        ({"avx2", "avx512f"}, torch.float32),
        (set(), torch.float32),
    ],
)
def test_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: torch.dtype
) -> None:
    monkeypatch.setattr(device, "processor_flags", lambda: frozenset(flags))
    assert device.compute_dtype(CPU) == expected


def test_this_processors_flags_are_read() -> None:
    """Oracle: PyTorch's own look at the processor."""
    flags = device.processor_flags()
    if not flags:
        pytest.skip("this system does not tell the processor's flags")
    assert ("avx2" in flags) == torch.cpu._is_avx2_supported()
    assert ("avx512_bf16" in flags) == torch.cpu._is_avx512_bf16_supported()


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert device.set_threads() == torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(device, "_quota", lambda: 1)
        assert device.set_threads() == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
