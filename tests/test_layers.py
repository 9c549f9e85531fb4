"""Imports between the modules of symplectic_plugin: the packages are layers, and the modules form no cycle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import symplectic_plugin

ROOT = Path(symplectic_plugin.__file__).parent
LAYERS = ["methods", "field", "record", "adjoint", "hosts"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str, nodes: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    """Generate (module, name) for each name of the package that the nodes import into a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            imported = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["symplectic_plugin", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            imported = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in imported:
            package, _, inner = base.partition(".")
            if package == "symplectic_plugin":
                nested = f"{inner}.{name}".strip(".")
                yield (nested, "") if nested in MODULES else (inner, name)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_layer_and_those_before_and_no_private_names(module: str) -> None:
    package, *inner = module.split(".")
    if not inner:
        assert package in ("__init__", "__main__")
        return
    allowed = [*LAYERS[: LAYERS.index(package)], package] if package in LAYERS else [package]
    for imported, name in imports(module, ast.walk(ast.parse(MODULES[module].read_text()))):
        other, *other_inner = imported.split(".")
        assert other in allowed, f"{module} imports {imported}"
        if package == other == "hosts" and len(inner) > 1:
            assert inner[0] == other_inner[0], f"{module} imports {imported}"
        assert not name.startswith("_") or imported.endswith("_compat"), f"{module} imports {name} from {imported}"


def test_imports_form_no_cycle() -> None:
    graph = {}
    for module, path in MODULES.items():
        imported = {name for name, _ in imports(module, ast.parse(path.read_text()).body)}
        graph[module] = {name if name in MODULES else f"{name}.__init__" for name in imported}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a cycle
