"""Stiff systems: explicit methods against implicit ones, and learning one.

`python -m benchmarks.stiff` takes 4 minutes; with `--quick` a few seconds, for less of each, whose figures say little.
Results go to `--out`, by default `benchmarks/results`.

Robertson's kinetics to t = 1e5, the Van der Pol oscillator over one relaxation of mu up to 1e4, and a linear problem
with rates from 1 to 1e6 (Hairer, Wanner, Solving ODEs II, IV.1 and IV.10). An explicit method that needs more than
`MOST_STEPS` steps is stopped, and the time that it got to is shown.

Then Robertson's three rate constants are learned from the concentrations at 41 times from 1e-5 to 1e5, starting from
constants that are off by factors of 2 to 4. As in PNODE (Zhang, Zhao, IEEE TAI 2022) each species counts in the loss by
the range that it covers, since they differ by five orders of magnitude.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

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
        self.reached = float((t + dt).detach())
        if self.accepted >= self.most_steps:
            raise TooManyStepsError

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.rejected += 1


class Robertson(Problem):
    """Three species whose reactions differ in speed by nine orders of magnitude (Robertson 1966)."""

    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    end = 1e5
    scale = 1e-6
    rates = torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64)

    def slope(self, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        first, second, third = (rate * each for rate, each in zip(self.rates, (a, b * b, b * c), strict=True))
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
QUICK_PROBLEMS = ("linear, rates to 1e6",)


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


def compare(name: str, tolerance: float = TOLERANCE, most_steps: float = MOST_STEPS) -> dict[str, dict[str, Any]]:
    """A row for each method."""
    problem = PROBLEMS[name]()
    exact, _ = solve(problem, "kencarp5", tolerance * REFERENCE_TOLERANCE / TOLERANCE, math.inf)
    assert exact is not None
    rows = {}
    for method in METHODS:
        y, seconds = solve(problem, method, tolerance, most_steps)
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


TIMES = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-5, 5, 41, dtype=torch.float64)])
LEARNING_TOLERANCE = 1e-4
START = torch.tensor([2.0, -4.0, 3.0], dtype=torch.float64)
"""The factors that the rate constants are off by at first; negative for divisors."""


class Learned(Robertson):
    """Robertson's kinetics with the logarithms of its rate constants as parameters."""

    def __init__(self) -> None:
        super().__init__()
        factors = torch.where(START > 0, START, -1 / START)
        self.log_rates = torch.nn.Parameter((Robertson.rates * factors).log())

    @property
    def rates(self) -> Tensor:
        return self.log_rates.exp()

    def predict(self, method: str, count: int) -> Tensor:
        """The concentrations at the first of `TIMES`, shape (count, 3)."""
        tolerances = {"rtol": LEARNING_TOLERANCE, "atol": LEARNING_TOLERANCE * self.scale}
        return torchdiffeq.odeint(self, self.y0, TIMES[:count], method=f"symplectic_adjoint:{method}", **tolerances)


def gradient(method: str, data: Tensor, most_steps: float) -> dict[str, Any]:
    """The figures of one gradient of the loss."""
    problem = Learned()
    problem.reset(most_steps)
    began = time.perf_counter()
    row: dict[str, Any] = {}
    try:
        scaled_loss(problem.predict(method, len(data)), data).backward()
    except TooManyStepsError:
        row["stopped_at"] = problem.reached
    return {"steps": problem.accepted, "seconds": time.perf_counter() - began, **row}


def scaled_loss(y: Tensor, data: Tensor) -> Tensor:
    """The mean square of what the concentrations are off by, each in units of the range that it covers."""
    return ((y - data) / (data.amax(0) - data.amin(0))).square().mean()


def learn(data: Tensor, most: float, method: str = "kencarp3") -> tuple[list[float], Tensor, Tensor, Tensor]:
    """Losses, predictions before and after, and the rate constants learned."""
    problem = Learned()
    problem.reset(math.inf)
    optimizer = torch.optim.LBFGS(problem.parameters(), lr=1.0, max_iter=1, line_search_fn="strong_wolfe")
    losses: list[float] = []
    with torch.no_grad():
        before = problem.predict(method, len(data))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = scaled_loss(problem.predict(method, len(data)), data)
        loss.backward()
        return loss

    while len(losses) < most and (len(losses) < 2 or losses[-1] < losses[-2]):
        losses.append(float(optimizer.step(closure).detach()))
        print(f"loss {losses[-1]:.2e}", problem.rates.tolist(), flush=True)
    with torch.no_grad():
        return losses, before, problem.predict(method, len(data)), problem.rates


def draw(losses: list[float], before: Tensor, after: Tensor, data: Tensor, out: Path) -> None:
    """The loss curve and the fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.4))
    axes[0].semilogy(losses, "o-", markersize=3)
    axes[0].set(xlabel="iteration of L-BFGS", title="scaled loss")
    times = TIMES[1 : len(data)]
    for i, axis in enumerate(axes[1:]):
        axis.semilogx(times, data[1:, i], "o", markersize=4, color="black", label="data")
        axis.semilogx(times, before[1:, i], "--", color="tab:orange", label="before")
        axis.semilogx(times, after[1:, i], color="tab:blue", label="learned")
        axis.set(xlabel="t", title=f"$y_{i + 1}$")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(out / "stiff.png", dpi=110)
    pyplot.close(figure)


def learning(
    out: Path, count: int = len(TIMES), most: float = math.inf, most_steps: float = MOST_STEPS
) -> dict[str, Any]:
    """The figures of learning, and its picture.

    Args:
        out: where that is put.
        count: how many of `TIMES` there is data for.
        most: iterations.
        most_steps: of a solve, for the gradients by each method.
    """
    with torch.no_grad():
        tolerances = {"rtol": REFERENCE_TOLERANCE, "atol": REFERENCE_TOLERANCE * Robertson.scale}
        data = torchdiffeq.odeint(Robertson(), Robertson.y0, TIMES[:count], method="kencarp5", **tolerances)
    rows = {method: gradient(method, data, most_steps) for method in METHODS}
    for method, row in rows.items():
        print("gradient", method, row, flush=True)
    losses, before, after, rates = learn(data, most)
    draw(losses, before, after, data, out)
    off = float((rates / Robertson.rates - 1).abs().max())
    print(f"rate constants learned: {rates.tolist()}, off by {off:.1e} at most, relative")
    return {"gradient": rows, "losses": losses, "rates": rates.tolist(), "worst_relative_error": off}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are put")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.out.mkdir(exist_ok=True)
    record: dict[str, Any] = {"torch": torch.__version__, "torchdiffeq": torchdiffeq.__version__}
    if given.quick:
        record |= {"tolerance": 1e-3, "problems": {name: compare(name, 1e-3, 60) for name in QUICK_PROBLEMS}}
        record["learning"] = learning(given.out, count=6, most=2, most_steps=20)
    else:
        record |= {"tolerance": TOLERANCE, "problems": {name: compare(name) for name in PROBLEMS}}
        record["learning"] = learning(given.out)
    print(f"\n{table(record['problems'])}\n")
    (given.out / "stiff.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
