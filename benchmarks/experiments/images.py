"""`python -m benchmarks.experiments.images`: FFJORD on images: UCI digits, Fashion-MNIST or MNIST.

A multi-scale flow of convolutional components: between scales, 2x2 pixels become channels and half of these are done.
Every method trains the same flow on the same batches; then one iteration of each is measured.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, softplus
from torchdiffeq import odeint

from benchmarks.experiments import image_data
from benchmarks.experiments.command import FULL, QUICK, REDUCED, begin
from benchmarks.experiments.ffjord import FlowField, normal_log_density, transport
from benchmarks.experiments.measure import compare
from benchmarks.experiments.methods import (
    BACKPROPAGATION,
    METHODS,
    PAPERS_COST,
    SYMPLECTIC,
    Solve,
    Solver,
    adaptive,
)
from benchmarks.experiments.tables import error, markdown, megabytes, milliseconds
from benchmarks.experiments.training import train

SAMPLES = 8  # to a line of the picture


@dataclass(frozen=True)
class Size:
    """Images, scales, components of each, channels of each hidden layer, and the training.

    Pixels are squeezed into (margin, 1 - margin) before the logit.
    """

    data: str
    scales: int
    components: int
    hidden: tuple[int, ...]
    batch: int
    iterations: int
    tested: int
    rounds: int
    tolerance: float
    learning_rate: float
    margin: float


SIZES = {
    QUICK: Size("digits", 2, 1, (8,), 16, 2, 32, 1, 1e-3, 1e-3, 0.05),
    REDUCED: Size("digits", 2, 2, (16, 16), 64, 40, 297, 3, 1e-4, 5e-3, 0.05),
    # FFJORD's, but for the number of components: see `paper.SOURCES`.
    FULL: Size("mnist", 3, 2, (64, 64, 64), 200, 10_000, 10_000, 5, 1e-5, 1e-3, 1e-6),
}


class ConvolutionalField(FlowField):
    """3x3 convolutions with the time as one more channel."""

    def __init__(self, channels: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = [channels, *hidden, channels]
        self.layers = nn.ModuleList(nn.Conv2d(a + 1, b, 3, padding=1) for a, b in itertools.pairwise(widths))

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        for depth, layer in enumerate(self.layers):
            z = layer(torch.cat([z, t.expand_as(z[:, :1])], 1))
            z = softplus(z) if depth + 1 < len(self.layers) else z
        return z


class ImageFlow(nn.Module):
    """From grey images to a standard normal distribution."""

    def __init__(self, size: Size, levels: int, side: int) -> None:
        super().__init__()
        channels = [2**scale for scale in range(size.scales)]
        self.scales = nn.ModuleList(
            nn.ModuleList(ConvolutionalField(c, size.hidden) for _ in range(size.components)) for c in channels
        )
        self.shapes = [(c, side // c, side // c) for c in channels]
        self.levels, self.margin = levels, size.margin

    def draw_noise(self, count: int, device: torch.device) -> tuple[Tensor, list[list[Tensor]]]:
        """Draw the noise that makes pixels continuous, and Rademacher noise for every component's divergence."""
        signs = [
            [torch.randint(0, 2, (count, *shape)).mul(2).sub(1).float().to(device) for _ in fields]
            for shape, fields in zip(self.shapes, self.scales, strict=True)
        ]
        return torch.rand(count, *self.shapes[0]).to(device), signs

    def bits_per_pixel(self, images: Tensor, noise: tuple[Tensor, list[list[Tensor]]], solve: Solve) -> Tensor:
        """Negative log2-likelihood of the integer images, mean over batch and pixels."""
        dtype = next(self.parameters()).dtype
        unit = self.margin + (1 - 2 * self.margin) * (images + noise[0]).to(dtype) / self.levels
        z = torch.logit(unit)
        stretch = math.log(1 - 2 * self.margin) - unit.log() - (1 - unit).log()
        lost, done = -stretch.flatten(1).sum(1), torch.zeros_like(z[:, 0, 0, 0])
        for scale, (fields, signs) in enumerate(zip(self.scales, noise[1], strict=True)):
            if scale > 0:
                out, z = pixel_unshuffle(z, 2).chunk(2, 1)
                done = done + normal_log_density(out)
            for field, sign in zip(fields, signs, strict=True):
                z, lost = transport(field, z, lost, sign.to(dtype), solve)
        nats = lost - done - normal_log_density(z)
        return nats.mean() / (images[0].numel() * math.log(2)) + math.log2(self.levels)

    @torch.no_grad()
    def sample(self, count: int, solver: Solver) -> Tensor:
        """Images with values from 0 to 1."""
        device = next(self.parameters()).device
        times = torch.tensor([1.0, 0.0], device=device)
        z = torch.randn(count, *self.shapes[-1], device=device)
        for scale in reversed(range(len(self.scales))):
            for field in reversed(self.scales[scale]):
                z = odeint(field.drift(), z, times, method=solver.method, rtol=solver.rtol, atol=solver.atol)[-1]
            if scale > 0:
                z = pixel_shuffle(torch.cat([torch.randn_like(z), z], 1), 2)
        return ((torch.sigmoid(z) - self.margin) / (1 - 2 * self.margin)).clamp(0, 1)


