"""Documented functions, classes and methods of Python's standard library, read from its sources.

Files are parsed with `ast`, never imported, so reading has no effects and needs no optional part.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metier.errors import DataError

# Tests, and what some systems install without: tkinter and what needs it, packaging tools.
_SKIPPED = (
    "test", "tests", "__pycache__", "tkinter", "turtle", "turtledemo", "idlelib", "lib2to3",
    "distutils", "ensurepip", "venv",
)  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Documented:
    """A public function, class or method with its docstring.

    Attributes:
        module: dotted name of the file it stands in, e.g. ``email.message``.
        name: its name inside the module, e.g. ``Message.walk``.
        docstring: the docstring, without indentation.
        node: the syntax tree.

    """

    module: str
    name: str
    docstring: str
    node: Function | ast.ClassDef

    @property
    def top(self) -> str:
        """The top-level class or function it belongs to."""
        return f"{self.module}.{self.name.partition('.')[0]}"


def read_module(module: str, private: bool = False) -> Iterator[Documented]:
    """Everything documented in a module or package, in the order of its files.

    Args:
        module: dotted name; a package includes its submodules, except tests.
        private: whether names that begin with an underscore count too.

    Raises:
        DataError: the interpreter has no source file for it.

    """
    base = _library().joinpath(*module.split("."))
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    for file in files:
        parts = file.relative_to(base).with_suffix("").parts if base.is_dir() else ()
        inner = [part for part in parts if part != "__init__"]
        if any(part in _SKIPPED or (_private(part) and not private) for part in inner):
            continue
        for name, node in _definitions(_parse(file), private):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Documented(".".join([module, *inner]), name, docstring, node)


def modules() -> list[str]:
    """Top-level modules and packages that this interpreter has source for, by name."""
    entries = _library().iterdir()
    names = {
        path.stem for path in entries if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    return sorted(name for name in names if name.isidentifier() and name not in _SKIPPED)


def has_module(module: str) -> bool:
    """Whether this interpreter has source for a module."""
    base = _library().joinpath(*module.split("."))
    return base.is_dir() or base.with_suffix(".py").is_file()


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _private(name: str) -> bool:
    return name.startswith("_")


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError) as error:
        raise DataError(
            str(file),
            f"the standard library's source cannot be read ({error})",
            "use a Python that ships its sources, such as one from python.org or your system",
        ) from None


def _definitions(tree: ast.Module, private: bool) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Top-level functions and classes, each class followed by its methods."""
    for node in tree.body:
        if not isinstance(node, (Function, ast.ClassDef)) or (_private(node.name) and not private):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Function) and (private or not _private(inner.name)):
                    yield f"{node.name}.{inner.name}", inner


_SIGNATURE = re.compile(r"^[\w.]+\([^\n]*\)\s*(->.*|--.*)?$")


_ENDS = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?]$")


def description(docstring: str, words: int) -> str:
    """The prose of a docstring: no signature lines, no doctests, at most so many words.

    Longer prose ends with the last sentence that fits, where one does.
    """
    kept, example = [], False
    for line in docstring.splitlines():
        text = line.strip()
        example = bool(text) and (example or text.startswith(">>>"))
        if not example and not _SIGNATURE.match(text):
            kept.append(text)
    tokens = " ".join(kept).split()
    if len(tokens) <= words:
        return " ".join(tokens)
    ends = [i for i, token in enumerate(tokens[:words], start=1) if _ENDS.search(token)]
    return " ".join(tokens[: ends[-1] if ends else words])


def mask(text: str, names: tuple[str, ...]) -> str:
    """Put a blank for module names, their dotted submodules and plurals, whatever their case."""
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = rf"(?<![A-Za-z0-9])(?:{alternatives})s?(?:\.\w+)*(?![A-Za-z0-9])"
    return re.sub(pattern, "___", text, flags=re.IGNORECASE)


def count_words(text: str) -> int:
    """Words with two letters or more."""
    return sum(bool(re.search(r"[A-Za-z]{2}", word)) for word in text.split())


@dataclass(frozen=True, slots=True)
class Contract:
    """What a function's code says about its use.

    Attributes:
        parameters: names in order, without self and cls.
        defaults: for each parameter that has one, its default as source text.
        returns: ``iterator`` (it yields), ``value``, or ``none``.
        raises: names of the exceptions it raises itself, in the order of the code.

    """

    parameters: tuple[str, ...]
    defaults: dict[str, str]
    returns: str
    raises: tuple[str, ...]


def contract(node: Function) -> Contract:
    """Read a function's contract from its code."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = positional[len(positional) - len(arguments.defaults) :]
    pairs: list[tuple[ast.arg, ast.expr | None]] = [
        *zip(optional, arguments.defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    stars = (arguments.vararg, arguments.kwarg)
    names = [*positional, stars[0], *arguments.kwonlyargs, stars[1]]
    parameters = [name.arg for name in names if name is not None]
    if parameters[:1] in (["self"], ["cls"]):
        parameters = parameters[1:]
    body = list(_own_nodes(node))
    return Contract(
        parameters=tuple(parameters),
        defaults={name.arg: ast.unparse(value) for name, value in pairs if value is not None},
        returns=_returns(body),
        raises=tuple(dict.fromkeys(filter(None, map(_raised, body)))),
    )


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function's body in the order of the code, without functions inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (Function, ast.ClassDef, ast.Lambda)):
            yield child
            yield from _own_nodes(child)


def _returns(body: list[ast.AST]) -> str:
    if any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in body):
        return "iterator"
    values = [node.value for node in body if isinstance(node, ast.Return)]
    given = any(
        v is not None and not (isinstance(v, ast.Constant) and v.value is None) for v in values
    )
    return "value" if given else "none"


def _raised(node: ast.AST) -> str:
    """Name of the exception that a raise statement names; a re-raise or a variable names none."""
    if not isinstance(node, ast.Raise):
        return ""
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    name = raised.id if isinstance(raised, ast.Name) else getattr(raised, "attr", "")
    return name if name[:1].isupper() else ""


def signature(node: Function) -> str:
    """The line a function's definition begins with."""
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{word} {node.name}({ast.unparse(node.args)}):"
