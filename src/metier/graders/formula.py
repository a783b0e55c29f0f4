"""The arithmetic of `calculate_output`: names, numbers, + - * / ^ and a few functions.

The text is parsed to a syntax tree and only the nodes named here are computed; nothing is run as
Python.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

_MAX_LENGTH = 300
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}


class _NotOffered(Exception):  # noqa: N818 - becomes a ValueError
    """A part of the formula that is not computed."""


class Formula:
    """A checked formula over named scores.

    Raises:
        ValueError: it cannot be read, or uses a name or an operation that is not offered.

    """

    def __init__(self, text: str, names: Collection[str]) -> None:
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"is longer than {_MAX_LENGTH} characters")
        if "\0" in text:  # Python before 3.11.4 reads no further
            raise ValueError("cannot be read as arithmetic: it holds a null character")
        try:
            self._tree = ast.parse(text.replace("^", "**").strip(), mode="eval").body
            self._compute(self._tree, dict.fromkeys(names, 0.5))
        except _NotOffered as error:
            raise ValueError(str(error)) from None
        except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError(f"cannot be read as arithmetic: {error}") from None
        except (ArithmeticError, ValueError):
            pass  # it reads well; only these values do not suit it

    def __call__(self, values: Mapping[str, float]) -> float:
        """Value of the formula; NaN where it has none (division by zero and the like)."""
        try:
            return float(self._compute(self._tree, values))
        except (ArithmeticError, ValueError):
            return math.nan

    def _compute(self, node: ast.AST, values: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return float(number)
            case ast.Name(id=name) if name in values:
                return values[name]
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](
                    self._compute(left, values), self._compute(right, values)
                )
            case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self._compute(operand, values))
            case ast.Call(ast.Name(id=name), arguments, []) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*(self._compute(a, values) for a in arguments))
        raise _NotOffered(
            f"'{ast.unparse(node)}' is not offered; there are the names {', '.join(values)},"
            f" numbers, + - * / ^ and {', '.join(_FUNCTIONS)}"
        )
