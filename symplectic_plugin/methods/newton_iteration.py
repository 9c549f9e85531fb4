"""Newton iterations for the stages of an implicit step, with one system of equations for each batch element.

The unknowns are the increments Z_i = X_i - E_i of the stages over their known parts E_i = x_n + h sum_j a_ij k_j, a
sum over the slopes that are known already (Hairer, Wanner, Solving ODEs II, IV.8):

    Z_i = h sum_j a_ij f(t_n + c_j h, E_j + Z_j)        (i, j over the s stages that are solved for together)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .stage_field import StageField

_SLOW_RATE = 0.5
"""Ratio of successive corrections above which an iteration no longer converges."""
_NEWTONS_ITERATIONS = 8
"""Corrections that suffice Newton's method from nearly any guess, as each squares the error."""
_LEAST_PART = 1e-2
"""Smallest part of a correction that damping tries."""
_ROUNDING = 64.0
"""Units in the last place below which corrections that no longer shrink are rounding errors."""
_MOST_ROUNDING = 1e4
"""Units in the last place that are accepted where no further correction is tried: an ill-conditioned matrix magnifies
rounding."""
_ACCEPTED = 1e-3
"""Largest correction accepted by `_MOST_ROUNDING`, as a part of the error that the tolerances allow in a step."""

Correct = Callable[[Tensor, Tensor], Tensor]
"""Function from a residual, shape (B, s n), and the increments, shape (B, s, n), to the correction, shape (B, s n)."""


@dataclass(frozen=True)
class StageSystem:
    """Equations of the stages that are solved for together.

    Args:
        fields: vector field at each of the s stages.
        base: known parts E, shape (B, s, n).
        a: coefficients h a_ij, shape (s, s), in the state's precision.
    """

    fields: Sequence[StageField]
    base: Tensor
    a: Tensor

    def residual(self, z: Tensor) -> Tensor:
        """Compute Z - h sum_j a_ij f(E_j + Z_j), shape (B, s, n)."""
        slopes = torch.stack([f.value(x) for f, x in zip(self.fields, (self.base + z).unbind(1), strict=True)], 1)
        return z - torch.einsum("ij,bjn->bin", self.a, slopes)


class StageIteration:
    """Newton iteration for one stage system, in one or more passes that each start from the guess.

    A batch element is closed as soon as its increments are solved for, and later passes leave them unchanged. All
    errors are measured as parts of the error that the tolerances allow in a step.

    Args:
        system: equations.
        guess: increments to start from, shape (B, s, n).
        weights: error that the tolerances allow in each component in a step, shape (B, n).
        tolerance: error to be left in the increments; None for as little as rounding allows.

    Attributes:
        z: increments, shape (B, s, n): the solution where an element is closed.
        open: batch elements that are not solved yet, shape (B,).
        rate: largest ratio of successive corrections in the last pass, while they were larger than rounding.
        slow: whether a final pass took more corrections than Newton's method needs, so that the matrix is probably
            not the derivative of f.
        residuals: number of residuals computed.
    """

    def __init__(self, system: StageSystem, guess: Tensor, weights: Tensor, tolerance: float | None = None) -> None:
        self._system = system
        self._guess = guess
        self._weights = weights[:, None]
        self._tolerance = tolerance
        self._size = guess.new_zeros(len(guess))
        self.z = guess.clone()
        self.open = torch.ones(len(guess), dtype=torch.bool, device=guess.device)
        self.rate = 0.0
        self.slow = False
        self.residuals = 0

    @property
    def solved(self) -> bool:
        """Tell whether every batch element is closed."""
        return not bool(self.open.any())

    def run(self, correct: Correct, limit: int, *, final: bool = False, damped: bool = False) -> None:
        """Iterate on the open batch elements, from their guesses.

        Args:
            correct: computes corrections.
            limit: number of iterations, at least 2.
            final: whether no better way of correcting will follow. If so, elements are not given up before the limit,
                and the tolerances decide where rounding leaves no solution.
            damped: whether parts of corrections are tried. A stiff system's residual often grows at first, and damping
                would then only slow the iteration down.
        """
        z = torch.where(_by_element(self.open), self._guess, self.z)
        size = torch.full_like(self._size, math.inf)
        floor, given_up, rates = torch.zeros_like(size), torch.zeros_like(self.open), torch.zeros_like(size)
        damping = _Damping(z, self._weights) if damped else None
        for k in range(limit):
            residual = self._system.residual(z)
            self.residuals += 1
            active = self.open & (size > _ROUNDING * floor)
            if damping is not None and (shortened := damping.shortened(residual, z, active)) is not None:
                z = shortened
                continue
            step = correct(residual.flatten(1), z).view_as(z)
            if damping is not None:
                damping.begin(z, step)
            z = torch.where(_by_element(self.open), z - step, z)
            previous, size = size, _norm(step / self._weights)
            floor = self._floor(z)
            correction = _Correction(size, previous, floor)
            right = correction.solves(final=final)
            if not final:
                given_up |= self.open & correction.hopeless(limit - 1 - k) & ~right
            given_up |= self.open & ~size.isfinite()
            rates = torch.maximum(rates, torch.where(self.open, correction.rate_above_rounding(), 0.0))
            self._close(right & ~given_up, z, size)
            if not bool((self.open & ~given_up).any()):
                break
        self.rate = float(rates.max())
        if final:
            self.z = torch.where(_by_element(self.open), z, self.z)
            self.slow = k > _NEWTONS_ITERATIONS

    def reason(self) -> str:
        """Say why the open batch elements are not solved."""
        sizes = self._size[self.open]
        if not bool(sizes.isfinite().all()):
            return "its matrix is singular, or f not finite"
        return f"its last correction was {float(sizes.max()):.0e} of the error that the tolerances allow"

    def _floor(self, z: Tensor) -> Tensor:
        """Compute the size of corrections that are not worth making, shape (B,)."""
        floor = torch.finfo(z.dtype).eps * _norm((self._system.base + z) / self._weights)
        return floor if self._tolerance is None else floor.clamp_min(self._tolerance)

    def _close(self, elements: Tensor, z: Tensor, size: Tensor) -> None:
        """Close those of the batch elements that are open, with their increments."""
        self.z = torch.where(_by_element(self.open & elements), z, self.z)
        self._size = torch.where(self.open, size, self._size)
        self.open = self.open & ~elements


