"""The modules of the package import each other without a circle.

The check reads the source. Imports inside functions and under `TYPE_CHECKING` count like all
others, so they cannot hide a circle. An import of a parent package that Python adds by itself does
not count.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import peer

PACKAGE = Path(peer.__file__).resolve().parent


def read_modules(package: Path) -> dict[str, Path]:
    """The source file of each module, by the module's full name."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported_names(name: str, path: Path) -> Iterator[str]:
    """Everything that a module imports, as full dotted names."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = [*parents, *([node.module] if node.module else [])]
            yield from (".".join([*source, alias.name]) for alias in node.names)


def import_graph(package: Path) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports."""
    modules = read_modules(package)

    def module_of(name: str) -> str:
        # `from a.b import c` imports the module a.b.c if there is one, and otherwise a.b.
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module_of(imported) for imported in imported_names(name, path)} - {""}
        for name, path in modules.items()
    }


def find_circle(package: Path) -> list[str]:
    """The modules on an import circle, the first one also last; empty if there is no circle."""
    try:
        graphlib.TopologicalSorter(import_graph(package)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_the_package_has_no_import_circle():
    assert import_graph(PACKAGE)["peer.config"] == {"peer._library"}
    assert find_circle(PACKAGE) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import package.part.second",
        "from package.part import second",
        "from package.part.second import value",
        "from . import second",
        "from .second import value",
        "from ..part import second",
        "def function():\n    from package.part import second",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.part import second",
        "from package import value",
    ],
)
def test_a_circle_is_found(statement: str, tmp_path: Path):
    part = tmp_path / "package" / "part"
    part.mkdir(parents=True)
    (part.parent / "__init__.py").write_text("from package.part.second import value\n")
    (part / "__init__.py").touch()
    (part / "first.py").write_text("value = 1\n")
    (part / "second.py").write_text("from package.part.first import value\n")
    assert find_circle(part.parent) == []
    (part / "first.py").write_text(f"{statement}\nvalue = 1\n")
    circle = find_circle(part.parent)
    assert circle[0] == circle[-1]
    assert {"package.part.first", "package.part.second"} <= set(circle)
