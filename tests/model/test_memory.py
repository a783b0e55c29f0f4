"""Memory of this process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from metier.model.memory import Thrift, give_back, resident

GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries return memory themselves"
)


def _freed_between_others() -> torch.Tensor:
    """Frees 256 MB of tensors too small to be mapped alone; what is returned stands above them."""
    return [torch.ones(16_000) for _ in range(4_000)][-1]


@GLIBC
def test_freed_memory_goes_back_to_the_system() -> None:
    give_back()
    before = resident()
    last = _freed_between_others()
    assert resident() - before > 200e6, "control: by itself the memory stays"
    give_back()
    assert resident() - before < 50e6
    assert last.sum() == 16_000


@GLIBC
@pytest.mark.parametrize(("slack", "stays"), [(1 << 30, True), (1 << 26, False)])
def test_memory_is_given_back_only_after_growth(slack: int, stays: bool) -> None:
    give_back()
    before, thrift = resident(), Thrift(slack)
    last = _freed_between_others()
    thrift.look()
    assert (resident() - before > 200e6) == stays
    assert last.sum() == 16_000


FAULTS = """
import resource
import torch
from metier.model.memory import keep_freed

if {kept}:
    keep_freed()
torch.ones(16_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*, kept: bool) -> int:
    """Pages that a hundred tensors of 64 MB, one after the other, ask the system for."""
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@GLIBC
def test_pages_of_freed_tensors_are_used_again() -> None:
    assert _faults(kept=True) < _faults(kept=False) / 5
