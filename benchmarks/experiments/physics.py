"""`python -m benchmarks.experiments.physics`: the KdV and Cahn-Hilliard equations learned with an energy-based model.

The model is du/dt = G grad H(u) with the equation's G and a convolutional network H, so that evaluating the vector
field takes a gradient itself. It learns from successive snapshots, to go from each to the next, and is then given the
first snapshot of a trajectory that it has not seen. Network, initial values, float64 and, with `--full`, the training
are those of the data's authors (`paper.SOURCES`); that energies and losses are scaled by the data's deviations is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchdiffeq import odeint

from benchmarks.experiments.command import FULL, QUICK, REDUCED, Run, begin
from benchmarks.experiments.measure import VectorField, compare
from benchmarks.experiments.methods import BACKPROPAGATION, METHODS, PAPERS_COST, SYMPLECTIC, Solve, Solver
from benchmarks.experiments.physics_data import EQUATIONS, Equation, trajectories
from benchmarks.experiments.tables import error, markdown, megabytes, milliseconds
from benchmarks.experiments.training import train

ROLLOUT = Solver("dopri5", 1e-5, 1e-7)
# What is measured, whatever the training's solver. The paper's program offers dopri8; that the paper takes it here,
# and with these tolerances, is not confirmed (`paper.SOURCES`).
PAPERS_METHOD, PAPERS_RTOL, PAPERS_ATOL = "dopri8", 1e-6, 1e-8


@dataclass(frozen=True)
class Size:
    """Trajectories to learn from and to test on, snapshots of each, the network's channels, pairs in a batch; the
    training's solver, iterations and learning rate, and whether that rises and falls."""

    training: int
    test: int
    snapshots: int
    hidden: int
    batch: int
    method: str
    rtol: float
    atol: float
    iterations: int
    learning_rate: float
    one_cycle: bool
    rounds: int


SIZES = {
    QUICK: Size(2, 1, 40, 16, 16, "bosh3", 1e-2, 1e-4, 3, 1e-3, True, 1),
    REDUCED: Size(10, 2, 501, 32, 32, "bosh3", 1e-2, 1e-4, 200, 1e-2, True, 5),
    FULL: Size(90, 10, 501, 200, 200, PAPERS_METHOD, PAPERS_RTOL, PAPERS_ATOL, 10_000, 1e-3, False, 5),
}


@dataclass(frozen=True)
class Scales:
    """Standard deviations in the training data: of u, of grad H (as far as G shows it), and of du/dt."""

    u: float
    gradient: float
    derivative: float


def scales(equation: Equation, before: Tensor, after: Tensor) -> Scales:
    derivative = (after - before) / equation.interval
    gradient = derivative @ torch.linalg.pinv(torch.from_numpy(equation.structure).to(derivative)).T
    return Scales(float(before.std()), float(gradient.std()), float(derivative.std()))


class EnergyModel(VectorField):
    """du/dt = G grad H(u), for u of shape (batch, 50) on a circle."""

    def __init__(self, structure: Tensor, scales: Scales, hidden: int) -> None:
        super().__init__()
        self.register_buffer("structure", structure)
        self.scales = scales
        self.network = nn.Sequential(
            nn.Conv1d(1, hidden, 3, padding=1, padding_mode="circular"), nn.Tanh(),
            nn.Conv1d(hidden, hidden, 1), nn.Tanh(),
            nn.Conv1d(hidden, 1, 1, bias=False),
        )  # fmt: skip
        for layer in self.network:
            if isinstance(layer, nn.Conv1d):
                nn.init.orthogonal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def energy(self, u: Tensor) -> Tensor:
        """H, shape (batch,), up to a constant."""
        return self.scales.gradient * self.scales.u * self.network(u[:, None] / self.scales.u).sum((1, 2))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        with torch.enable_grad():
            u = u.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.energy(u).sum(), u, create_graph=True)
        return gradient @ self.structure.T


class Model(nn.Module):
    """The energy model of an equation, from its snapshots."""

    def __init__(self, equation: Equation, scales: Scales, hidden: int) -> None:
        super().__init__()
        self.field = EnergyModel(torch.from_numpy(equation.structure), scales, hidden)
        self.interval = equation.interval

    def loss(self, before: Tensor, after: Tensor, solve: Solve) -> Tensor:
        """Mean square of the error of du/dt over the interval, relative to its variance in the data."""
        times = torch.tensor([0.0, self.interval], dtype=before.dtype, device=before.device)
        end = solve(self.field, before, times)[-1]
        return ((end - after) / (self.interval * self.field.scales.derivative)).square().mean()

    @torch.no_grad()
    def rollout(self, start: Tensor, snapshots: int, solver: Solver) -> Tensor:
        """Shape (snapshots, batch, 50)."""
        times = self.interval * torch.arange(snapshots, dtype=start.dtype, device=start.device)
        return odeint(self.field, start, times, method=solver.method, rtol=solver.rtol, atol=solver.atol)


