"""Vector fields, initial states and times for the tests of the real hosts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn


def random(*shape: int, seed: int = 2) -> Tensor:
    """Return numbers from a normal distribution, in double precision; the same ones each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


T = torch.linspace(0, 1, 4, dtype=torch.float64)
"""Times of many tests, shape (4,)."""
Y0 = random(3, 2, seed=1)
"""Initial state of many tests: a batch of 3, of size 2."""


class MLP(nn.Module):
    """A network of state and time, with a frozen parameter and one that is not used."""

    def __init__(self, size: int, hidden: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5
            )

        self.w1, self.b1, self.wt = random(hidden, size), random(hidden), random(hidden)
        self.w2, self.b2 = random(size, hidden), random(size)
        self.frozen = random(size).requires_grad_(False)
        self.unused = random(3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(y @ self.w1.T + self.b1 + t * self.wt)
        return torch.cos(2 * t) * (hidden @ self.w2.T + self.b2) + self.frozen * y


def mlp(seed: int = 0, size: int = 2, hidden: int = 8) -> MLP:
    """Return a small network for states of a size."""
    return MLP(size, hidden, torch.Generator().manual_seed(seed))


class Rational(nn.Module):
    """A rational function of the state and of time, which grows no faster than linearly: solutions stay finite."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.linear, self.quadratic, self.constant, self.rate = random(size, size), random(size), random(size), random()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope = 0.3 * y @ self.linear + (0.05 * self.quadratic * y**2 - 0.02 * y**3) / (1 + 0.1 * y**2)
        return slope + self.constant * torch.sin(self.rate * t)


class StiffField(nn.Module):
    """A stiff linear part with rates up to `stiffness`, and a nonlinear one; both depend on time.

    It decays in the direction of time that `t`, if given, goes in.
    """

    def __init__(self, size: int, seed: int, stiffness: float = 100.0, t: Tensor | None = None) -> None:
        super().__init__()
        sign = -1 if t is not None and t[-1] < t[0] else 1
        random = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))

        rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
        rates = -(stiffness ** torch.linspace(0, 1, size, dtype=torch.float64))
        self.linear = nn.Parameter(sign * rotation * rates @ rotation.T)
        self.w1, self.wt, self.w2 = parameter(4, size), parameter(4), parameter(size, 4)
        self.w2.data *= 0.3

    def stiff(self, t: Tensor, x: Tensor) -> Tensor:
        return (x - torch.cos(3 * t)) @ self.linear.T + 0.1 * torch.sin(x) * t

    def nonstiff(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1.T + t * self.wt) @ self.w2.T

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.stiff(t, x) + self.nonstiff(t, x)


@st.composite
def problems(draw: st.DrawFn) -> tuple[nn.Module, Tensor, torch.Generator]:
    """A vector field, an initial state, and a source of more random numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(1, 4))
    batch = draw(st.sampled_from([(), (3,), (2, 2)]))
    hidden = draw(st.integers(1, 8))
    field = MLP(size, hidden, generator) if draw(st.booleans()) else Rational(size, generator)
    y0 = torch.randn(*batch, size, generator=generator, dtype=torch.float64)
    return field, y0, generator


@st.composite
def output_times(draw: st.DrawFn, duration: float) -> Tensor:
    """One to nine output times over the duration, evenly spaced or not, increasing or decreasing."""
    count = draw(st.integers(1, 9))
    gaps = draw(st.lists(st.floats(0.05, 1.0), min_size=count - 1, max_size=count - 1))
    t = torch.cat([torch.zeros(1, dtype=torch.float64), torch.tensor(gaps, dtype=torch.float64).cumsum(0)])
    t = draw(st.floats(-1.0, 1.0)) + t * (duration / t[-1] if count > 1 else 1.0)
    return t.flip(0) if draw(st.booleans()) else t
