"""A grader that is a Python function in a file of the user's own.

The file is named in the user's task.yaml and runs in this process, as any module the user writes
would. A path is therefore never taken from data or from a request, and source code inside a spec
(OpenAI's `source`) is never run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from metier.errors import ConfigError
from metier.graders.base import Context, Grader, GraderSpec
from metier.records import Example, Score
from metier.runs import fingerprint

_RESULT = "return a number from 0 to 1, True or False, or a dict with the key 'value'"


class PythonGrader(GraderSpec):
    """Calls ``function(output, example)`` of a Python file.

    `output` is the text to grade. `example` is a dict with the keys id, input, answer (the
    expected output), messages (all of them), group, source and time. The function returns a number
    from 0 to 1, True or False, or a dict: ``value`` (such a number) and, where it likes, ``answer``
    (the part that was graded), ``explanation`` (words) and ``parts`` (further named numbers).

    A grader is one file: it may import what is installed, but no file beside it.
    """

    type: Literal["python"] = "python"
    """Always `python`."""
    name: str = "python"
    """How reports call it."""
    path: str | None = None
    """The Python file, relative to task.yaml."""
    function: Annotated[str, Field(pattern=r"^[^\W\d]\w*$")] = "grade"
    """Name of the function in it."""
    source: str | None = None
    """Source code, as in the OpenAI schema: never run here."""
    image_tag: str | None = None
    """Image to run `source` in, as in the OpenAI schema."""

    def build(self, context: Context) -> Grader:
        """Load the function."""
        if self.path is None or self.source is not None:
            raise ConfigError(
                context.place,
                "a python grader is a function in a file that task.yaml names; code in 'source' is"
                " not run",
                "put the function into a file and give 'path' and 'function' in task.yaml",
            )
        path = context.base_dir / self.path
        function, code = _load(path, self.function, context.place)
        return _Loaded(self, f"{self.path}:{self.function}", function, code)


class _Loaded:
    """A user's function as a grader."""

    binary = False

    def __init__(
        self, spec: PythonGrader, label: str, function: Callable[..., Any], code: bytes
    ) -> None:
        self.name = spec.name
        self.identity = spec.identity | {"sha256": hashlib.sha256(code).hexdigest()}
        self._label = label
        self._function = function

    def grade(self, output: str, example: Example) -> Score:
        """Call the function and check what it returns.

        Raises:
            ConfigError: it raised, or returned no number from 0 to 1; names function and row.

        """
        try:
            result = self._function(output, _as_dict(example))
        except (Exception, SystemExit) as error:
            raise self._error(
                example,
                f"raised {type(error).__name__}: {error}{self._line(error)}",
                "mend the function so that it grades any output, the empty one too",
            ) from error
        return self._score(result, output, example)

    def _score(self, result: Any, output: str, example: Example) -> Score:
        fields = result if isinstance(result, Mapping) else {"value": result}
        unknown = sorted(map(str, set(fields) - {"value", "answer", "explanation", "parts"}))
        if unknown:
            raise self._error(example, f"returned the unknown key '{unknown[0]}'", _RESULT)
        value = self._number(fields.get("value"), example)
        if not 0 <= value <= 1:
            raise self._error(example, f"returned {value!r}, which is not from 0 to 1", _RESULT)
        parts = fields.get("parts", {})
        if not isinstance(parts, Mapping):
            raise self._error(example, "returned 'parts' that are no dict", _RESULT)
        return Score(
            value,
            str(fields.get("answer", output)),
            str(fields.get("explanation", f"{self._label} gave {value:g}")),
            {str(name): self._number(part, example) for name, part in parts.items()},
        )

    def _line(self, error: BaseException) -> str:
        """The line of the user's file in which an exception arose."""
        file = self._function.__code__.co_filename if hasattr(self._function, "__code__") else ""
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        return f" (line {lines[-1]})" if lines else ""

    def _number(self, value: Any, example: Example) -> float:
        try:
            number = float(value) if isinstance(value, Real) else value.item()
        except (AttributeError, TypeError, ValueError):
            raise self._error(example, f"returned {value!r}, which is no number", _RESULT) from None
        if not isinstance(number, Real) or not math.isfinite(number):
            raise self._error(example, f"returned {number!r}, which is no number", _RESULT)
        return float(number)

    def _error(self, example: Example, cause: str, remedy: str) -> ConfigError:
        return ConfigError(f"grader {self._label}, {example.place}", cause, remedy)


def _as_dict(example: Example) -> dict[str, Any]:
    """A copy that the function may change without harm."""
    return {
        "id": example.id,
        "input": example.input,
        "answer": example.answer,
        "messages": [dict(message) for message in example.messages],
        "group": example.group,
        "source": example.source,
        "time": example.time,
    }


def _load(path: Path, function: str, place: str) -> tuple[Callable[..., Any], bytes]:
    """The function and the bytes of its file."""
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{place}: {path}", f"cannot be read ({error.strerror})", "check the path"
        ) from None
    name = f"metier_grader_{fingerprint(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{place}: {path}", "is not a Python file", "give a file named *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up the names in annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        cause = f"cannot be imported: {type(error).__name__}: {error}"
        remedy = "mend the file; it may import what is installed, but no file beside it"
        raise ConfigError(f"{place}: {path}", cause, remedy) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(
            f"{place}: {path}", f"has no function '{function}'", "check the function's name"
        )
    return found, code
