"""`python -m benchmarks.experiments.tabular`: FFJORD on MINIBOONE, GAS, POWER, HEPMASS and BSDS300.

Every method trains the same flow on the same batches; then one iteration of each is measured on the flow that
backpropagation trained. With `--full` the flows, batches and tolerances are FFJORD's, whose experiments the paper
repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.experiments import tabular_data
from benchmarks.experiments.command import FULL, QUICK, REDUCED, Run, begin
from benchmarks.experiments.ffjord import Flow
from benchmarks.experiments.measure import compare
from benchmarks.experiments.methods import BACKPROPAGATION, METHODS, PAPERS_COST, Solve, Solver, adaptive
from benchmarks.experiments.tables import error, markdown, megabytes, milliseconds
from benchmarks.experiments.training import train


@dataclass(frozen=True)
class Settings:
    """Settings of a flow, as FFJORD trains it and the paper after it.

    Args:
        layers: number of hidden layers.
        factor: their width by the data's dimension.
        components: number M of stacked components.
        batch: batch size.
        activation: between layers.
    """

    layers: int
    factor: int
    components: int
    batch: int
    activation: Any = torch.tanh


# As in FFJORD's program and those that repeat it: see `paper.SOURCES`.
PAPER = {
    "miniboone": Settings(2, 20, 1, 1000, softplus),
    "gas": Settings(3, 20, 5, 1000),
    "power": Settings(3, 10, 5, 10_000),
    "hepmass": Settings(2, 10, 10, 10_000, softplus),
    "bsds300": Settings(3, 20, 2, 10_000, softplus),
}


@dataclass(frozen=True)
class Size:
    """Size of a run: data sets, the most components, the largest batch and width, and so on."""

    names: tuple[str, ...]
    components: int
    batch: int
    width: int
    iterations: int
    tested: int
    rounds: int
    rtol: float
    atol: float


SIZES = {
    QUICK: Size(("miniboone", "power"), 2, 32, 32, 2, 64, 1, 1e-3, 1e-5),
    REDUCED: Size(tuple(PAPER), 10, 128, 128, 10, 512, 3, 1e-6, 1e-8),
    FULL: Size(tuple(PAPER), 10, 10_000, 10_000, 10_000, 10_000, 5, 1e-6, 1e-8),
}


def experiment(run: Run, name: str, size: Size) -> dict[str, Any]:
    """One data set's settings and every method's figures."""
    table, line = tabular_data.load(name, run.arguments.data)
    run.show(line)
    paper = PAPER[name]
    dimension = table.train.shape[1]
    components = min(paper.components, size.components)
    width, batch = min(paper.factor * dimension, size.width), min(paper.batch, size.batch)
    solver = adaptive("dopri5", size.rtol, size.atol)
    torch.manual_seed(run.seed)
    flow = Flow(dimension, width, paper.layers, components, paper.activation).to(run.device)
    examples = torch.from_numpy(table.train).to(run.device)
    unseen = torch.from_numpy(table.test[: size.tested]).to(run.device)

    def on_batch(solve: Solve) -> Any:
        def loss(model: Flow) -> Tensor:
            x = examples[torch.randint(len(examples), (batch,)).to(run.device)]
            return model.negative_log_likelihood(x, model.draw_noise(x), solve)

        return loss

    trained, curves, figures = {}, {}, {}
    for row in METHODS:
        trained[row], curves[row], seconds = train(
            flow, on_batch(solver.solve(row)), size.iterations, label=f"{name}, {row}", seed=run.seed, weight_decay=1e-6
        )
        figures[row] = {"test_loss": evaluate(trained[row], unseen, solver), "seconds_training": seconds}
    x = examples[:batch]
    noise = flow.draw_noise(x)
    measured = compare(
        trained[BACKPROPAGATION], lambda model, solve: model.negative_log_likelihood(x, noise, solve), solver,
        rounds=size.rounds,
    )  # fmt: skip
    return {
        "data": line,
        "is_standin": table.is_standin,
        "dimension": dimension,
        "components": components,
        "layers": paper.layers,
        "width": width,
        "batch": batch,
        "rtol": size.rtol,
        "atol": size.atol,
        "iterations": size.iterations,
        "methods": {row: {**measured[row], **figures[row]} for row in METHODS},
        "losses": curves,
    }


@torch.no_grad()
def evaluate(flow: Flow, x: Tensor, solver: Solver) -> float:
    """Negative log-likelihood in nats, with the same noise for every method.

    The divergence is estimated as in training, where FFJORD's program computes it exactly for the test.
    """
    torch.manual_seed(0)
    return float(flow.negative_log_likelihood(x, flow.draw_noise(x), solver.solve(BACKPROPAGATION)))


def table(data: dict[str, Any]) -> str:
    columns = ["data", "M", "method", "test NLL, nats", "peak memory", "time per iteration", "gradient error, float64",
               "evaluations", "the paper's cost"]  # fmt: skip
    rows = [
        [
            name.upper() + (" (stand-in)" if figures["is_standin"] else ""), figures["components"], row,
            f"{one['test_loss']:.3f}", megabytes(one["peak_bytes"]), milliseconds(one["seconds"]),
            error(one["gradient_error_float64"]), one["evaluations"], PAPERS_COST.get(row, ""),
        ]
        for name, figures in data.items() for row, one in figures["methods"].items()
    ]  # fmt: skip
    return markdown(columns, rows)


def draw(data: dict[str, Any]) -> Figure:
    """Memory against time of every data set and method, and the training losses."""
    figure = Figure(figsize=(3.2 * len(data), 6), layout="constrained")
    axes = figure.subplots(2, len(data), squeeze=False)
    for (name, figures), (above, below) in zip(data.items(), axes.T, strict=True):
        for row, one in figures["methods"].items():
            above.semilogy(one["seconds"] * 1e3, one["peak_bytes"] / 1e6, "o", label=row)
            below.plot(figures["losses"][row], label=row, linewidth=1)
        above.set(title=f"{name.upper()}, M = {figures['components']}", xlabel="ms per iteration", ylabel="peak MB")
        below.set(xlabel="iteration", ylabel="NLL, nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def main() -> None:
    run = begin(
        "tabular",
        __doc__,
        data={"type": Path, "help": "the directory of the MAF repository's data (default: stand-ins)"},
        names={"nargs": "+", "choices": list(PAPER), "help": "data sets (default: all that the size has)"},
    )
    size = SIZES[run.size]
    data = {name: experiment(run, name, size) for name in run.arguments.names or size.names}
    run.draw(draw(data))
    run.save({"data": data}, table(data))


if __name__ == "__main__":
    main()
