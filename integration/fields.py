"""Vector fields, solves and comparisons for the tests of the real hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import strategies as st
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = tuple(name for name in ("euler", "midpoint", "heun2", "heun3", "rk4") if name in SOLVERS)  # 0.2.3 has no heun


def takes_complex_states() -> bool:
    """Whether this torchdiffeq does: 0.2.3 does not."""
    try:
        torchdiffeq.odeint(lambda t, y: y, torch.ones(1, dtype=torch.complex64), torch.tensor([0.0, 1.0]))
    except TypeError:
        return False
    return True


callbacks_and_limits = pytest.mark.skipif(
    not hasattr(torchdiffeq._impl.misc, "_null_callback"),
    reason="this torchdiffeq has neither callbacks nor limits of the step size",
)
"""For tests that need what torchdiffeq 0.2.3 does not have."""

complex_states = pytest.mark.skipif(not takes_complex_states(), reason="this torchdiffeq takes no complex states")


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


class Outcome:
    """A solve's values and the gradients of a random linear function of them.

    In the times too, if wanted: but where times need gradients, no graphs are kept.
    """

    def __init__(
        self,
        field: Any,
        y0: Tensor,
        t: Tensor,
        seed: int = 0,
        odeint: Callable[..., Any] = torchdiffeq.odeint,
        others: tuple[Tensor, ...] = (),
        of_times: bool = True,
        **keywords: Any,
    ) -> None:
        y0 = y0.detach().clone().requires_grad_()
        t = t.detach().clone().requires_grad_(of_times)
        y = odeint(field, y0, t, **keywords)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y)
        parameters = list(field.parameters()) if isinstance(field, nn.Module) else []
        self.names = ["y0", *(["t"] if of_times else [])] + [
            name for name, p in getattr(field, "named_parameters", list)() if p.requires_grad
        ]
        self.names += [f"other {i}" for i in range(len(others))]
        inputs = [y0, *([t] if of_times else []), *(p for p in parameters if p.requires_grad), *others]
        self.values = y.detach()
        loss = (y * weights).sum()
        loss = loss.real if loss.is_complex() else loss
        self.gradients = torch.autograd.grad(loss, inputs, allow_unused=True)


def error(actual: Tensor | None, expected: Tensor | None, scale: float) -> float:
    """Relative error of a gradient, against its own size or a hundredth of the whole gradient's, if that is larger."""
    actual = torch.zeros(()) if actual is None else actual
    expected = torch.zeros(()) if expected is None else expected
    difference = float((actual - expected).norm())
    return difference / max(float(expected.norm()), 0.01 * scale) if difference else 0.0


def errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative errors of the gradients by name."""
    scale = max(float(g.norm()) for g in expected.gradients if g is not None)
    pairs = zip(expected.names, actual.gradients, expected.gradients, strict=True)
    return {name: error(ours, theirs, scale) for name, ours, theirs in pairs}
