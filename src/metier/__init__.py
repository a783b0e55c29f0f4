"""metier: turn a general language model into a specialist for one task, and prove that it did.

Each command of the command line is a function of the same name here; `specialist` loads what a run
shipped, for use from Python as `metier chat` uses it. Nothing heavy is imported until one is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metier.recipes import (
        audit,
        demo,
        export,
        init,
        overfit,
        plan,
        predict,
        pretrain,
        run,
        serve,
        specialist,
        train,
    )

__all__ = [
    "audit",
    "demo",
    "export",
    "init",
    "overfit",
    "plan",
    "predict",
    "pretrain",
    "run",
    "serve",
    "specialist",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from metier import recipes

        return getattr(recipes, name)
    raise AttributeError(f"module 'metier' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
