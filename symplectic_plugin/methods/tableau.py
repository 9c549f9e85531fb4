"""Butcher tableaux: what they are, how one is read off a step function, and the symplectic partner of one.

A Runge-Kutta step of size h from x_n at t_n, for dx/dt = f(t, x):

    X_i = x_n + h sum_j a_ij k_j,   k_i = f(t_n + c_i h, X_i),   x_{n+1} = x_n + h sum_i b_i k_i

     c | a
    ---+---
       | b
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 1e-12
"""What float64 coefficients may be off by: dopri8's rational ones agree with their row sums to 1e-15."""

VectorFieldLike = Callable[..., Tensor]
StepFunction = Callable[[VectorFieldLike, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ButcherTableau:
    """The coefficients of a Runge-Kutta method with s stages.

    Args:
        a: coefficients of the slopes in the stages, shape (s, s).
        b: weights of the slopes in the solution, shape (s,).
        c: times of the stages in units of the step, shape (s,), equal to the row sums of `a`.
        rounding: how far the row sums may be off, relative to the row's entries; larger for coefficients that a host
            keeps in single precision.

    All are converted to float64 on the CPU.

    Raises:
        ValueError: if the shapes do not fit together, an entry is not finite, or a row of `a` does not sum to `c`.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    rounding: float = _ROUNDING

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach().clone()
            if not value.isfinite().all():
                raise ValueError(f"ButcherTableau: every entry of {name} must be finite, got {value.tolist()}")
            object.__setattr__(self, name, value)
        s = self.b.numel()
        if self.b.shape != (s,) or s == 0:
            raise ValueError(f"ButcherTableau: b must have shape (s,) with s >= 1, got {tuple(self.b.shape)}")
        if self.a.shape != (s, s) or self.c.shape != (s,):
            raise ValueError(
                f"ButcherTableau: with {s} weights in b, a must have shape ({s}, {s}) and c ({s},), "
                f"got {tuple(self.a.shape)} and {tuple(self.c.shape)}"
            )
        scale = 1 + self.a.abs().sum(1)
        off = (self.a.sum(1) - self.c).abs() > self.rounding * scale
        if off.any():
            i = int(off.nonzero()[0])
            raise ValueError(
                f"ButcherTableau: row {i} of a sums to {float(self.a[i].sum())}, but c[{i}] is {float(self.c[i])}"
            )

    @property
    def stages(self) -> int:
        """The number of stages, s."""
        return self.b.numel()

    @functools.cached_property
    def numbers(self) -> tuple[list[list[float]], list[float]]:
        """a and b as Python's numbers."""
        return self.a.tolist(), self.b.tolist()

    @property
    def explicit(self) -> bool:
        """Whether each stage needs only the slopes of the stages before it."""
        return not bool(self.a.triu().any())

    @functools.cached_property
    def later(self) -> list[list[int]]:
        """By stage, the later ones that are made of its slope."""
        a, s = self.numbers[0], self.stages
        return [[j for j in range(i + 1, s) if a[j][i] != 0] for i in range(s)]

    @functools.cached_property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the solution at the step's end, so that its slope is the next step's first."""
        return bool((self.a[-1] == self.b).all()) and float(self.c[-1]) == 1.0

    def with_end_stage(self) -> ButcherTableau:
        """The same method with one more stage, of weight zero, at the step's end: (t_n + h, x_{n+1})."""
        s = self.stages
        a = torch.zeros(s + 1, s + 1, dtype=torch.float64)
        a[:s, :s], a[s, :s] = self.a, self.b
        one = torch.ones(1, dtype=torch.float64)
        return ButcherTableau(a, torch.cat([self.b, 0 * one]), torch.cat([self.c, one]), self.rounding)


@dataclass(frozen=True, eq=False)
class PartnerTableau:
    """The symplectic partner: the method that integrates the adjoint so that lambda^T delta is conserved.

    With l_i = (df/dx)^T Lambda_i at (t_n + c_i h, X_i):

        Lambda_i = e_i lambda_n - h sum_j a_ij l_j,   lambda_{n+1} = lambda_n - h sum_i b_i l_i

    Args:
        a: coefficients of the adjoint slopes in the adjoint stages, shape (s, s).
        b: weights of the adjoint slopes, shape (s,): the method's own, and 1 where its own is zero.
        c: times of the stages, shape (s,): the method's own.
        e: what the adjoint stages take of the adjoint itself, shape (s,): 1, and 0 where the method's weight is zero.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor

    @property
    def stages(self) -> int:
        """The number of stages, s."""
        return self.b.numel()


def partner_tableau(tableau: ButcherTableau) -> PartnerTableau:
    """The symplectic partner of a Runge-Kutta method, explicit or implicit.

    Where all weights are nonzero: B_i = b_i, C_i = c_i and b_i A_ij + B_j a_ji - b_i B_j = 0, so
    A_ij = b_j - b_j a_ji / b_i (Sanz-Serna, SIAM Review 58, 2016, eq. 3.6; Hairer, Lubich, Wanner, Geometric
    Numerical Integration, VI.4). A stage of weight zero still acts on later stages; its adjoint stage is made of them
    alone (Matsubara, Miyatake, Yaguchi, NeurIPS 2021, eq. 7, where its weight is h; here it is 1, which scales that
    Lambda_i by h and lets the same condition hold for every i and j).

    Args:
        tableau: the method.

    Returns:
        The partner, with b_i A_ij + B_j a_ji - b_i B_j = 0 for all i, j.
    """
    b = tableau.b
    e = (b != 0).to(torch.float64)
    weights = torch.where(b != 0, b, torch.ones_like(b))
    a = e[:, None] * weights[None, :] - tableau.a.T * weights[None, :] / weights[:, None]
    return PartnerTableau(a, weights, tableau.c.clone(), e)


def read_tableau(step: StepFunction, rounding: float = _ROUNDING) -> ButcherTableau:
    """Read a method's tableau off one of its steps.

    The stages of a Runge-Kutta method are linear in the slopes. So one step of size 1 from 0, with an f that answers
    its i-th call with the i-th unit vector, shows a row of a as the argument of each call, c as its time, and b as the
    result.

    Args:
        step: `step(f, t, x, h)` returns the solution at t + h of dx/dt = f(t, x) from x at t. `t` and `h` are float64
            scalars, `x` is a float64 vector. `f(t, x, **anything)` may be called any number of times.
        rounding: the relative rounding error of the method's coefficients.

    Returns:
        The tableau, explicit by construction.

    Raises:
        ValueError: if the step is not an explicit Runge-Kutta step: it is not linear in the slopes, its coefficients
            change from call to call (a multistep method), or with h or the slopes (an iteration).
    """
    return probe(step, rounding)[0]


def read_rounded_tableau(step: StepFunction, stages: int, t: Tensor, h: Tensor, dtype: torch.dtype) -> ButcherTableau:
    """A method's tableau as one step of its rounds it, where the step mixes precisions.

    Args:
        step: as for `read_tableau`.
        stages: the method's number of stages.
        t: the time at the step's start.
        h: the step's size, in the dtype that the step is given.
        dtype: the state's, real.
    """
    unit = torch.eye(stages, dtype=dtype)
    x0 = torch.zeros(stages, dtype=dtype)
    x1, calls = _run(step, lambda i, x: unit[i].clone(), stages, x0, t, h)
    size = h.double().reshape(())
    a = torch.stack([x.double() for _, x, _ in calls]) / size
    c = (torch.stack([time for time, _, _ in calls]) - t.double().reshape(())) / size
    return ButcherTableau(a, x1.double() / size, c, rounding=float("inf"))


def probe(step: StepFunction, rounding: float = _ROUNDING) -> tuple[ButcherTableau, list[dict[str, Any]]]:
    """`read_tableau`, and the keyword arguments that the step hands to f at each stage."""
    stages = len(_run(step, lambda i, x: torch.zeros_like(x), 1)[1])
    _require(stages > 0, "does not evaluate f")
    unit = torch.eye(stages, dtype=torch.float64)

    def unit_slope(i: int, x: Tensor) -> Tensor:
        _require(i < stages, "evaluates f a different number of times from call to call")
        return unit[i].clone()

    b, calls = _run(step, unit_slope, stages)
    _require(len(calls) == stages, "evaluates f a different number of times from call to call")
    a = torch.stack([x for _, x, _ in calls])
    c = torch.stack([t for t, _, _ in calls])
    _require(not a.triu().any(), "has a stage that moves without a slope to move it")
    try:
        tableau = ButcherTableau(a, b, c, rounding)
    except ValueError as error:
        raise ValueError(f"read_tableau: not an explicit Runge-Kutta step: {error}") from None

    # Several steps in a row, from another point, with random slopes and another h: a multistep method changes its
    # coefficients once it has a history, an iteration to convergence depends on the slopes, a hypersolver on the point.
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        k = torch.randn(stages, 3, dtype=torch.float64, generator=generator)
        x0 = torch.randn(3, dtype=torch.float64, generator=generator)
        t0, h = torch.rand(2, dtype=torch.float64, generator=generator).unbind()

        def random_slope(i: int, x: Tensor, k: Tensor = k) -> Tensor:
            _require(i < stages, "evaluates f a different number of times from call to call")
            return k[i].clone()

        x1, calls = _run(step, random_slope, 3, x0, t0, h)
        _require(len(calls) == stages, "evaluates f a different number of times from call to call")
        expected = [x0 + h * (a[i] @ k) for i in range(stages)] + [x0 + h * (b @ k)]
        for actual, wanted in zip([x for _, x, _ in calls] + [x1], expected, strict=True):
            _require(
                bool(torch.allclose(actual, wanted, rtol=1e-10, atol=1e-10)),
                "is not one fixed linear map of the slopes",
            )
        times = torch.stack([t for t, _, _ in calls])
        _require(bool(torch.allclose(times, t0 + c * h, rtol=1e-10, atol=1e-10)), "has stage times that change")
    return tableau, [kwargs for _, _, kwargs in calls]


def _run(
    step: StepFunction,
    slope: Callable[[int, Tensor], Tensor],
    size: int,
    x0: Tensor | None = None,
    t0: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, dict[str, Any]]]]:
    """One step with made-up slopes: its result, and each call's time, argument and keyword arguments."""
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def f(t: Tensor, x: Tensor, **kwargs: Any) -> Tensor:
        calls.append((torch.as_tensor(t, dtype=torch.float64).detach().reshape(()), x.detach().clone(), kwargs))
        return slope(len(calls) - 1, x)

    x0 = torch.zeros(size, dtype=torch.float64) if x0 is None else x0
    t0 = torch.zeros((), dtype=torch.float64) if t0 is None else t0
    h = torch.ones((), dtype=torch.float64) if h is None else h
    with torch.no_grad():
        x1 = step(f, t0, x0, h)
    return x1.detach(), calls


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"read_tableau: not an explicit Runge-Kutta step: it {what}")
