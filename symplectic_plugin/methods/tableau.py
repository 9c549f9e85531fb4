"""Butcher tableaux of Runge-Kutta methods, and the tableaux of their symplectic partners.

A Runge-Kutta step of size h from x_n at t_n, for dx/dt = f(t, x):

    X_i = x_n + h sum_j a_ij k_j,   k_i = f(t_n + c_i h, X_i),   x_{n+1} = x_n + h sum_i b_i k_i

     c | a
    ---+---
       | b
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12
"""Relative rounding error allowed in float64 coefficients: dopri8's rational ones match their row sums to 1e-15."""


@dataclass(frozen=True, eq=False)
class ButcherTableau:
    """Coefficients of a Runge-Kutta method with s stages, converted to float64 on the CPU.

    Args:
        a: coefficients of the slopes in the stages, shape (s, s).
        b: weights of the slopes in the solution, shape (s,).
        c: times of the stages in units of the step, shape (s,), equal to the row sums of `a`.
        rounding: largest difference between `c` and the row sums, relative to 1 plus the row's absolute sum; larger
            than the default for coefficients that a host keeps in single precision.

    Raises:
        ValueError: if the shapes do not fit together, an entry is not finite, or a row of `a` does not sum to `c`.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    rounding: float = ROUNDING

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            # A tableau made in inference mode, as on import, serves solves with gradients later.
            with torch.inference_mode(False):
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

    @functools.cached_property
    def stages(self) -> int:
        """Number of stages, s."""
        return self.b.numel()

    @functools.cached_property
    def numbers(self) -> tuple[list[list[float]], list[float]]:
        """Coefficients `a` and weights `b` as Python floats."""
        return self.a.tolist(), self.b.tolist()

    @property
    def explicit(self) -> bool:
        """Tell whether each stage depends only on the slopes of earlier stages."""
        return not bool(self.a.triu().any())

    @functools.cached_property
    def later(self) -> list[list[int]]:
        """List for each stage the later stages that depend on its slope."""
        a, s = self.numbers[0], self.stages
        return [[j for j in range(i + 1, s) if a[j][i] != 0] for i in range(s)]

    @functools.cached_property
    def first_same_as_last(self) -> bool:
        """Tell whether the last stage is the step's end (FSAL), so that its slope is the next step's first slope."""
        return bool((self.a[-1] == self.b).all()) and float(self.c[-1]) == 1.0

    def with_end_stage(self) -> ButcherTableau:
        """Return the tableau extended by a stage of weight zero at the step's end, (t_n + h, x_{n+1})."""
        s = self.stages
        a = torch.zeros(s + 1, s + 1, dtype=torch.float64)
        a[:s, :s], a[s, :s] = self.a, self.b
        one = torch.ones(1, dtype=torch.float64)
        return ButcherTableau(a, torch.cat([self.b, 0 * one]), torch.cat([self.c, one]), self.rounding)


@dataclass(frozen=True, eq=False)
class PartnerTableau:
    """Coefficients of a symplectic partner, which integrates the adjoint so that lambda^T delta is conserved.

    A step, with l_i = (df/dx)^T Lambda_i at (t_n + c_i h, X_i):

        Lambda_i = e_i lambda_n - h sum_j a_ij l_j,   lambda_{n+1} = lambda_n - h sum_i b_i l_i

    Args:
        a: coefficients of the adjoint slopes in the adjoint stages, shape (s, s).
        b: weights of the adjoint slopes, shape (s,): the forward method's weights, and 1 where those are zero.
        c: times of the stages, shape (s,): the forward method's.
        e: coefficients of lambda_n in the adjoint stages, shape (s,): 0 where the forward method's weight is zero,
            else 1.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor

    @functools.cached_property
    def stages(self) -> int:
        """Number of stages, s."""
        return self.b.numel()


def partner_tableau(tableau: ButcherTableau) -> PartnerTableau:
    """Derive the symplectic partner of a Runge-Kutta method, explicit or implicit.

    Where all weights are nonzero: B_i = b_i, C_i = c_i and b_i A_ij + B_j a_ji - b_i B_j = 0, so
    A_ij = b_j - b_j a_ji / b_i (Sanz-Serna, SIAM Review 58, 2016, eq. 3.6; Hairer, Lubich, Wanner, Geometric
    Numerical Integration, VI.4). A stage of weight zero acts on the solution through later stages alone, and so its
    adjoint stage is a sum over those (Matsubara, Miyatake, Yaguchi, NeurIPS 2021, eq. 7, with partner weight h; the
    partner weight 1 used here scales Lambda_i by h and makes one condition hold for all i and j).

    Args:
        tableau: coefficients of the forward method.

    Returns:
        Coefficients of the partner, with b_i A_ij + B_j a_ji - b_i B_j = 0 for all i, j.
    """
    b = tableau.b
    e = (b != 0).to(torch.float64)
    weights = torch.where(b != 0, b, torch.ones_like(b))
    a = e[:, None] * weights[None, :] - tableau.a.T * weights[None, :] / weights[:, None]
    return PartnerTableau(a, weights, tableau.c.clone(), e)
