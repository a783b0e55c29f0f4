from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
import torch

from metier.errors import ModelError
from metier.model import device
from metier.progress import Silent

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
        assert device.set_up_processor() == torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(device, "_quota", lambda: 1)
        assert device.set_up_processor() == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


class Told(Silent):
    """What a person is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("looks", "threads"),
    [
        ([[0, 0, 0, 0]], 4),
        ([[0, 99, 0, 0], [5, 5, 5, 5]], 4),  # a moment's work
        ([[0, 99, 0, 0], [5, 99, 60, 5]], 2),
        ([[99] * 4, [99] * 4], 1),
        ([[99, 0] * 4, [99, 0] * 4], 2),  # two threads a core, each half taken
        ([[0, 0], [0, 0]], 2),  # fewer are told than this process may use
    ],
)
def test_cores_that_others_keep_busy_are_left_to_them(
    monkeypatch: pytest.MonkeyPatch, looks: list[list[float]], threads: int
) -> None:
    before, told, seen = torch.get_num_threads(), Told(), iter(looks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "_usable_cores", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_count", lambda **_: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda *_, **__: next(seen))
    try:
        assert device.set_up_processor(told) == torch.get_num_threads() == threads
        assert next(seen, None) is None
        assert len(told.lines) == (threads < 4)
        assert device.set_up_processor() == 4, "a server does not look"
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert device.set_up_processor(told) == 3, "who asks for a number gets it"
    finally:
        torch.set_num_threads(before)


def test_kernels_of_many_shapes_do_not_fill_the_memory() -> None:
    """oneDNN reads the bound at its first product, so a process of its own; control: without.

    Half of what a kernel takes stays whatever the bound.
    """
    if device.compute_dtype(CPU) != torch.bfloat16:
        pytest.skip("oneDNN is used in bfloat16 only")
    program = """
import torch
from metier.model.device import set_up_processor
from metier.model.memory import give_back, resident
set_up_processor()
weight = torch.ones(5, 64, 320, dtype=torch.bfloat16)
def grown(lengths):
    before = resident()
    for n in lengths:
        torch.ones(5, n, 64, dtype=torch.bfloat16) @ weight
    give_back()
    return resident() - before
grown(range(64, 1088, 8))
print(grown(range(68, 2100, 8)))
"""
    kept = {}
    for bound in ("", "1024"):
        environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": bound}
        if not bound:
            del environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        kept[bound] = int(done.stdout)
    assert kept[""] < 0.7 * kept["1024"]
