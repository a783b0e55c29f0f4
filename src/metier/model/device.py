"""Device, number format and threads: chosen in one place."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from metier.errors import ModelError

# What /proc/cpuinfo calls native bfloat16 arithmetic on x86 and on ARM.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_device(name: str = "auto") -> torch.device:
    """The fastest device there is, or the named one.

    Raises:
        ModelError: the named device is not there.

    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).splitlines()[0]
        raise ModelError(
            f"device '{name}'", f"cannot be used ({cause})", "use auto, cuda, mps or cpu"
        ) from None
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and not _BF16_FLAGS.isdisjoint(processor_flags())
    return torch.bfloat16 if native else torch.float32


def processor_flags() -> frozenset[str]:
    """Instruction-set flags of the processor; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(flags.split())
    return frozenset()


def set_threads() -> int:
    """Give PyTorch one thread per core this process may use; OMP_NUM_THREADS wins. Returns it."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    count = int(asked) if asked.isdigit() and int(asked) else _usable_cores()
    torch.set_num_threads(count)
    return count


def _usable_cores() -> int:
    """Physical cores within the affinity mask and the container's quota."""
    limits = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if platform.system() == "Linux":
        limits.append(len(os.sched_getaffinity(0)))
        limits.append(_quota())
    return max(1, min(limits))


def _quota() -> int:
    """Whole cores of a cgroup v2 quota; a large number where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return 1 << 16
