"""`python -m benchmarks.experiments.memory`: peak memory against the number of steps, for every method.

One training iteration of two neural ODEs one after the other, N steps of rk4 in all. Backpropagation's memory grows
with a whole step's graph, checkpoints' with a state, and the continuous adjoint's not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.experiments.command import FULL, QUICK, REDUCED, begin
from benchmarks.experiments.measure import Iteration, VectorField
from benchmarks.experiments.methods import METHODS, PAPERS_MEMORY, Solve, fixed
from benchmarks.experiments.tables import markdown, megabytes

COMPONENTS = 2
METHOD = "rk4"


@dataclass(frozen=True)
class Size:
    """Steps in all; batch, state size and hidden width of the vector field."""

    steps: tuple[int, ...]
    batch: int
    state: int
    hidden: int


SIZES = {
    QUICK: Size((4, 16, 64), 64, 8, 64),
    REDUCED: Size((10, 20, 50, 100, 200, 500, 1000), 128, 16, 128),
    FULL: Size((10, 20, 50, 100, 200, 500, 1000), 4096, 64, 1024),
}


class Field(VectorField):
    def __init__(self, state: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(state, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, state)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cos(t) * self.layers(y)


def table(points: list[dict[str, Any]]) -> str:
    columns = ["method", "the paper's", *(f"{point['steps']} steps" for point in points)]
    rows = [
        [row, PAPERS_MEMORY.get(row, ""), *(megabytes(point["peak_bytes"][row]) for point in points)] for row in METHODS
    ]
    return markdown(columns, rows)


def draw(points: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    steps = [point["steps"] for point in points]
    for row in METHODS:
        axis.loglog(steps, [point["peak_bytes"][row] / 1e6 for point in points], "o-", label=row)
    axis.set(xlabel=f"steps of {METHOD} in all, N", ylabel="peak memory of an iteration, MB")
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)
    return figure


def main() -> None:
    run = begin("memory", __doc__)
    size = SIZES[run.size]
    fields = nn.ModuleList(Field(size.state, size.hidden) for _ in range(COMPONENTS)).to(run.device)
    x = torch.randn(size.batch, size.state, device=run.device)
    times = torch.tensor([0.0, 1.0], device=run.device)

    def loss(fields: nn.ModuleList, solve: Solve) -> Tensor:
        y = x
        for field in fields:
            y = solve(field, y, times)[-1]
        return y.square().mean()

    points = []
    for steps in tqdm(size.steps, desc="steps"):
        solver = fixed(METHOD, steps // COMPONENTS)
        peaks = {row: Iteration(fields, loss, solver.solve(row)).peak_bytes() for row in METHODS}
        points.append({"steps": steps, "peak_bytes": peaks})
    settings = {"components": COMPONENTS, "method": METHOD, "batch": size.batch, "state": size.state}
    run.draw(draw(points))
    run.save({**settings, "hidden": size.hidden, "points": points}, table(points))


if __name__ == "__main__":
    main()
