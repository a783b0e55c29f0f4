"""Processes that are forked, watched and killed, at a moment or at a system call."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

_TRACE_ME, _SYSCALL, _SET_OPTIONS = 0, 24, 0x4200
# System calls are marked as such, and a process dies with the one that traces it.
_MARKED, _DIES, _STOPPED_BY_CALL = 1, 0x100000, signal.SIGTRAP | 0x80


def start(work: Callable[[], None], told: Path) -> int:
    """Fork a process that does some work; what it tells goes to a file."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with told.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # Not before: a fork makes torch build its pool of threads anew, which only one may do.
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException as error:
        traceback.print_exc()
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Exit status of a process, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_until(process: int, reached: Callable[[], bool]) -> bool:
    """Wait for a moment. False: the process ended before it."""
    while not reached():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0003)
    return True


def _ptrace(request: int, process: int = 0, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, process, None, data):
        raise OSError(ctypes.get_errno(), f"ptrace: {os.strerror(ctypes.get_errno())}")


def may_trace() -> bool:
    """Whether a process may be traced on this machine."""
    with tempfile.NamedTemporaryFile() as told:
        return wait(start(partial(_ptrace, _TRACE_ME), Path(told.name))) == 0


def stop_at(owner: Any, name: str, call: int) -> None:
    """Let this process stop, traced by its parent, at a call of a function and at the next one."""
    function, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*given: Any, **named: Any) -> Any:
        number = next(calls)
        if number == call:
            _ptrace(_TRACE_ME)
        if number in (call, call + 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*given, **named)

    setattr(owner, name, wrapper)


def kill_at_change(process: int, place: Path, change: int) -> bool:
    """Kill a process of `stop_at` after the n-th system call that changed a file.

    Between two changes a kill at any moment leaves the same files. False: there are fewer changes.
    """
    if not os.WIFSTOPPED(os.waitpid(process, 0)[1]):
        return False
    _ptrace(_SET_OPTIONS, process, _MARKED | _DIES)
    before, changed = _look(place), False
    while not changed:
        _ptrace(_SYSCALL, process)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSTOPPED(status):
            return False
        if os.WSTOPSIG(status) != _STOPPED_BY_CALL:
            break
        if (now := _look(place)) != before:
            before, change = now, change - 1
            changed = change == 0
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return changed


def _look(place: Path) -> list[tuple[str, int, int, int]]:
    """Everything below a directory that a system call may change."""
    found = []
    for directory, names, files in os.walk(place):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            about = os.lstat(path)
            found.append((path, about.st_ino, about.st_size, about.st_mtime_ns))
    return found
