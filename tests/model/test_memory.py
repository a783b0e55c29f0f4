"""Memory of this process."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from metier.model.memory import give_back


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return memory")
def test_freed_memory_goes_back_to_the_system() -> None:
    pieces = [torch.ones(16_000) for _ in range(4_000)]  # 256 MB, too small to be mapped alone
    last = pieces[-1]
    full = _resident()
    del pieces
    kept = _resident()
    give_back()
    assert full - _resident() > 200e6
    assert full - kept < 100e6, "control: without it the memory stays"
    assert last.sum() == 16_000
