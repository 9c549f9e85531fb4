"""The table of what is exact, what costs extra and what is refused names tests that there are."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
NAME = re.compile(r"`(test_\w+\.py)::([\w:]+)`")


def names_in(file: str) -> set[str]:
    """Names as pytest has them, without parameters."""
    found = set()
    for node in ast.parse((FOLDER / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def rows() -> list[str]:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|") and not line.startswith(("| what |", "| --- |"))]


def test_every_row_names_a_test() -> None:
    assert len(rows()) > 30
    assert [row for row in rows() if not NAME.search(row)] == []


def test_every_test_that_is_named_exists() -> None:
    named = [match.groups() for row in rows() for match in NAME.finditer(row)]
    assert [f"{file}::{name}" for file, name in named if name not in names_in(file)] == []
    assert len(named) == sum(row.count("`test_") for row in rows())  # none is spelled in another way
