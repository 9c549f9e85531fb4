"""Overhead of the plugin's own Python: calls per evaluation of f, time of a tiny solve, lines of code.

    python -m benchmarks.overhead     # ten seconds on one core

The calls are exact and the same on every machine. The times are medians over many passes, in turns with torchdiffeq's
rk4, on one thread.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import statistics
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torchdiffeq
import torchdyn.numerics
from torch import Tensor

import symplectic_plugin
from benchmarks.devices import device_name
from benchmarks.experiments.tables import markdown
from benchmarks.speed.passes import TorchPass, counted
from benchmarks.speed.problems import PROBLEMS, STEPS, TOLERANCE, Problem

PACKAGE = Path(symplectic_plugin.__file__).parent
TINY = Problem(16, 2, 64, 1)
TINY_STEPS = 2
REPETITIONS = 400
LONG = 8.0
"""End of the longer solve, whose additional steps tell the calls of a step from those of a solve."""
WARM_UP = 3
"""Passes before the first one that counts, since imports and caches at first use are no cost of a solve."""
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)


def torchdiffeq_pass(problem: Problem, end: float, method: str, **options: Any) -> TorchPass:
    """Build a pass by `torchdiffeq.odeint` over [0, end]."""
    field, y0 = problem.build(torch.device("cpu"))
    t = torch.tensor([0.0, end], dtype=y0.dtype)

    def solve(y: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, y, t, rtol=TOLERANCE, atol=TOLERANCE, method=method, options=options)[-1]

    return TorchPass(field, y0, solve)


def torchdyn_pass(problem: Problem, end: float, solver: str) -> TorchPass:
    """Build a pass by `torchdyn.numerics.odeint` over [0, end]."""
    field, y0 = problem.build(torch.device("cpu"))
    t = torch.tensor([0.0, end], dtype=y0.dtype)

    def solve(y: Tensor) -> Tensor:
        return torchdyn.numerics.odeint(field, y, t, solver, rtol=TOLERANCE, atol=TOLERANCE)[1][-1]

    return TorchPass(field, y0, solve)


def calls(each: TorchPass) -> tuple[int, int]:
    """Count the calls of functions under PACKAGE in one forward and backward pass, and the evaluations of f."""
    for _ in range(WARM_UP):
        each.run()
    prefix, total = f"{PACKAGE}/", 0

    def profiler(frame: FrameType, event: str, _: object) -> None:
        nonlocal total
        total += event == "call" and frame.f_code.co_filename.startswith(prefix)

    sys.setprofile(profiler)
    try:
        each.run()
    finally:
        sys.setprofile(None)
    with counted(True) as evaluations:  # in another pass, as the hook of the counter makes calls too
        each.run()
        return total, evaluations()


def calls_table() -> str:
    """Tabulate calls of a solve, and calls per evaluation among the evaluations that a longer solve adds."""
    columns = ("solve over [0, 1]", "calls", "evaluations of f", "calls per evaluation", f"of those up to t = {LONG:g}")
    return markdown(columns, [_calls_row(name, build) for name, build in _solves()])


def _calls_row(name: str, build: Callable[[float], TorchPass]) -> tuple[object, ...]:
    (total, evaluations), (long_total, long_evaluations) = calls(build(1.0)), calls(build(LONG))
    added = (long_total - total) / (long_evaluations - evaluations)
    return name, total, evaluations, f"{total / evaluations:.1f}", f"{added:.1f}"


def _solves() -> Iterator[tuple[str, Callable[[float], TorchPass]]]:
    """Generate names of solves, and functions from the end of the time interval to a pass."""
    small, flag = PROBLEMS["small"], "symplectic_adjoint"
    policies: list[dict[str, str]] = [{}, {"checkpoint": "stages"}, {"checkpoint": "steps"}]
    bases: list[tuple[str, str, dict[str, float]]] = [
        ("dopri5", flag, {}), (f"rk4, {STEPS} steps", f"{flag}:rk4", {"step_size": 1 / STEPS}),
    ]  # fmt: skip
    for (name, method, base), own in itertools.product(bases, policies):
        yield (
            ", ".join([f"torchdiffeq {name}", *own.values()]),
            functools.partial(torchdiffeq_pass, small, method=method, **base, **own),
        )
    yield "torchdyn dopri5", functools.partial(torchdyn_pass, small, solver=f"{flag}:dopri5")


def tiny_table() -> str:
    """Tabulate median times of torchdiffeq and the plugin, and medians over pairs of passes of ratio and difference."""
    host, ours = (
        torchdiffeq_pass(TINY, 1.0, method, step_size=1 / TINY_STEPS) for method in ("rk4", "symplectic_adjoint:rk4")
    )
    for each in (host, ours):
        for _ in range(10 * WARM_UP):
            each.run()
    pairs = [(host.run().total, ours.run().total) for _ in range(REPETITIONS)]
    theirs, own = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    difference = 1e3 * statistics.median(b - a for a, b in pairs)
    columns = ("solve", "torchdiffeq", "symplectic_adjoint", "ratio", "difference")
    row = (
        f"rk4, {TINY_STEPS} steps, {TINY}",
        f"{theirs:.2f} ms", f"{own:.2f} ms", f"{ratio:.2f}", f"{difference:.2f} ms",
    )  # fmt: skip
    return markdown(columns, [row])


def code_table() -> str:
    """Tabulate the size of the package, and its function with the most branches."""
    sources = {path: path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    lines = sum(len(code_lines(source)) for source in sources.values())
    branches, name = max(
        (branches, f"{path.relative_to(PACKAGE.parent)}: {function}")
        for path, source in sources.items()
        for function, branches in functions(ast.parse(source))
    )
    columns = ("code lines", "modules", "most branches", "in")
    return markdown(columns, [(lines, len(sources), branches, name)])


def code_lines(source: str) -> set[int]:
    """Collect the numbers of lines with code, that is with a token beside comments and docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, int]]:
    """Generate dotted names of functions, and their numbers of branches with those of the functions inside them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{within}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{within}{node.name}", sum(_branches(each) for each in ast.walk(node))
        else:
            yield from functions(node, within)


def _branches(node: ast.AST) -> int:
    return len(node.values) - 1 if isinstance(node, ast.BoolOp) else int(isinstance(node, BRANCHES))


def main() -> None:
    torch.set_num_threads(1)
    print(device_name(torch.device("cpu")))
    tables: dict[str, Callable[[], str]] = {
        "Calls of the plugin's functions, forward and backward pass": calls_table,
        "Time of a tiny solve, forward and backward pass": tiny_table,
        "Size of the package": code_table,
    }
    for title, table in tables.items():
        print(f"\n{title}\n\n{table()}", flush=True)


if __name__ == "__main__":
    main()
