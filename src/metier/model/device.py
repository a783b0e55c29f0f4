"""Device, number format and the processor's threads: chosen in one place."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from metier.errors import ModelError
from metier.model.memory import keep_freed
from metier.progress import Progress

# What /proc/cpuinfo calls native bfloat16 arithmetic on x86 and on ARM.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# oneDNN keeps about 0.3 MB for each of the last 1,024 shapes besides as much that it never frees;
# one is made anew in a quarter of a millisecond.
_PRIMITIVES = "128"
# Seconds for which the cores are looked at, and the share in percent that makes one busy.
_LOOKS, _BUSY = (0.1, 1.0), 50.0


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


def set_up_processor(progress: Progress | None = None) -> int:
    """Give PyTorch its threads and say what memory it keeps. Returns how many threads.

    There is a thread for every core this process may use; OMP_NUM_THREADS wins. Must be called
    before the first product, as the bound is read then.

    Args:
        progress: given where a piece of work begins that a person waits for: cores that other
            programs keep busy are then left out, which it is told, for threads wait for each
            other many times a step and one without a core of its own makes all of them slow.

    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRIMITIVES)
    keep_freed()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        count = int(asked)
    else:
        usable = count = _usable_cores()
        if progress and (count := min(usable, _free_cores(usable))) < usable:
            progress.say(
                f"other programs keep cores busy: {count} of {usable} threads, which is quicker "
                "than to wait for them (OMP_NUM_THREADS sets another number)"
            )
    torch.set_num_threads(count)
    return count


def _free_cores(wanted: int) -> int:
    """Cores of the machine that other programs leave free now, at least 1.

    Where too few are free it looks for longer. Which of them this process may use is not told.
    """
    free = 0
    for seconds in _LOOKS:
        used = psutil.cpu_percent(seconds, percpu=True)
        cores = min(psutil.cpu_count(logical=False) or len(used), len(used))
        free = sum(share < _BUSY for share in used) * cores // len(used)
        if free >= wanted:
            break
    return max(1, free)


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