def experiment(run: Run, name: str, size: Size) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every method's figures, and what the pictures show."""
    equation = EQUATIONS[name]
    data = trajectories(equation, size.training + size.test, size.snapshots, run.seed)
    seen, unseen = data[: size.training], data[size.training :]
    before, after = (torch.from_numpy(part.reshape(-1, part.shape[-1])).to(run.device)
                     for part in (seen[:, :-1], seen[:, 1:]))  # fmt: skip
    solver = Solver(size.method, size.rtol, size.atol, {"first_step": equation.interval})
    torch.manual_seed(run.seed)
    model = Model(equation, scales(equation, before, after), size.hidden).double().to(run.device)

    def on_batch(solve: Solve) -> Any:
        def loss(model: Model) -> Tensor:
            index = torch.randint(len(before), (size.batch,)).to(run.device)
            return model.loss(before[index], after[index], solve)

        return loss

    start = torch.from_numpy(unseen[:, 0]).to(run.device)
    trained, figures, losses, rollouts = {}, {}, {}, {}
    for row in METHODS:
        trained[row], losses[row], seconds = train(
            model, on_batch(solver.solve(row)), size.iterations, label=f"{name}, {row}", seed=run.seed,
            learning_rate=size.learning_rate, one_cycle=size.one_cycle,
        )  # fmt: skip
        rollouts[row] = trained[row].rollout(start, size.snapshots, ROLLOUT).transpose(0, 1).cpu().numpy()
        predicted, truth = rollouts[row][:, 1:], unseen[:, 1:]  # the first snapshot is given
        figures[row] = {
            "rollout_mse": float(np.square(predicted - truth).mean()),
            "energy_mse": float(np.square(equation.energy(predicted) - equation.energy(truth)).mean()),
            "seconds_training": seconds,
        }
    u, v = before[: size.batch], after[: size.batch]
    measured = compare(
        trained[BACKPROPAGATION],
        lambda model, solve: model.loss(u, v, solve),
        Solver(PAPERS_METHOD, PAPERS_RTOL, PAPERS_ATOL, {"first_step": equation.interval / 4}),
        rounds=size.rounds,
    )
    record = {
        "name": equation.name,
        "training_trajectories": size.training,
        "snapshots": size.snapshots,
        "hidden": size.hidden,
        "batch": size.batch,
        "iterations": size.iterations,
        "training_method": size.method,
        "training_rtol": size.rtol,
        "training_atol": size.atol,
        "method": PAPERS_METHOD,
        "rtol": PAPERS_RTOL,
        "atol": PAPERS_ATOL,
        "variance_of_test_data": float(unseen.var()),
        "methods": {row: {**measured[row], **figures[row]} for row in METHODS},
        "losses": losses,
    }
    learned = trained[SYMPLECTIC].field.energy(torch.from_numpy(rollouts[SYMPLECTIC][0]).to(run.device))
    spacing = equation.width / unseen.shape[-1]  # the model's energy is a sum, the equation's an integral
    shown = {
        "truth": unseen[0],
        "model": rollouts[SYMPLECTIC][0],
        "energies": {"truth": equation.energy(unseen[0]), "model": equation.energy(rollouts[SYMPLECTIC][0])},
        "learned": spacing * learned.detach().cpu().numpy(),
        "times": equation.interval * np.arange(size.snapshots),
        "width": equation.width,
    }
    return record, shown


def table(records: dict[str, Any]) -> str:
    columns = ["system", "method", "rollout MSE", "energy MSE", "peak memory", "time per iteration",
               "gradient error, float64", "evaluations", "the paper's cost"]  # fmt: skip
    rows = [
        [
            record["name"], row, f"{one['rollout_mse']:.3g}", f"{one['energy_mse']:.3g}", megabytes(one["peak_bytes"]),
            milliseconds(one["seconds"]), error(one["gradient_error_float64"]), one["evaluations"],
            PAPERS_COST.get(row, ""),
        ]
        for record in records.values() for row, one in record["methods"].items()
    ]  # fmt: skip
    return markdown(columns, rows)


def draw(records: dict[str, Any], shown: dict[str, Any]) -> Figure:
    """Truth, model, energy of both, and the training losses; one system a line."""
    figure = Figure(figsize=(15, 3.4 * len(shown)), layout="constrained")
    for line, (name, one) in zip(figure.subplots(len(shown), 4, squeeze=False), shown.items(), strict=True):
        limit = np.abs(one["truth"]).max()
        extent = (0, one["times"][-1], 0, one["width"])
        for axis, which in zip(line, ("truth", "model"), strict=False):
            image = axis.imshow(
                one[which].T, origin="lower", aspect="auto", extent=extent, vmin=-limit, vmax=limit, cmap="seismic"
            )
            axis.set(title=f"{records[name]['name']}, {which}", xlabel="time", ylabel="x")
        figure.colorbar(image, ax=line[1])
        for which, energy in one["energies"].items():
            line[2].plot(one["times"], energy, label=f"the equation's energy, along the {which}")
        line[2].plot(
            one["times"], one["learned"] - one["learned"][0] + one["energies"]["truth"][0], "k:",
            label="the learned energy, along the model, shifted",
        )  # fmt: skip
        line[2].set(title="energy along the rollout", xlabel="time")
        line[2].legend(fontsize="x-small")
        for row, losses in records[name]["losses"].items():
            line[3].semilogy(losses, label=row, linewidth=1)
        line[3].set(title="training loss", xlabel="iteration")
        line[3].legend(fontsize="x-small")
    return figure


def main() -> None:
    run = begin("physics", __doc__)
    results = {name: experiment(run, name, SIZES[run.size]) for name in EQUATIONS}
    records = {name: record for name, (record, _) in results.items()}
    run.draw(draw(records, {name: shown for name, (_, shown) in results.items()}))
    run.save({"systems": records}, table(records))


if __name__ == "__main__":
    main()
