"""The layers hold: imports go down only, lazy ones too, and the code stays small enough to read.

Every rule is tried on a planted breach as well, so that none passes because it looks nowhere.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"

BASE = {"errors", "config", "records", "runs", "task", "progress"}
STACK = ["text", "graders", "data", "retrieval", "model"]
SIBLINGS = {"training", "evaluation", "serving", "platforms"}
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    **{unit: BASE | set(STACK[:height]) for height, unit in enumerate(STACK)},
    **{unit: BASE | set(STACK) for unit in SIBLINGS},
    "recipes": BASE | set(STACK) | SIBLINGS,
    "app": BASE | set(STACK) | SIBLINGS | {"recipes"},
    "__main__": {"app"},
    "": {"recipes"},
}
"""Unit (a package or module directly in metier; '' is metier itself) to what it may import."""

WITHOUT_TORCH = {"text", "graders", "data"}
LONGEST_CHAIN = 12
LONGEST_FILE = 500
LONGEST_FUNCTION = 60


def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted name to syntax tree of every module under root/metier."""
    found = {}
    for file in sorted(root.glob("metier/**/*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not lazy and not (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        ):
            yield child
            yield from at_import(child)


def imported(name: str, nodes: Iterator[ast.AST], is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports in these nodes, each as far as it is written."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            kept = len(parts) - node.level + is_package if node.level else 0
            start = [*parts[:kept], *([node.module] if node.module else [])]
            yield from (".".join([*start, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def edges(root: Path, lazy: bool = True) -> set[tuple[str, str]]:
    """(importing module, imported module or outside name), anywhere or as the module is loaded."""
    trees = modules(root)
    found = set()
    for name, tree in trees.items():
        is_package = (root / Path(*name.split(".")) / "__init__.py").is_file()
        nodes = ast.walk(tree) if lazy else at_import(tree)
        for target in imported(name, nodes, is_package):
            inside = target
            while inside.startswith("metier.") and inside not in trees:
                inside = inside.rpartition(".")[0]  # a name in a module, not a module
            found.add((name, inside))
    return found


def unit(module: str) -> str:
    return ".".join(module.split(".")[1:2])


def wrong_edges(root: Path) -> list[str]:
    return [
        f"{source} imports {target}"
        for source, target in sorted(edges(root))
        if target.split(".")[0] == "metier"
        and unit(source) != unit(target)
        and unit(target) not in MAY_IMPORT.get(unit(source), set())
    ]


def torch_imports(root: Path) -> list[str]:
    return [
        f"{source} imports {target}"
        for source, target in sorted(edges(root))
        if unit(source) in WITHOUT_TORCH and target.split(".")[0] == "torch"
    ]


def longest_chain(root: Path, lazy: bool) -> list[str]:
    """The longest path of imports between modules; a cycle is an error."""
    below: dict[str, set[str]] = {}
    for source, target in edges(root, lazy):
        if source not in ("metier", target) and target.startswith("metier."):
            below.setdefault(source, set()).add(target)
    open_now: list[str] = []

    @cache
    def longest(module: str) -> list[str]:
        if module in open_now:
            cycle = [*open_now[open_now.index(module) :], module]
            raise ValueError(f"import cycle: {' > '.join(cycle)}")
        open_now.append(module)
        paths = [longest(target) for target in sorted(below.get(module, ()))]
        open_now.pop()
        return [module, *max(paths, key=len, default=[])]

    return max((longest(module) for module in sorted(below)), key=len, default=[])


def too_long(root: Path) -> list[str]:
    found = []
    for name, tree in modules(root).items():
        lines = max((node.end_lineno or 0 for node in tree.body), default=0)
        if lines > LONGEST_FILE:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    return found


def test_imports_go_down_only():
    assert wrong_edges(SOURCE) == []


def test_every_unit_has_a_place():
    units = {unit(name) for name in modules(SOURCE)}
    assert units <= set(MAY_IMPORT)
    assert units >= BASE, "the tree was read"


def test_the_lower_layers_do_without_torch():
    assert torch_imports(SOURCE) == []


def test_chains_of_imports_are_short():
    chain = longest_chain(SOURCE, lazy=False)
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)


def test_no_module_imports_itself_by_a_detour():
    assert longest_chain(SOURCE, lazy=True) != []


def test_files_and_functions_are_short():
    assert too_long(SOURCE) == []


# --- controls


@pytest.fixture
def plant(tmp_path):
    """Write modules of a small tree that is clean without them."""

    def write(**files: str) -> Path:
        clean = {"errors": "", "training/sft": "import torch\nfrom metier import errors\n"}
        for name, text in (clean | files).items():
            path = tmp_path / "metier" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        return tmp_path

    return write


def test_a_clean_tree_passes(plant):
    root = plant()
    assert ("metier.training.sft", "metier.errors") in edges(root)
    assert wrong_edges(root) + torch_imports(root) + too_long(root) == []
    assert longest_chain(root, lazy=True) == ["metier.training.sft", "metier.errors"]


@pytest.mark.parametrize(
    "line",
    [
        "import metier.evaluation.runner",
        "from metier.evaluation import runner",
        "from metier.evaluation.runner import something",
        "from metier import evaluation",
        "from ..evaluation import runner",
        "from .. import evaluation",
        "def f():\n    from metier.evaluation import runner",
        "if TYPE_CHECKING:\n    from metier.evaluation import runner",
        "importlib.import_module('metier.evaluation')",
        "__import__('metier.evaluation.runner')",
        "from metier import recipes",
        "from metier.app.cli import main",
        "import metier",
        "from metier.nowhere import x",
    ],
)
def test_a_planted_edge_is_found(plant, line):
    empty = {"evaluation/runner": "", "recipes": "", "app/cli": ""}
    assert wrong_edges(plant(**empty)) == []
    assert len(wrong_edges(plant(**{"training/ppo": line}))) == 1


def test_a_planted_upward_edge_is_found_in_every_unit(plant):
    for low in [*BASE, *STACK, *SIBLINGS, "recipes"]:
        root = plant(**{f"{low}/planted": "from metier.app import cli", "app/cli": ""})
        assert f"metier.{low}.planted imports metier.app.cli" in wrong_edges(root)


@pytest.mark.parametrize("line", ["import torch.nn", "def f():\n    from torch import nn"])
def test_planted_torch_is_found(plant, line):
    assert torch_imports(plant(**{"data/planted": line})) != []


def test_a_long_chain_is_found(plant):
    links = {f"data/m{i}": f"from metier.data import m{i + 1}" for i in range(LONGEST_CHAIN)}
    root = plant(**links, **{f"data/m{LONGEST_CHAIN}": ""})
    assert len(longest_chain(root, lazy=False)) == LONGEST_CHAIN + 1


LAZY = "    from metier.data import b"


@pytest.mark.parametrize(
    ("text", "eager"),
    [
        ("from metier.data import b", True),
        (f"try:\n{LAZY}\nexcept ImportError:\n    pass", True),
        (f"if sys:\n{LAZY}", True),
        (f"class C:\n{LAZY}", True),
        (f"def f():\n{LAZY}", False),
        (f"class C:\n    def f(self):\n    {LAZY}", False),
        (f"if TYPE_CHECKING:\n{LAZY}", False),
    ],
)
def test_a_cycle_is_found_also_where_it_closes_late(plant, text, eager):
    root = plant(**{"data/a": text, "data/b": "from metier.data.a import x"})
    with pytest.raises(ValueError, match="cycle"):
        longest_chain(root, lazy=True)
    assert (("metier.data.a", "metier.data.b") in edges(root, lazy=False)) == eager


def test_planted_length_is_found(plant):
    body = "    x = 1\n"
    assert too_long(plant(runs="def f():\n" + body * (LONGEST_FUNCTION - 1))) == []
    assert too_long(plant(runs="def f():\n" + body * LONGEST_FUNCTION)) != []
    assert too_long(plant(runs="x = 1\n" * LONGEST_FILE)) == []
    assert too_long(plant(runs="x = 1\n" * (LONGEST_FILE + 1))) != []