@dataclass(frozen=True)
class _Correction:
    """Sizes of a correction, of the correction before (infinite if none) and of rounding, shapes (B,)."""

    size: Tensor
    previous: Tensor
    floor: Tensor

    @property
    def rate(self) -> Tensor:
        """Ratio to the correction before, an estimate of the contraction; 0 for a first correction."""
        return torch.where(self.previous.isinf(), 0.0, self.size / self.previous)

    def solves(self, *, final: bool) -> Tensor:
        """Tell which batch elements are solved by the correction (Hairer, Wanner, IV.8), shape (B,)."""
        size, rate, floor = self.size, self.rate, self.floor
        converges = (rate < 1) & ~self.previous.isinf()
        left = torch.where(converges, size * rate / (1 - rate), math.inf)
        slow = rate > _SLOW_RATE
        solved = (left <= floor) | (size <= floor) | slow & (size <= _ROUNDING * floor)
        if final:
            least = (_MOST_ROUNDING * floor).clamp_max(_ACCEPTED)
            solved |= slow & (size <= least) & (self.previous <= least)
        return solved

    def hopeless(self, further: int) -> Tensor:
        """Tell which batch elements will not be solved by further corrections at the present rate, shape (B,)."""
        return (self.rate > _SLOW_RATE) | (self.size * self.rate**further > _ROUNDING * self.floor)

    def rate_above_rounding(self) -> Tensor:
        """Ratio to the correction before, 0 where the correction is rounding and infinite where it is not a number."""
        return torch.where(self.size <= _ROUNDING * self.floor, 0.0, self.rate).nan_to_num(nan=math.inf)


class _Damping:
    """Line search along corrections, by Armijo's condition for the norm of the residual.

    Args:
        z: increments to start from, shape (B, s, n).
        weights: error that the tolerances allow, shape (B, 1, n).
    """

    def __init__(self, z: Tensor, weights: Tensor) -> None:
        self._weights = weights
        self._origin, self._step = z, z
        self._part = z.new_ones(len(z))
        self._before = torch.full_like(self._part, math.inf)

    def shortened(self, residual: Tensor, z: Tensor, active: Tensor) -> Tensor | None:
        """Halve the part of the last correction in those active batch elements whose residual shrank too little.

        Args:
            residual: residual at z, shape (B, s, n).
            z: increments, shape (B, s, n).
            active: batch elements to look at, shape (B,).

        Returns:
            The increments to try instead of z; None if all of z is accepted.
        """
        norm = _norm(residual / self._weights)
        worse = active & ~(norm <= (1 - 0.25 * self._part) * self._before) & (self._part > _LEAST_PART)
        if not bool(worse.any()):
            self._before, self._part = norm, torch.ones_like(norm)
            return None
        self._part = torch.where(worse, 0.5 * self._part, self._part)
        return torch.where(_by_element(worse), self._origin - _by_element(self._part) * self._step, z)

    def begin(self, z: Tensor, step: Tensor) -> None:
        """Begin a search along the correction `step` from z, shapes (B, s, n)."""
        self._origin, self._step = z, step


def _by_element(x: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1)."""
    return x[:, None, None]


def _norm(z: Tensor) -> Tensor:
    """Root mean square over all dimensions but the batch, shape (B,)."""
    return z.flatten(1).square().mean(-1).sqrt()
