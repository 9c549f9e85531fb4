"""FFJORD for vectors (Grathwohl et al., ICLR 2019), as its official program and the paper have it."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.experiments.measure import VectorField
from benchmarks.experiments.methods import Solve


class ConcatSquash(nn.Module):
    """A linear layer that time scales and shifts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.view(1, 1)
        return self.linear(x) * torch.sigmoid(self.gate(t)) + self.shift(t)


class FlowField(VectorField, ABC):
    """d/dt of (z, log-density lost); `noise`, fixed during a solve, estimates the divergence (Hutchinson)."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: Tensor | None = None
        # FFJORD trains the time a component takes. Here it is a factor of the velocity, which is the same.
        self.duration = nn.Parameter(torch.ones(()))

    @abstractmethod
    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt."""

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z, _ = state
        with torch.enable_grad():  # the divergence needs a graph even where the solver wants none
            z = z.requires_grad_(True)
            dz = self.duration * self.velocity(t * self.duration, z)
            (row,) = torch.autograd.grad(dz, z, self.noise, create_graph=True)
            divergence = (row * self.noise).flatten(1).sum(1)
        return dz, -divergence

    def drift(self) -> VectorField:
        """z alone, for sampling."""
        return _Drift(self)


class _Drift(VectorField):
    def __init__(self, field: FlowField) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field.duration * self.field.velocity(t * self.field.duration, z)


class DenseField(FlowField):
    """ConcatSquash layers."""

    def __init__(self, size: int, hidden: int, layers: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        widths = [size, *[hidden] * layers, size]
        self.layers = nn.ModuleList(ConcatSquash(*pair) for pair in itertools.pairwise(widths))
        self.activation = activation

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            z = self.activation(layer(t, z))
        return last(t, z)


def transport(field: FlowField, z: Tensor, lost: Tensor, noise: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
    """z and the log-density lost after one component."""
    field.noise = noise
    times = torch.tensor([0.0, 1.0], dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
    z, lost = solve(field, (z, lost), times)
    return z[-1], lost[-1]


def normal_log_density(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


class Flow(nn.Module):
    """Components one after another that carry data to a standard normal distribution."""

    def __init__(
        self, size: int, hidden: int, layers: int, components: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.components = nn.ModuleList(DenseField(size, hidden, layers, activation) for _ in range(components))

    def draw_noise(self, x: Tensor) -> Tensor:
        """For all components, normal as FFJORD's default is for vectors."""
        return torch.randn(len(self.components), *x.shape, dtype=x.dtype, device=x.device)

    def negative_log_likelihood(self, x: Tensor, noise: Tensor, solve: Solve) -> Tensor:
        """Mean over the batch, in nats, with x in the precision of the parameters."""
        dtype = next(self.parameters()).dtype
        z, noise = x.to(dtype), noise.to(dtype)
        lost = torch.zeros_like(z[:, 0])
        for field, each in zip(self.components, noise, strict=True):
            z, lost = transport(field, z, lost, each, solve)
        return (lost - normal_log_density(z)).mean()
