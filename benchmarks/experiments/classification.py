"""`python -m benchmarks.experiments.classification`: an ODE-Net that classifies images, with PNODE's explicit schemes.

(Zhang, Zhao, IEEE TAI 2022.) Two convolutional ODE blocks, each integrated over [0, 1] with equal steps by euler,
midpoint, bosh3, rk4 and dopri5; every method trains the same network on the same batches. Network and data are smaller
than PNODE's at every size, and its second-order scheme is Heun's: see `paper.SOURCES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.experiments import image_data
from benchmarks.experiments.command import FULL, QUICK, REDUCED, begin
from benchmarks.experiments.measure import VectorField, compare
from benchmarks.experiments.methods import BACKPROPAGATION, METHODS, Solve, fixed
from benchmarks.experiments.tables import error, markdown, megabytes
from benchmarks.experiments.training import train

SCHEMES = ("euler", "midpoint", "bosh3", "rk4", "dopri5")


@dataclass(frozen=True)
class Size:
    """Images, the network's channels, steps of each block, batch, epochs; most images to train on and to test with."""

    data: str
    schemes: tuple[str, ...]
    channels: int
    steps: int
    batch: int
    epochs: int
    examples: int
    tested: int
    rounds: int


SIZES = {
    QUICK: Size("digits", ("midpoint", "dopri5"), 8, 2, 32, 1, 64, 297, 1),
    REDUCED: Size("digits", SCHEMES, 16, 4, 100, 3, 1500, 297, 5),
    FULL: Size("fashion-mnist", SCHEMES, 64, 8, 256, 100, 60_000, 10_000, 5),
}


class Block(VectorField):
    """Two convolutions, each after normalization and ReLU, with the time as one more channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(min(8, channels), channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = torch.relu(norm(x))
            x = convolution(torch.cat([x, t.expand_as(x[:, :1])], 1))
        return x


class ODENet(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList([Block(channels), Block(2 * channels)])
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.head = nn.Sequential(
            nn.GroupNorm(8, 2 * channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10)
        )

    def forward(self, images: Tensor, solve: Solve) -> Tensor:
        """Scores of shape (batch, 10) for images with values from 0 to 1."""
        x = self.stem(images.to(self.stem.weight.dtype))
        times = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        x = self.down(solve(self.blocks[0], x, times)[-1])
        return self.head(solve(self.blocks[1], x, times)[-1])


def table(schemes: dict[str, Any]) -> str:
    columns = ["scheme", "method", "accuracy", "peak memory", "time per epoch", "gradient error, float64",
               "evaluations"]  # fmt: skip
    rows = [
        [
            scheme, row, f"{one['accuracy']:.1%}", megabytes(one["peak_bytes"]), f"{one['seconds_per_epoch']:.2f} s",
            error(one["gradient_error_float64"]), one["evaluations"],
        ]
        for scheme, figures in schemes.items() for row, one in figures.items()
    ]  # fmt: skip
    return markdown(columns, rows)


def draw(schemes: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    keys = (("accuracy", 100, "test accuracy, %"), ("peak_bytes", 1e-6, "peak memory, MB"),
            ("seconds_per_epoch", 1, "seconds per epoch"))  # fmt: skip
    for axis, (key, unit, title) in zip(axes, keys, strict=True):
        for place, row in enumerate(METHODS):
            heights = [figures[row][key] * unit for figures in schemes.values()]
            axis.bar([x + 0.12 * (place - 3) for x in range(len(schemes))], heights, 0.11, label=row)
        axis.set_title(title)
        axis.set_xticks(range(len(schemes)), list(schemes))
    axes[1].legend(fontsize="small")
    return figure


def main() -> None:
    run = begin(
        "classification",
        __doc__,
        data={"type": Path, "help": f"a directory with IDX files (default: below {image_data.DEBIAN})"},
        images={"choices": image_data.NAMES, "help": "default: digits; fashion-mnist with --full"},
        schemes={"nargs": "+", "choices": SCHEMES, "help": "default: all that the size has"},
        epochs={"type": int, "help": "how often the network sees every image"},
        examples={"type": int, "help": "most images to train on"},
    )
    size = run.with_arguments(SIZES[run.size], "schemes", "epochs", "examples")
    images, line = image_data.load(run.of(run.arguments.images, size.data), run.arguments.data)
    run.show(line)
    white = images.levels - 1
    seen, labels = images.train[: size.examples].to(run.device) / white, images.train_labels.to(run.device)
    unseen, unseen_labels = (x[: size.tested].to(run.device) for x in (images.test / white, images.test_labels))
    torch.manual_seed(run.seed)
    network = ODENet(size.channels).to(run.device)
    per_epoch = len(seen) // size.batch

    @torch.no_grad()
    def accuracy(network: ODENet, solve: Solve) -> float:
        parts = [network(part, solve).argmax(1) for part in unseen.split(size.batch)]
        return float((torch.cat(parts) == unseen_labels).float().mean())

    schemes: dict[str, dict[str, Any]] = {}
    for scheme in size.schemes:
        solver = fixed(scheme, size.steps)
        trained, figures = {}, {}
        for row in METHODS:
            solve = solver.solve(row)

            def loss(network: ODENet, solve: Solve = solve) -> Tensor:
                index = torch.randint(len(seen), (size.batch,)).to(run.device)
                return cross_entropy(network(seen[index], solve), labels[index])

            trained[row], losses, seconds = train(
                network, loss, size.epochs * per_epoch, label=f"{scheme}, {row}", seed=run.seed, learning_rate=1e-2,
                one_cycle=True,
            )  # fmt: skip
            figures[row] = {
                "accuracy": accuracy(trained[row], solver.solve(BACKPROPAGATION)),
                "seconds_per_epoch_training": seconds * per_epoch,
                "final_training_loss": losses[-1],
            }
        measured = compare(
            trained[BACKPROPAGATION],
            lambda network, solve: cross_entropy(network(seen[: size.batch], solve), labels[: size.batch]),
            solver,
            rounds=size.rounds,
        )
        schemes[scheme] = {
            row: {**measured[row], **figures[row], "seconds_per_epoch": measured[row]["seconds"] * per_epoch}
            for row in METHODS
        }
    settings = {"channels": size.channels, "steps": size.steps, "batch": size.batch, "epochs": size.epochs}
    run.draw(draw(schemes))
    run.save({"data": line, "training_images": len(seen), "blocks": 2, **settings, "schemes": schemes}, table(schemes))


if __name__ == "__main__":
    main()
