"""Run directories: everything metier makes is a file that is either complete or not there.

A *published* directory appears under its name only when whole: it is written beside it under a
temporary name, its files are synced, a manifest with their SHA-256 is written last, and the
directory is renamed. `verify` checks that manifest before anything is read back.

A `Run` is a directory of published *stages*, each named by the hash of what went into it, so a
run that was interrupted goes on where it stopped and a changed input makes a new stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from metier.errors import MetierError, RunError
from metier.progress import Progress

MANIFEST = "manifest.json"
_TEMPORARY = ".partial-"
_KEY = 12


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write one file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with _naming(path):
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let a failure to write name `path`: a full disk is reported without any name."""
    try:
        yield
    except MetierError:  # says already what and where
        raise
    except Exception as error:
        number = _system_error(error)
        name = getattr(error, "filename", None)
        if number and (name is None or _TEMPORARY in str(name)):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _system_error(error: Exception) -> int | None:
    """Number of the system's error behind an exception, if there is one."""
    if isinstance(error, OSError):
        return error.errno
    # Libraries written in Rust raise kinds of their own.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def publish(path: Path, about: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Give a temporary directory to fill; on success it becomes `path`, whole and verified.

    Args:
        path: the final name; must not exist yet.
        about: what to record in the manifest beside the file hashes (inputs, versions).

    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _naming(path):
            yield temporary
            _seal(temporary, about or {})
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def _seal(directory: Path, about: Mapping[str, Any]) -> None:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    hashes = {}
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        hashes[file.relative_to(directory).as_posix()] = file_hash(file)
    manifest = {"files": hashes, "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    write_atomic(
        directory / MANIFEST, json.dumps(manifest | dict(about), indent=1, ensure_ascii=False)
    )
    for folder in {file.parent for file in files} | {directory}:
        sync_directory(folder)


def verify(path: Path) -> dict[str, Any]:
    """Check a published directory against its manifest and return the manifest.

    Raises:
        RunError: the manifest or a file is missing, or a file has changed.

    """
    remedy = "delete this directory; the run makes it again"
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RunError(str(path), "has no readable manifest", remedy) from None
    for name, expected in files:
        file = path / name
        if not file.is_file():
            raise RunError(str(file), "is missing", remedy)
        if file_hash(file) != expected:
            raise RunError(str(file), "differs from its recorded SHA-256", remedy)
    return manifest


def sync_directory(path: Path) -> None:
    """Make what was written or renamed in a directory outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """A directory of stages that one process at a time may write.

    Use as a context manager: entering takes the lock, leaving gives it back.

    Attributes:
        path: the directory.
        seconds: what making each stage took that was made or found made, by its directory's name.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Run:
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunError(
                str(self.path),
                "is in use by another process",
                "wait for it, or give another --out directory",
            ) from None
        self._sweep()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is None:
            return
        if self._made and os.listdir(self.path) == [".lock"]:  # nothing was made
            (self.path / ".lock").unlink()
            with contextlib.suppress(OSError):  # another command has begun beside it
                for directory in self._made:
                    directory.rmdir()
        os.close(self._lock)
        self._lock = None

    def _sweep(self) -> None:
        """Remove what an interrupted process left half-written."""
        for leftover in self.path.rglob(f"{_TEMPORARY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def stage_path(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Where `stage` puts what it makes; it exists once that is whole."""
        return self.path / f"{name}-{fingerprint(inputs)[:_KEY]}"

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the stage's directory, making it unless it is there, whole, for these inputs.

        What is there and not whole is kept beside it as ``damaged-<its name>``.

        Args:
            name: what the stage is called, for people.
            inputs: everything its result depends on (JSON-like); hashed into its name.
            make: fills the directory it is given.

        """
        path = self.stage_path(name, inputs)
        if path.exists():
            try:
                self.seconds[path.name] = verify(path).get("seconds", 0.0)
            except RunError:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            else:
                return path
        about: dict[str, Any] = {"stage": name, "inputs": dict(inputs)}
        began = time.monotonic()
        with publish(path, about) as directory:
            make(directory)
            about["seconds"] = time.monotonic() - began
        self.seconds[path.name] = about["seconds"]
        return path


def begun(path: Path, progress: Progress) -> Path:
    """A directory of unfinished work, its name ended as that of a stage.

    Where it is not there but others of its name are, the work begins anew, and that is said.
    """
    others = sorted(path.parent.glob(f"{path.name[:-_KEY]}{'?' * _KEY}"))
    if others and not path.exists():
        progress.say(
            f"{path.name} begins anew: {others[-1]} is of other data, settings or code; put those "
            "back to go on with it, or delete it"
        )
    return path


def versions() -> dict[str, str]:
    """Versions and hardware that a result depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("metier", "torch", "transformers", "peft", "tokenizers", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found["processor"] = _processor()
    found["cores"] = str(os.cpu_count())
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
