"""`python -m benchmarks.experiments.tolerance`: loose tolerances and rounding.

First, the same flow on MINIBOONE is trained with every method at tolerances from tight to loose (rtol is 100 atol, as
in FFJORD's defaults): its test loss, and the error of the gradient of a trained flow. Second, the error of the gradient
in float32 and in bfloat16 (parameters, states and arithmetic), against the float64 gradient of the same steps and
parameters, as the number of steps grows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from benchmarks.experiments import tabular_data
from benchmarks.experiments.command import FULL, QUICK, REDUCED, Run, begin
from benchmarks.experiments.ffjord import Flow
from benchmarks.experiments.measure import Iteration, compare, relative_error
from benchmarks.experiments.methods import BACKPROPAGATION, METHODS, Solve, adaptive, fixed
from benchmarks.experiments.tables import error, markdown, milliseconds
from benchmarks.experiments.training import train

DATA = "miniboone"
TIGHT = adaptive("dopri5", 1e-6, 1e-8)
ROUNDING_METHOD = "rk4"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Tolerances; the flow's width and batch; training iterations and their rate; steps of the second part."""

    atols: tuple[float, ...]
    width: int
    batch: int
    iterations: int
    learning_rate: float
    tested: int
    rounds: int
    steps: tuple[int, ...]


