"""The benchmark of speed: what its command leaves behind, and that what it compares is what it says."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

from benchmarks import subprocesses  # noqa: E402
from benchmarks.speed import cell  # noqa: E402
from benchmarks.speed.methods import BACKPROPAGATION, ITSELF, METHODS  # noqa: E402
from benchmarks.speed.per_step import POLICIES, cells, per_step  # noqa: E402
from benchmarks.speed.problems import SOLVERS  # noqa: E402
from benchmarks.speed.report import per_step_figure  # noqa: E402


def check(row: dict[str, Any]) -> None:
    for key in (
        "seconds",
        "forward_seconds",
        "bare_seconds",
        "ratio_to_bare",
        "ratio_to_backpropagation",
        "cores_used",
    ):
        assert math.isfinite(row[key]), (row, key)
        assert row[key] > 0, (row, key)
    assert row["seconds"] >= row["forward_seconds"]
    assert row["peak_bytes"] > 0
    assert row["evaluations_forward"] > 0
    assert row["repetitions"] >= 1
    if row["exact"] and row["reference"] != ITSELF:
        assert row["gradient_error"] <= 1e-12, row


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", *map(str, arguments)])
    runpy.run_module("benchmarks.speed", run_name="__main__")


def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ("--quick", "--problems", "tiny", "--solvers", "rk4", "--repetitions", 1, "--output", tmp_path)
    run(monkeypatch, *quick, "--methods", 'torchdiffeq, b;ours, "steps"')

    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["device"]
    assert record["versions"]["torch"] == torch.__version__
    assert [row["method"] for row in record["cells"]] == [BACKPROPAGATION, 'ours, "steps"']
    for row in record["cells"]:
        check(row)
    assert (tmp_path / "speed.md").read_text().count("\n| ours") == 1
    for name in ("times", "memory", "per_step"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # Measured again, a cell takes its own place; what can't be measured says why; the rest stays.
    answers = {'ours, "steps"': {**record["cells"][1], "seconds": 7.0}, "ours, default": {"error": "no such thing"}}
    asked = []

    def measure(module: str, section: str, problem: str, solver: str, method: str, *_: Any, **__: Any) -> Any:
        asked.append(method)
        return answers[method]

    monkeypatch.setattr(subprocesses, "measure", measure)
    run(monkeypatch, *quick, "--methods", 'ours, "steps";ours, default')
    rows = {row["method"]: row for row in json.loads((tmp_path / "speed.json").read_text())["cells"]}
    assert list(rows) == [BACKPROPAGATION, "ours, default", 'ours, "steps"']
    assert rows['ours, "steps"']["seconds"] == 7.0
    assert rows["ours, default"]["skipped"] == "no such thing"
    assert "- ours, default: skipped, no such thing" in (tmp_path / "speed.md").read_text()

    asked.clear()
    run(monkeypatch, *quick, "--resume", "--methods", 'torchdiffeq, b;ours, "steps";ours, default')
    assert asked == ["ours, default"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows(solver: str) -> None:
    """All but the compiled ones, which are slow to compile."""
    rows = {
        name: cell.measure("tiny", solver, name, repetitions=1, seconds=0)
        for name, method in METHODS.items()
        if "jax" not in method.packages and all(map(importlib.util.find_spec, method.packages))
    }
    for row in rows.values():
        check(row)
    forward = rows[BACKPROPAGATION]["evaluations_forward"]
    calls = [rows[name] for name in list(rows)[:3]]  # of the bare calls, kept, again and again for each step
    assert [row["evaluations_forward"] for row in calls] == [forward] * 3
    assert [row["evaluations_backward"] for row in calls[:2]] == [0, forward]
    for key in ("evaluations_forward", "evaluations_backward"):
        assert calls[2][key] == rows['ours, "steps"'][key]
    assert rows['ours, "stages"']["evaluations_backward"] <= forward
    assert rows["ours, unlimited memory_budget"]["evaluations_backward"] == 0
    assert rows["torchdiffeq, odeint_adjoint"]["gradient_error"] > 1e-12


def test_per_step(tmp_path: Path) -> None:
    assert {policy for policy, _, _ in cells()} == set(POLICIES)
    assert set(cells(quick=True)) < set(cells())
    for policy in POLICIES:
        row = per_step(policy, 20, 4, repetitions=1)
        assert row["ratio_to_shortest"] > 0
        assert row["seconds_per_step"] >= row["forward_seconds_per_step"] > 0
        assert row["evaluations_per_step"] == (11 if policy == 'ours, "steps"' else 4)

    for sizes in ([(100, 1), (1000, 1)], [(100, 1), (1000, 10)], []):
        rows = [{**row, "policy": p, "steps": n, "outputs": outputs} for p in POLICIES for n, outputs in sizes]
        per_step_figure({"per_step": rows}).savefig(tmp_path / "figure.png")
