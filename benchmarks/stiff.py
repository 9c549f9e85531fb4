"""Stiff systems: explicit methods against implicit ones, forward. `python -m benchmarks.stiff`.

Robertson's kinetics to t = 1e5, the Van der Pol oscillator over one relaxation of mu up to 1e4, and a linear problem
with rates from 1 to 1e6 (Hairer, Wanner, Solving ODEs II, IV.1 and IV.10). An explicit method that needs more than
`MOST_STEPS` steps is stopped, and the time that it got to is shown.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from symplectic_plugin.hosts.torchdiffeq import implicit

RESULTS = Path(__file__).parent / "results"
METHODS = ("dopri5", "bosh3", "kencarp3", "kencarp5")
MOST_STEPS = 5_000
TOLERANCE = 1e-5
REFERENCE_TOLERANCE = 1e-8


class TooManyStepsError(Exception):
    pass


class Problem(torch.nn.Module):
    """A vector field that counts its evaluations and steps.

    Attributes:
        y0: the initial state.
        end: the time that it is solved to.
        scale: what each component's error is measured in, beside its size.
    """

    y0: Tensor
    end: float
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.reset(math.inf)

    def reset(self, most_steps: float) -> None:
        self.evaluations = self.accepted = self.rejected = 0
        self.reached = 0.0
        self.most_steps = most_steps

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return self.slope(y)

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.accepted += 1
        self.reached = float(t + dt)
        if self.accepted >= self.most_steps:
            raise TooManyStepsError

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.rejected += 1


class Robertson(Problem):
    """Three species whose reactions differ in speed by nine orders of magnitude (Robertson 1966)."""

    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    end = 1e5
    scale = 1e-6

    def slope(self, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        first, second, third = 0.04 * a, 3e7 * b * b, 1e4 * b * c
        return torch.stack([third - first, first - second - third, second], -1)


class VanDerPol(Problem):
    """y'' = mu (1 - y^2) y' - y, in its own time, from the slow branch past its end."""

    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = mu
        self.end = mu

    def slope(self, y: Tensor) -> Tensor:
        a, b = y.unbind(-1)
        return torch.stack([b, self.mu * (1 - a * a) * b - a], -1)


class Linear(Problem):
    """Ten modes whose rates are spread from 1 to 1e6, in mixed coordinates."""

    end = 10.0

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        mixing, _ = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=random))
        self.matrix = -mixing @ torch.diag(torch.logspace(0, 6, 10, dtype=torch.float64)) @ mixing.T
        self.y0 = mixing.sum(1)

    def slope(self, y: Tensor) -> Tensor:
        return y @ self.matrix.T


PROBLEMS = {
    "Robertson": Robertson,
    "Van der Pol, mu = 1e2": lambda: VanDerPol(1e2),
    "Van der Pol, mu = 1e4": lambda: VanDerPol(1e4),
    "linear, rates to 1e6": Linear,
}


def solve(problem: Problem, method: str, tolerance: float, most_steps: float) -> tuple[Tensor | None, float]:
    """The solution at the end, None if there were too many steps, and the seconds it took."""
    problem.reset(most_steps)
    t = torch.tensor([0.0, problem.end], dtype=torch.float64)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            y = torchdiffeq.odeint(
                problem, problem.y0, t, method=method, rtol=tolerance, atol=tolerance * problem.scale
            )
    except TooManyStepsError:
        return None, time.perf_counter() - began
    return y[-1], time.perf_counter() - began


def compare(name: str) -> dict[str, dict[str, Any]]:
    """A row for each method."""
    problem = PROBLEMS[name]()
    exact, _ = solve(problem, "kencarp5", REFERENCE_TOLERANCE, math.inf)
    assert exact is not None
    rows = {}
    for method in METHODS:
        y, seconds = solve(problem, method, TOLERANCE, MOST_STEPS)
        row: dict[str, Any] = {
            "steps": problem.accepted,
            "rejected": problem.rejected,
            "evaluations": problem.evaluations,
            "seconds": seconds,
        }
        if y is None:
            row["stopped_at"] = problem.reached
        else:
            off = (y - exact).abs() / (exact.abs() + problem.scale)
            row["error"] = float(off.max())
        rows[method] = row
        print(name, method, row, flush=True)
    return rows


def table(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The figures as markdown."""
    lines = ["| problem | method | steps | rejected | evaluations | time | error |", "| --- " * 7 + "|"]
    for name, rows in figures.items():
        end = PROBLEMS[name]().end
        for method, row in rows.items():
            if (stopped := row.get("stopped_at")) is not None:
                last = f"stopped at t = {stopped:.2g} of {end:.2g}"
            else:
                last = f"{row['error']:.0e}"
            lines.append(
                f"| {name} | {method} | {row['steps']} | {row['rejected']} | {row['evaluations']} "
                f"| {row['seconds']:.1f} s | {last} |"
            )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    for name, solver in implicit.SOLVERS.items():
        SOLVERS.setdefault(name, solver)
    figures = {name: compare(name) for name in PROBLEMS}
    print(f"\n{table(figures)}\n")
    RESULTS.mkdir(exist_ok=True)
    record = {"torch": torch.__version__, "torchdiffeq": torchdiffeq.__version__, "tolerance": TOLERANCE}
    (RESULTS / "stiff.json").write_text(json.dumps({**record, "problems": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
