"""Every error a user can meet, and what each one must say.

::

    MetierError                  exit code 2: the user can mend it
    ├── ConfigError              a task.yaml, a config or an override
    ├── DataError                a row, a file, a split
    ├── ModelError               a base or adapter that cannot be loaded or does not fit
    ├── TrainingError            training refused to start, or stopped to save the run
    │   └── DivergedError        its gradient or its loss was no finite number
    ├── RunError                 a run directory that is damaged, locked or missing
    ├── ExportError              what would be exported is not what was measured
    ├── BudgetError              the work would not fit the budget
    ├── RequestError             a request that a specialist cannot answer as asked
    ├── RemoteError              an endpoint that failed or answered nonsense
    └── MissingExtraError        an optional dependency that is not installed

A message has three parts: the place (file, line, field), the cause, and the remedy.
"""

from __future__ import annotations


class MetierError(Exception):
    """An error the user can mend.

    Args:
        place: where it is: ``file:line``, a field such as ``training.lora.rank``, a URL.
        cause: what is wrong there, with the offending value.
        remedy: what to do about it.

    """

    def __init__(self, place: str, cause: str, remedy: str) -> None:
        super().__init__(place, cause, remedy)
        self.place = place
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}\n  remedy: {self.remedy}"


class ConfigError(MetierError):
    """A task.yaml, a config or an override is wrong."""


class DataError(MetierError):
    """A row, a file or a split is wrong."""


class ModelError(MetierError):
    """A base or adapter cannot be loaded, or does not fit."""


class TrainingError(MetierError):
    """Training refused to start, or stopped to save the run."""


class DivergedError(TrainingError):
    """The gradient of a training, or its loss, was no finite number."""


class RunError(MetierError):
    """A run directory is damaged, locked or missing."""


class ExportError(MetierError):
    """What would be exported is not what was measured."""


class BudgetError(MetierError):
    """The work would not fit the budget."""


class RemoteError(MetierError):
    """An endpoint failed or answered nonsense."""


class RequestError(MetierError):
    """A request that a specialist cannot answer as asked.

    Args:
        place: the parameter of the request, as OpenAI names it.
        cause: what is wrong with it.
        remedy: what to do about it.
        code: OpenAI's short name of the error.

    """

    def __init__(self, place: str, cause: str, remedy: str, code: str) -> None:
        super().__init__(place, cause, remedy)
        self.code = code


class MissingExtraError(MetierError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"extra '{extra}'",
            f"the package '{package}' is not installed",
            f"pip install 'metier[{extra}]'",
        )
