"""A continuous normalizing flow on handwritten digits, as it is written with torchdiffeq alone.

The data are the 1797 8x8 digits of the UCI repository that scikit-learn ships, as their leading principal components.
A class-conditional vector field carries them to a standard normal distribution; it is fitted by maximum likelihood,
with the divergence estimated inside the vector field (FFJORD: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud,
ICLR 2019).

Nothing here knows how gradients are computed: `method` is the string that `torchdiffeq.odeint` is given.

    python -m integration.digits_flow --method symplectic_adjoint
    python -m integration.digits_flow --method dopri5
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchdiffeq import odeint
from tqdm import tqdm

SIDE = 8  # pixels
WHITE = 16  # largest pixel value
CLASSES = 10

COMPONENTS = 32  # of 64; they carry 97 % of the variance
HELD_OUT = 297  # images
BATCH = 512
STEPS = 350
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.5  # 1500 images are few: without it the flow learns them by heart
TOLERANCE = 1e-3
OPTIONS = {"first_step": 0.2}


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 64) with their labels, and the linear map between pixels and whitened components."""

    pixels: Tensor
    labels: Tensor
    mean: Tensor  # (64,)
    directions: Tensor  # (components, 64), orthonormal rows
    scales: Tensor  # (components,), standard deviation along each direction

    def sample_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random images as components, and their labels."""
        index = torch.randint(len(self.labels), (size,))
        return self.components(self.pixels[index]), self.labels[index]

    def components(self, pixels: Tensor) -> Tensor:
        """Whitened components, shape (n, components), of integer pixels that uniform noise makes continuous."""
        return (pixels + torch.rand_like(pixels) - 0.5 - self.mean) @ self.directions.T / self.scales

    def images(self, components: Tensor) -> Tensor:
        """Images of shape (n, 8, 8), values in 0..16."""
        return (self.mean + components * self.scales @ self.directions).clamp(0, WHITE).unflatten(1, (SIDE, SIDE))


def load(components: int = COMPONENTS, held_out: int = HELD_OUT) -> tuple[Digits, Digits]:
    """Digits for training and held-out ones, in float32; the components are those of the former."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    pixels, labels = pixels.float(), labels.long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, rest = order[held_out:], order[:held_out]
    mean = pixels[kept].mean(0)
    _, singular, directions = torch.linalg.svd(pixels[kept] - mean, full_matrices=False)
    linear = mean, directions[:components], singular[:components] / math.sqrt(len(kept))
    return Digits(pixels[kept], labels[kept], *linear), Digits(pixels[rest], labels[rest], *linear)


class ConcatSquash(nn.Module):
    """FFJORD's linear layer, scaled and shifted by a context: here the time and the class."""

    def __init__(self, inputs: int, outputs: int, context: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(context, outputs)
        self.shift = nn.Linear(context, outputs, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.linear(x) * torch.sigmoid(self.gate(context)) + self.shift(context)


class Flow(nn.Module):
    """d/dt of (z, log-density gained); `begin` fixes what is constant during a solve."""

    def __init__(self, components: int = COMPONENTS, hidden: int = 192, layers: int = 2) -> None:
        super().__init__()
        widths = [components, *[hidden] * layers, components]
        self.layers = nn.ModuleList(ConcatSquash(*pair, 1 + CLASSES) for pair in itertools.pairwise(widths))
        nn.init.zeros_(self.layers[-1].linear.weight)  # training starts from a flow that moves nothing
        nn.init.zeros_(self.layers[-1].linear.bias)
        nn.init.zeros_(self.layers[-1].shift.weight)

    def begin(self, labels: Tensor, noise: Tensor | None = None) -> None:
        """Take the batch's labels, and the noise of shape (batch, components) that estimates the divergence."""
        self.classes = nn.functional.one_hot(labels, CLASSES)
        self.noise = noise

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt, shape (batch, components)."""
        context = torch.cat([t.to(z).expand(len(z), 1), self.classes.to(z)], dim=1)
        *hidden, last = self.layers
        for layer in hidden:
            z = torch.tanh(layer(z, context))
        return last(z, context)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        with torch.enable_grad():  # the divergence needs a graph even where the solver wants none
            z = z.requires_grad_(True)
            dz = self.velocity(t, z)
            (row,) = torch.autograd.grad(dz, z, self.noise, create_graph=True)
            divergence = (row * self.noise).sum(1)  # Hutchinson's estimate
        return dz, divergence


def rademacher_like(z: Tensor) -> Tensor:
    """Signs: the noise with which Hutchinson's estimate varies least."""
    return torch.randint_like(z, 2) * 2 - 1


def negative_log_likelihood(
    flow: Flow,
    z: Tensor,
    method: str,
    *,
    solve: Callable = odeint,
    tolerance: float = TOLERANCE,
    options: dict | None = OPTIONS,
) -> Tensor:
    """Mean over the batch, in nats per component, of components z; `flow.begin` comes first."""
    state = z, z.new_zeros(len(z))
    times = torch.tensor([0.0, 1.0]).to(z)
    z, gained = solve(flow, state, times, method=method, rtol=tolerance, atol=tolerance, options=options)
    log_density = gained[-1] - 0.5 * (z[-1].square() + math.log(2 * math.pi)).sum(1)
    return -log_density.mean() / z.shape[2]


def train(flow: Flow, digits: Digits, method: str, steps: int = STEPS, batch: int = BATCH) -> tuple[Flow, list[float]]:
    """Fit the flow; returns it with averaged weights, and the loss of every step."""
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.97))
    optimizer = torch.optim.AdamW(flow.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    progress = tqdm(range(steps), desc=f"training, {method}", unit="step")
    for _ in progress:
        z, labels = digits.sample_batch(batch)
        flow.begin(labels, rademacher_like(z))
        loss = negative_log_likelihood(flow, z, method)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(flow)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return average.module, losses


@torch.no_grad()
def evaluate(flow: Flow, digits: Digits, method: str) -> float:
    """Negative log-likelihood of all of the digits, in nats per component."""
    z = digits.components(digits.pixels)
    flow.begin(digits.labels, rademacher_like(z))
    return negative_log_likelihood(flow, z, method).item()


@torch.no_grad()
def sample(flow: Flow, labels: Tensor, method: str) -> Tensor:
    """Components of one new digit of each of these classes: the flow run backward in time."""
    z = torch.randn(len(labels), COMPONENTS)
    flow.begin(labels)
    times = torch.tensor([1.0, 0.0])
    return odeint(flow.velocity, z, times, method=method, rtol=TOLERANCE, atol=TOLERANCE)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dopri5", help="as for torchdiffeq.odeint (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = load()
    flow, _ = train(Flow(), training, arguments.method, arguments.steps)
    print(f"negative log-likelihood, nats per component: {evaluate(flow, training, arguments.method):.3f} training,")
    print(f"{evaluate(flow, held_out, arguments.method):.3f} held out; a sample of each class:")
    images = training.images(sample(flow, torch.arange(CLASSES), arguments.method))
    shades = " .:-=+*#%@"
    for row in images.round().long().transpose(0, 1):
        print("  ".join("".join(shades[pixel * (len(shades) - 1) // WHITE] * 2 for pixel in image) for image in row))


if __name__ == "__main__":
    main()
