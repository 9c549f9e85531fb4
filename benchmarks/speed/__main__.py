"""Every way to get a gradient through a solve, side by side: time, memory, evaluations and gradient error.

    python -m benchmarks.speed                                      # all of it: about 25 minutes on one core
    python -m benchmarks.speed --quick                              # a check of a minute or two
    python -m benchmarks.speed --problems small --methods ours      # some cells, put in among those measured before
    python -m benchmarks.speed --resume                             # the cells that are not measured yet

Each cell is measured in a process of its own, in turns with bare calls of the vector field and with torchdiffeq's
backpropagation. Packages that are not installed are skipped by name:
`pip install torchdyn TorchDiffEqPack torchode diffrax`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.devices import device_name
from benchmarks.speed import per_step
from benchmarks.speed.methods import BACKPROPAGATION, METHODS
from benchmarks.speed.problems import PROBLEMS, SOLVERS
from benchmarks.speed.report import memory_figure, per_step_figure, tables, times_figure
from benchmarks.subprocesses import ONE_THREAD, measure

RESULTS = Path(__file__).resolve().parents[1] / "results" / "speed"
QUICK_RESULTS = Path("build") / "speed"
QUICK_METHODS = (
    "bare calls, graphs kept (2N)", BACKPROPAGATION, "torchdiffeq, odeint_adjoint", "ours, default", 'ours, "steps"',
)  # fmt: skip
PACKAGES = ("torch", "torchdiffeq", "torchdyn", "TorchDiffEqPack", "torchode", "diffrax", "jax")


def main() -> None:
    given = _arguments()
    path = given.output / "speed.json"
    record = _record(path, given.device)
    methods = [(p, s, m) for p in given.problems for s in given.solvers for m in given.methods]
    steps = per_step.cells(quick=given.quick) if "per-step" in given.sections else []
    if "methods" not in given.sections:
        methods = []
    if given.resume:
        methods = [key for key in methods if not _found(record["cells"], _method_key, key)]
        steps = [key for key in steps if not _found(record["per_step"], _step_key, key)]
    began = time.perf_counter()
    environment = (
        ONE_THREAD | {"JAX_ENABLE_X64": "1"} if given.device == "cpu" else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    )
    with tqdm(total=len(methods) + len(steps), ascii=True, unit="cell", dynamic_ncols=True) as progress:
        for problem, solver, method in methods:
            progress.set_description(f"{problem} {solver} {method}"[:44].ljust(44))
            cell = measure(
                "benchmarks.speed.cell", "methods", problem, solver, method, given.device, given.repetitions,
                given.seconds, environment=environment,
            )  # fmt: skip
            if "error" in cell:
                cell = {"skipped": cell["error"]}
                progress.write(f"{problem}, {solver}, {method}: skipped, {cell['skipped']}")
            _put(record["cells"], _method_key, {"problem": problem, "solver": solver, "method": method, **cell})
            _save(path, record)
            progress.update()
        for policy, count, outputs in steps:
            progress.set_description(f"{count} steps, {outputs} outputs, {policy}"[:44].ljust(44))
            cell = measure(
                "benchmarks.speed.cell", "steps", policy, count, outputs, given.device, given.repetitions,
                environment=environment,
            )  # fmt: skip
            _put(record["per_step"], _step_key, {"policy": policy, "steps": count, "outputs": outputs, **cell})
            _save(path, record)
            progress.update()
    table = tables(record)
    (given.output / "speed.md").write_text(table + "\n")
    for name, draw in (("times", times_figure), ("memory", memory_figure), ("per_step", per_step_figure)):
        draw(record).savefig(given.output / f"{name}.png", dpi=130)
    print(f"{table}\n\n{time.perf_counter() - began:.0f} s; results in {given.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the small problem, some methods, no long solves")
    parser.add_argument("--problems", type=_listed(PROBLEMS), help=f"of {', '.join(PROBLEMS)}; by commas")
    parser.add_argument("--solvers", type=_listed(SOLVERS), default=list(SOLVERS), help=f"of {', '.join(SOLVERS)}")
    parser.add_argument(
        "--methods", type=_matching, help="rows with any of these texts, by semicolons: 'ours;torchdyn, adjoint'"
    )
    parser.add_argument("--sections", type=_listed(("methods", "per-step")), help="of methods, per-step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, help="rounds of a cell (default: 5; 3 if quick)")
    parser.add_argument("--seconds", type=float, default=6.0, help="after which a cell begins no further round")
    parser.add_argument("--output", type=Path, help=f"a directory (default: {RESULTS}; {QUICK_RESULTS} if quick)")
    parser.add_argument("--resume", action="store_true", help="leave out the cells that --output has")
    given = parser.parse_args()
    if given.sections is None:  # where cells are asked for by name, only they are measured
        given.sections = ["methods"] if given.problems or given.methods else ["methods", "per-step"]
    given.problems = given.problems or (["small"] if given.quick else ["small", "medium", "large"])
    given.methods = given.methods or list(QUICK_METHODS if given.quick else METHODS)
    given.repetitions = given.repetitions or (3 if given.quick else 5)
    given.output = given.output or (QUICK_RESULTS if given.quick else RESULTS)
    given.output.mkdir(parents=True, exist_ok=True)
    return given


def _listed(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _matching(text: str) -> list[str]:
    found = [name for name in METHODS if any(part.strip() in name for part in text.split(";"))]
    if not found:
        raise argparse.ArgumentTypeError(f"no row has {text!r}; there are: {'; '.join(METHODS)}")
    return found


def _record(path: Path, device: str) -> dict[str, Any]:
    """Read the record of earlier measurements on this device, to be added to."""
    if device == "cpu":
        torch.set_num_threads(1)
    name = device_name(torch.device(device))
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("device", name) != name:
        raise SystemExit(f"{path} has figures of {before['device']}, not of {name}: give another --output")
    return {
        "device": name,
        "versions": {package: _version(package) for package in PACKAGES},
        "solvers": {
            name: [s.rtol, s.atol, s.options] if name == "dopri5" else s.options for name, s in SOLVERS.items()
        },
        "problems": {name: str(problem) for name, problem in PROBLEMS.items()},
        "cells": before.get("cells", []),
        "per_step": before.get("per_step", []),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _method_key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["problem"], row["solver"], row["method"]


def _step_key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["policy"], row["steps"], row["outputs"]


def _found(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any], wanted: Any) -> bool:
    return any(key(row) == wanted and "skipped" not in row and "error" not in row for row in rows)


def _put(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> None:
    """In the place of the row with the same key, if there is one."""
    rows[:] = [each for each in rows if key(each) != key(row)] + [row]


def _save(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
