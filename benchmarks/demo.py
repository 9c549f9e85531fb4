"""`make demo`: train a continuous normalizing flow on digits with the flag set, then put the methods side by side.

The program that is trained, integration/digits_flow.py, knows torchdiffeq and nothing else. What is measured here, for the
trained flow and one batch: the gradient against full backpropagation in float64 with the same first step and
tolerance, the peak of tensor memory of one forward and backward pass, and its time.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torchdiffeq
from torch import Tensor

from benchmarks.peak_memory import peak_bytes
from integration import digits_flow
from integration.digits_flow import Digits, Flow

mpl.use("Agg")  # before pyplot is imported: the picture goes to a file, a display is not needed
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FLAG = "symplectic_adjoint"
METHODS: dict[str, tuple[Callable, str]] = {
    "backpropagation": (torchdiffeq.odeint, "dopri5"),
    "continuous adjoint": (torchdiffeq.odeint_adjoint, "dopri5"),
    "symplectic adjoint": (torchdiffeq.odeint, FLAG),
}
ROUNDS = 9  # of timing
ROW = 10  # images of each class in the picture


class Pass:
    """One forward and backward pass of a method, on a flow of its own and a batch that all methods share."""

    def __init__(self, flow: Flow, z: Tensor, labels: Tensor, noise: Tensor, method: str) -> None:
        self.flow = copy.deepcopy(flow).to(z.dtype)
        self.flow.begin(labels, noise.to(z))
        self.z = z
        self.solve, self.method = METHODS[method]

    def __call__(self) -> None:
        self.flow.zero_grad()
        digits_flow.negative_log_likelihood(self.flow, self.z.clone(), self.method, solve=self.solve).backward()

    def gradient(self) -> Tensor:
        """Of all parameters, as one float64 vector."""
        self()
        return torch.cat([p.grad.double().flatten() for p in self.flow.parameters()])

    def evaluations(self) -> int:
        """How often a pass evaluates the vector field."""
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        with self.flow.register_forward_hook(count):
            self()
        return calls

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def compare(flow: Flow, digits: Digits, batch: int) -> dict[str, dict[str, float]]:
    """Every method's gradient errors, peak memory in bytes and seconds per pass, on one batch."""
    z, labels = digits.sample_batch(batch)
    noise = digits_flow.rademacher_like(z)
    single = {method: Pass(flow, z, labels, noise, method) for method in METHODS}
    double = {method: Pass(flow, z.double(), labels, noise, method) for method in METHODS}
    exact = double["backpropagation"].gradient()

    def error(one: Pass) -> float:
        return float((one.gradient() - exact).norm() / exact.norm())

    figures = {
        method: {
            "gradient_error_float64": error(double[method]),
            "gradient_error_float32": error(single[method]),
            "evaluations": single[method].evaluations(),
            "peak_bytes": peak_bytes(single[method]),
        }
        for method in METHODS
    }
    # One pass of each method in turn, so that whatever else the machine does falls on all of them.
    seconds = [{method: single[method].seconds() for method in METHODS} for _ in range(ROUNDS)]
    for method in METHODS:
        figures[method]["seconds"] = statistics.median(times[method] for times in seconds)
    return figures


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as text, one method a line."""
    lines = [
        f"{'':20}{'gradient error':>24}{'peak memory':>15}{'time per':>12}{'evaluations':>14}",
        f"{'':20}{'float64':>12}{'float32':>12}{'MB':>15}{'step, ms':>12}{'of f':>14}",
    ]
    lines += [
        f"{method:20}{row['gradient_error_float64']:12.1e}{row['gradient_error_float32']:12.1e}"
        f"{row['peak_bytes'] / 1e6:15.1f}{row['seconds'] * 1e3:12.0f}{row['evaluations']:14}"
        for method, row in figures.items()
    ]
    return "\n".join(lines)


def mosaic(images: Tensor) -> Tensor:
    """One picture of images of shape (n, 8, 8), ROW to a line, with a pixel of margin around each."""
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
    side = framed.shape[-1]
    return framed.unflatten(0, (-1, ROW)).transpose(1, 2).reshape(-1, ROW * side)


def draw(path: Path, real: Tensor, sampled: Tensor, losses: list[float], held_out: float) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    for axis, images, title in zip(axes, (real, sampled), ("real digits", "sampled from the flow"), strict=False):
        axis.imshow(mosaic(images), cmap="gray_r", vmin=0, vmax=digits_flow.WHITE)
        axis.set_title(title)
        axis.axis("off")
    axes[2].plot(losses, linewidth=1, label="training batch")
    axes[2].axhline(held_out, color="black", linestyle="--", linewidth=1, label="held-out digits, at the end")
    axes[2].set(title="negative log-likelihood, nats per component", xlabel=f'step, method="{FLAG}"')
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    torch.manual_seed(0)
    digits, held_out = digits_flow.load()
    start = time.perf_counter()
    flow, losses = digits_flow.train(Flow(), digits, FLAG)
    training_seconds = time.perf_counter() - start
    unseen = digits_flow.evaluate(flow, held_out, FLAG)

    classes = torch.arange(digits_flow.CLASSES).repeat_interleave(ROW)
    sampled = digits.images(digits_flow.sample(flow, classes, FLAG))
    first = torch.cat([(digits.labels == label).nonzero()[:ROW, 0] for label in range(digits_flow.CLASSES)])
    real = digits.pixels[first].unflatten(1, (digits_flow.SIDE, digits_flow.SIDE))

    figures = compare(flow, digits, digits_flow.BATCH)
    print(f"\nnegative log-likelihood, nats per component: {losses[0]:.3f} at first, {losses[-1]:.3f} at the end, ", end="")
    print(f"{unseen:.3f} on held-out digits\n\n{table(figures)}\n")

    RESULTS.mkdir(exist_ok=True)
    draw(RESULTS / "demo.png", real, sampled, losses, unseen)
    record = {
        "torch": torch.__version__,
        "torchdiffeq": torchdiffeq.__version__,
        "threads": torch.get_num_threads(),
        "batch": digits_flow.BATCH,
        "components": digits_flow.COMPONENTS,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "tolerance": digits_flow.TOLERANCE,
        "options": digits_flow.OPTIONS,
        "training_seconds": training_seconds,
        "held_out_negative_log_likelihood": unseen,
        "losses": losses,
        "methods": figures,
    }
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    for name in ("demo.png", "demo.json"):
        print((RESULTS / name).relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS / name)


if __name__ == "__main__":
    main()
