"""`python -m benchmarks.torchdyn`: torchdyn's sensitivities side by side, as a table for the README.

One training step of a NeuralODE (256 states of size 8, two hidden layers of 256), float32: the gradient against
backpropagation's with the same steps, the peak of tensor memory, and the time.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchdyn
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.ode import SOLVER_DICT

from benchmarks.peak_memory import peak_bytes

RESULTS = Path(__file__).parent / "results"
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint", "symplectic_adjoint", "symplectic_adjoint, steps")
BATCH, SIZE, HIDDEN = 256, 8, 256
TOLERANCE = 1e-3
ROUNDS = 7  # of timing
# By solver: the times it is given. Fixed-step solvers take them for their grid.
PROBLEMS = {"dopri5": torch.linspace(0, 1, 2), "rk4": torch.linspace(0, 1, 101)}


class Step:
    """A training step's forward and backward pass with one sensitivity."""

    def __init__(self, field: nn.Module, x: Tensor, solver: str, sensitivity: str) -> None:
        self.field = copy.deepcopy(field).to(x.dtype)
        self.x = x
        self.t_span = PROBLEMS[solver].to(x.dtype)
        sensitivity, _, checkpoint = sensitivity.partition(", ")
        given = SOLVER_DICT[f"{sensitivity}:{solver}"](checkpoint=checkpoint) if checkpoint else solver
        self.model = NeuralODE(
            self.field, solver=given, sensitivity=sensitivity, atol=TOLERANCE, rtol=TOLERANCE, return_t_eval=False
        )

    def __call__(self) -> Tensor:
        x = self.x.clone().requires_grad_()
        loss = (self.model(x, self.t_span)[-1] ** 2).mean()
        parts = torch.autograd.grad(loss, [x, *self.field.parameters()])
        return torch.cat([part.flatten() for part in parts])

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def reference(step: Step) -> Tensor:
    """Backpropagation's gradient, the first step size a constant as all the others are."""
    module: Any = sys.modules["torchdyn.numerics.odeint"]
    with mock.patch.object(module, "init_step", torch.no_grad()(module.init_step)):
        return step()


def compare(solver: str) -> dict[str, dict[str, Any]]:
    """Every sensitivity's gradient errors, peak memory in bytes and seconds of a step, or what it raises."""
    torch.manual_seed(0)
    field = nn.Sequential(
        nn.Linear(SIZE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, SIZE)
    )
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(3)  # so that more than a step or two is needed
    x = torch.randn(BATCH, SIZE)
    # Each precision has its own reference: step sizes, drawn from small differences, differ a little between the two.
    exact = {each: reference(Step(field, x.to(each), solver, "autograd")) for each in (torch.float64, torch.float32)}
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for sensitivity in SENSITIVITIES:
        try:
            rows[sensitivity] = {
                f"gradient_error_{str(dtype).rpartition('.')[2]}": float(
                    ((Step(field, x.to(dtype), solver, sensitivity)() if sensitivity != "autograd" else gradient)
                     - gradient).norm() / gradient.norm()
                )
                for dtype, gradient in exact.items()
            }  # fmt: skip
        except Exception as error:
            rows[sensitivity] = {"raises": f"{type(error).__name__}: {error}"}
        else:
            steps[sensitivity] = Step(field, x, solver, sensitivity)
    for sensitivity, step in steps.items():
        step()
        rows[sensitivity]["peak_bytes"] = peak_bytes(step)
    # One step of each in turn, so that whatever else the machine does falls on all of them.
    seconds = [{sensitivity: step.seconds() for sensitivity, step in steps.items()} for _ in range(ROUNDS)]
    for sensitivity in steps:
        rows[sensitivity]["seconds"] = statistics.median(times[sensitivity] for times in seconds)
    return rows


def table(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The figures as markdown."""
    lines = [
        "| `solver` | `sensitivity` | gradient error, float64 | float32 | peak memory | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for solver, rows in figures.items():
        for sensitivity, row in rows.items():
            name = f'| {solver} | `"{sensitivity}"` '
            if "raises" in row:
                lines.append(f"{name}| raises {row['raises']} | | | |")
                continue
            errors = [row["gradient_error_float64"], row["gradient_error_float32"]]
            shown = ["reference" if sensitivity == "autograd" else f"{error:.1e}" for error in errors]
            lines.append(
                f"{name}| {shown[0]} | {shown[1]} | {row['peak_bytes'] / 1e6:.1f} MB | {row['seconds'] * 1e3:.0f} ms |"
            )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Setting tolerances has no effect")
    figures = {solver: compare(solver) for solver in PROBLEMS}
    print(f"\n{table(figures)}\n")
    RESULTS.mkdir(exist_ok=True)
    record = {
        "torch": torch.__version__,
        "torchdyn": torchdyn.__version__,
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "size": SIZE,
        "hidden": HIDDEN,
        "tolerance": TOLERANCE,
        "solvers": figures,
    }
    (RESULTS / "torchdyn.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
