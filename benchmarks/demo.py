"""`make demo`: train a continuous normalizing flow on digits with the flag set, then put the methods side by side.

The program that is trained, integration/digits_flow.py, knows torchdiffeq and nothing else. What is measured here,
for the trained flow and one batch: the gradient against full backpropagation with the same first step and tolerance,
the peak of tensor memory of one training step in float32, and its time.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.peak_memory import peak_bytes
from integration import digits_flow
from integration.digits_flow import Digits, Flow

RESULTS = Path(__file__).parent / "results"
FLAG = "symplectic_adjoint"
METHODS: dict[str, tuple[Callable, str, dict]] = {
    "backpropagation": (torchdiffeq.odeint, "dopri5", {}),
    "continuous adjoint": (torchdiffeq.odeint_adjoint, "dopri5", {}),
    "symplectic adjoint": (torchdiffeq.odeint, FLAG, {}),
    "the same, least memory": (torchdiffeq.odeint, FLAG, {"checkpoint": "steps"}),
}
ROUNDS = 9  # of timing
ROW = 10  # images of each class in the picture


class Step:
    """A training step's forward and backward pass with one method, on one batch and a copy of the flow."""

    def __init__(self, flow: Flow, z: Tensor, labels: Tensor, noise: Tensor, method: str) -> None:
        self.flow = copy.deepcopy(flow).to(z.dtype)
        self.flow.begin(labels, noise.to(z))
        self.z = z
        self.solve, self.method, own = METHODS[method]
        self.options = {**digits_flow.OPTIONS, **own}

    def __call__(self) -> tuple[Tensor, ...]:
        loss = digits_flow.negative_log_likelihood(
            self.flow, self.z.clone(), self.method, solve=self.solve, options=self.options
        )
        return torch.autograd.grad(loss, list(self.flow.parameters()))

    def gradient(self) -> Tensor:
        """Of all parameters, as one vector."""
        return torch.cat([part.flatten() for part in self()])

    def evaluations(self) -> int:
        """Count the evaluations of the vector field in a step."""
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


def gradient_errors(steps: dict[str, Step]) -> dict[str, float]:
    """Of every method, relative to the norm of full backpropagation's gradient."""
    exact = steps["backpropagation"].gradient()
    return {method: float((step.gradient() - exact).norm() / exact.norm()) for method, step in steps.items()}


def compare(flow: Flow, digits: Digits, batch: int) -> dict[str, dict[str, float]]:
    """Every method's gradient errors, peak memory in bytes, evaluations and seconds of a step, on one batch."""
    z, labels = digits.sample_batch(batch)
    noise = digits_flow.rademacher_like(z)
    single = {method: Step(flow, z, labels, noise, method) for method in METHODS}
    double = {method: Step(flow, z.double(), labels, noise, method) for method in METHODS}
    # Each precision has its own reference: the step sizes, which the controller draws from a small difference of
    # large numbers, are not quite the same in both, and a method is not to blame for that.
    error64, error32 = gradient_errors(double), gradient_errors(single)
    # One step of each method in turn, so that whatever else the machine does falls on all of them.
    seconds = [{method: step.seconds() for method, step in single.items()} for _ in range(ROUNDS)]
    return {
        method: {
            "gradient_error_float64": error64[method],
            "gradient_error_float32": error32[method],
            "peak_bytes": peak_bytes(step),
            "seconds": statistics.median(times[method] for times in seconds),
            "evaluations": step.evaluations(),
        }
        for method, step in single.items()
    }


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as text, one method a line."""
    lines = [
        f"{'':24}{'gradient error':>20}{'peak memory':>15}{'time per step':>17}{'evaluations':>15}",
        f"{'':24}{'float64':>10}{'float32':>10}{'MB':>15}{'ms':>17}{'of f':>15}",
    ]
    for method, row in figures.items():
        errors = [row["gradient_error_float64"], row["gradient_error_float32"]]
        shown = ["reference" if error == 0 else f"{error:.1e}" for error in errors]
        lines.append(
            f"{method:24}{shown[0]:>10}{shown[1]:>10}"
            f"{row['peak_bytes'] / 1e6:15.1f}{row['seconds'] * 1e3:17.0f}{row['evaluations']:15}"
        )
    return "\n".join(lines)


def mosaic(images: Tensor) -> Tensor:
    """One picture of images of shape (n, 8, 8), ROW to a line, with a pixel of margin around each."""
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1))
    side = framed.shape[-1]
    return framed.unflatten(0, (-1, ROW)).transpose(1, 2).reshape(-1, ROW * side)


def draw(path: Path, real: Tensor, sampled: Tensor, losses: list[float], held_out: float) -> None:
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, images, title in zip(axes, (real, sampled), ("real digits", "sampled from the flow"), strict=False):
        axis.imshow(mosaic(images), cmap="gray_r", vmin=0, vmax=digits_flow.WHITE)
        axis.set_title(title)
        axis.axis("off")
    axes[2].plot(losses, linewidth=1, label="training batch")
    axes[2].axhline(held_out, color="black", linestyle="--", linewidth=1, label="held-out digits, at the end")
    axes[2].set(title="negative log-likelihood, nats per component", xlabel=f'step, method="{FLAG}"')
    axes[2].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    # The layers are small: a second thread gains little, and where other work shares the cores, two threads that wait
    # for each other at every layer lose far more.
    torch.set_num_threads(1)
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
    print(
        f"\nnegative log-likelihood, nats per component: {losses[0]:.3f} at first, {losses[-1]:.3f} at the end, ",
        end="",
    )
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