SIZES = {
    QUICK: Size((1e-5, 1e-2), 32, 32, 2, 1e-3, 64, 1, (4, 16)),
    REDUCED: Size((1e-8, 1e-5, 1e-3, 1e-2, 1e-1), 64, 64, 60, 1e-2, 1024, 3, (4, 16, 64, 256)),
    FULL: Size(
        (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        860,
        1000,
        10_000,
        1e-3,
        10_000,
        5,
        (4, 16, 64, 256, 1024, 4096),
    ),
}


class Problem:
    """A flow, its data, and the losses that are measured."""

    def __init__(self, run: Run, size: Size) -> None:
        data, self.line = tabular_data.load(DATA, run.arguments.data)
        self.size, self.seed = size, run.seed
        self.examples = torch.from_numpy(data.train).to(run.device)
        self.unseen = torch.from_numpy(data.test[: size.tested]).to(run.device)
        torch.manual_seed(run.seed)
        self.flow = Flow(data.train.shape[1], size.width, layers=2, components=1, activation=softplus).to(run.device)
        self.x = self.examples[: size.batch]
        self.noise = self.flow.draw_noise(self.x)

    def loss(self, flow: Flow, solve: Solve) -> Tensor:
        """On a batch that is always the same."""
        return flow.negative_log_likelihood(self.x, self.noise, solve)

    @torch.no_grad()
    def test_loss(self, flow: Flow, solve: Solve) -> float:
        torch.manual_seed(0)
        return float(flow.negative_log_likelihood(self.unseen, flow.draw_noise(self.unseen), solve))

    def trained(self, solve: Solve, label: str) -> tuple[Flow, list[float], float]:
        def loss(flow: Flow) -> Tensor:
            x = self.examples[torch.randint(len(self.examples), (self.size.batch,)).to(self.x.device)]
            return flow.negative_log_likelihood(x, flow.draw_noise(x), solve)

        return train(
            self.flow, loss, self.size.iterations, label=label, seed=self.seed,
            learning_rate=self.size.learning_rate, one_cycle=True,
        )  # fmt: skip


def tolerances(problem: Problem, reference: Flow) -> list[dict[str, Any]]:
    """Of each tolerance and method: test loss at the tolerance of training and at a tight one, gradient errors."""
    points = []
    for atol in problem.size.atols:
        solver = adaptive("dopri5", 100 * atol, atol)
        measured = compare(reference, problem.loss, solver, rounds=problem.size.rounds)
        for row, figures in measured.items():
            flow, losses, seconds = problem.trained(solver.solve(row), f"atol {atol:.0e}, {row}")
            figures["test_loss"] = problem.test_loss(flow, solver.solve(BACKPROPAGATION))
            figures["test_loss_tight"] = problem.test_loss(flow, TIGHT.solve(BACKPROPAGATION))
            figures["final_training_loss"] = losses[-1]
            figures["seconds_training"] = seconds
        points.append({"atol": atol, "rtol": 100 * atol, "methods": measured})
    return points


def rounding(problem: Problem, reference: Flow) -> list[dict[str, Any]]:
    """Of each precision, number of steps and method: the relative error of the gradient."""
    points = []
    for name, dtype in PRECISIONS.items():
        low = copy.deepcopy(reference).to(dtype)
        given = problem.x.to(dtype), problem.noise.to(dtype)

        def loss(flow: Flow, solve: Solve, given: tuple[Tensor, Tensor] = given) -> Tensor:
            return flow.negative_log_likelihood(*given, solve)

        for steps in tqdm(problem.size.steps, desc=f"rounding, {name}", leave=False):
            solver = fixed(ROUNDING_METHOD, steps)
            exact = Iteration(low, loss, solver.solve(BACKPROPAGATION), torch.float64).gradient()
            errors = {row: relative_error(Iteration(low, loss, solver.solve(row)).gradient(), exact) for row in METHODS}
            points.append({"precision": name, "steps": steps, "gradient_error": errors})
    return points


def table(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    columns = ["atol", "method", "test NLL, nats", "same, tight solver", "gradient error, float64", "float32",
               "time per iteration"]  # fmt: skip
    rows = [
        [
            f"{point['atol']:.0e}", row, f"{one['test_loss']:.3f}", f"{one['test_loss_tight']:.3f}",
            error(one["gradient_error_float64"]), error(one["gradient_error"]), milliseconds(one["seconds"]),
        ]
        for point in first for row, one in point["methods"].items()
    ]  # fmt: skip
    below = [
        [point["precision"], point["steps"], *(f"{value:.1e}" for value in point["gradient_error"].values())]
        for point in second
    ]
    return markdown(columns, rows) + "\n\n" + markdown(["precision", "steps", *METHODS], below)


def draw(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    (loss, double, single), (tight, *rounded) = figure.subplots(2, 3)
    atols = [point["atol"] for point in first]
    for row in METHODS:
        for axis, key in (
            (loss, "test_loss"), (tight, "test_loss_tight"), (double, "gradient_error_float64"),
            (single, "gradient_error"),
        ):  # fmt: skip
            axis.plot(atols, [point["methods"][row][key] for point in first], "o-", label=row)
        for axis, name in zip(rounded, PRECISIONS, strict=True):
            points = [point for point in second if point["precision"] == name]
            axis.loglog(
                [point["steps"] for point in points],
                [point["gradient_error"][row] for point in points],
                "o-",
                label=row,
            )
            axis.set(title=f"gradient error in {name}", xlabel=f"steps of {ROUNDING_METHOD}")
    for axis, title in (
        (loss, "test NLL after training, nats"),
        (tight, "the same with a tight solver"),
        (double, "gradient error, float64"),
        (single, "gradient error, float32, against backpropagation's"),
    ):
        axis.set(title=title, xlabel="atol (rtol = 100 atol)", xscale="log")
    for axis in (double, single):
        axis.set_yscale("log")
    least = min(one["test_loss"] for point in first for one in point["methods"].values())
    for axis in (loss, tight):
        axis.set_ylim(least - 0.01 * abs(least), least + 0.14 * abs(least))  # what lies above has diverged
    loss.legend(fontsize="small")
    return figure


def main() -> None:
    run = begin("tolerance", __doc__, data={"type": Path, "help": "the directory of the MAF repository's data"})
    problem = Problem(run, SIZES[run.size])
    run.show(problem.line)
    reference, *_ = problem.trained(TIGHT.solve(BACKPROPAGATION), "a flow to measure on")
    first, second = tolerances(problem, reference), rounding(problem, reference)
    size = problem.size
    settings = {"width": size.width, "batch": size.batch, "iterations": size.iterations}
    run.draw(draw(first, second))
    run.save({"data": problem.line, **settings, "tolerances": first, "rounding": second}, table(first, second))


if __name__ == "__main__":
    main()