def table(record: dict[str, Any]) -> str:
    columns = ["method", "test bits per pixel", "peak memory", "time per iteration", "gradient error, float64",
               "evaluations", "the paper's cost"]  # fmt: skip
    rows = [
        [
            row, f"{one['test_loss']:.4f}", megabytes(one["peak_bytes"]), milliseconds(one["seconds"]),
            error(one["gradient_error_float64"]), one["evaluations"], PAPERS_COST.get(row, ""),
        ]
        for row, one in record["methods"].items()
    ]  # fmt: skip
    return markdown(columns, rows)


def mosaic(images: Tensor) -> Tensor:
    """One picture of images of shape (n, 1, side, side), SAMPLES to a line."""
    framed = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1))
    return framed.unflatten(0, (-1, SAMPLES)).transpose(1, 2).reshape(-1, SAMPLES * framed.shape[-1])


def draw(real: Tensor, sampled: Tensor, losses: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, images, title in zip(axes, (real, sampled), ("data", "samples, symplectic adjoint"), strict=False):
        axis.imshow(mosaic(images).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    for row, curve in losses.items():
        axes[2].plot(curve, label=row, linewidth=1)
    axes[2].set(title="training: bits per pixel", xlabel="iteration")
    axes[2].legend(fontsize="small")
    return figure


def main() -> None:
    run = begin(
        "images",
        __doc__,
        data={"type": Path, "help": f"a directory with IDX files (default: below {image_data.DEBIAN})"},
        images={"choices": image_data.NAMES, "help": "default: digits; mnist with --full"},
        batch={"type": int, "help": "images of a training iteration"},
        iterations={"type": int, "help": "training iterations"},
    )
    size = run.with_arguments(SIZES[run.size], "batch", "iterations")
    images, line = image_data.load(run.of(run.arguments.images, size.data), run.arguments.data)
    run.show(line)
    pixels, unseen = images.train.to(run.device), images.test[: size.tested].to(run.device)
    torch.manual_seed(run.seed)
    flow = ImageFlow(size, images.levels, pixels.shape[-1]).to(run.device)
    solver = adaptive("dopri5", size.tolerance, size.tolerance)

    def on_batch(solve: Solve) -> Any:
        def loss(model: ImageFlow) -> Tensor:
            x = pixels[torch.randint(len(pixels), (size.batch,)).to(run.device)]
            return model.bits_per_pixel(x, model.draw_noise(len(x), run.device), solve)

        return loss

    @torch.no_grad()
    def test_loss(model: ImageFlow) -> float:
        torch.manual_seed(0)
        noise = model.draw_noise(len(unseen), run.device)
        return float(model.bits_per_pixel(unseen, noise, solver.solve(BACKPROPAGATION)))

    trained, losses, figures = {}, {}, {}
    for row in METHODS:
        trained[row], losses[row], seconds = train(
            flow, on_batch(solver.solve(row)), size.iterations, label=row, seed=run.seed,
            learning_rate=size.learning_rate,
        )  # fmt: skip
        figures[row] = {"test_loss": test_loss(trained[row]), "seconds_training": seconds}
    x = pixels[: size.batch]
    noise = flow.draw_noise(len(x), run.device)
    measured = compare(
        trained[BACKPROPAGATION],
        lambda model, solve: model.bits_per_pixel(x, noise, solve),
        solver,
        rounds=size.rounds,
    )
    record = {
        "data": line,
        "components": size.components * size.scales,
        "hidden": size.hidden,
        "batch": size.batch,
        "tolerance": size.tolerance,
        "iterations": size.iterations,
        "methods": {row: {**measured[row], **figures[row]} for row in METHODS},
        "losses": losses,
    }
    torch.manual_seed(run.seed)
    sampled = trained[SYMPLECTIC].sample(6 * SAMPLES, solver)
    run.draw(draw(pixels[: 6 * SAMPLES] / (images.levels - 1), sampled, losses))
    run.save(record, table(record))


if __name__ == "__main__":
    main()
