"""Newton's method for the stages of an implicit step, one system for each batch element.

The unknowns are the increments Z_i = X_i - E_i of stages whose known parts E_i = x_n + h sum_j a_ij k_j come from
slopes that are known (Hairer, Wanner, Solving ODEs II, IV.8):

    Z_i = h sum_j a_ij f(t_n + c_j h, E_j + Z_j)        (i, j over the s stages that are solved for together)

A solution is right to rounding, whatever the tolerances: the adjoint is that of the equations, so what they are off by
the gradient is off by. The tolerances decide what counts as a solution where rounding leaves no better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .linear import Factors, gmres
from .stage_field import GraphOf, Layout, Pushforward, StageField, jacobian

_KEPT_RATE = 0.1
"""A Jacobian from a step before serves as long as each iteration with it leaves at most this part of the error."""
_SLOW_RATE = 0.5
"""An iteration that leaves more than this is given up for one with a new Jacobian."""
_NEWTONS_ITERATIONS = 8
"""Corrections by which Newton's method, whose error is squared by each, is done from nearly anywhere."""
_LEAST_PART = 1e-2
"""Of a correction that leaves hardly a smaller residual, the least part that is tried in its place."""
_ROUNDING = 64.0
"""Corrections that no longer shrink are rounding if they are smaller than this many units in the last place."""
_MOST_ROUNDING = 1e4
_ACCEPTED = 1e-3
"""Where nothing better can be tried, this many units will do, if they are no larger part of the error that the
tolerances allow in a step: an ill-conditioned matrix magnifies rounding."""


@dataclass(frozen=True)
class NewtonOptions:
    """How the nonlinear systems are solved.

    Args:
        linear_solver: "dense" for Jacobians and LU factors, "gmres" for Jacobian-vector products alone, "auto" to
            choose by size.
        dense_limit: the largest number of unknowns in a batch element for which "auto" is "dense".
        max_iterations: of Newton's method with a new Jacobian in each.
        newton_tol: the error that is left in the stages, as a part of what the tolerances allow in a step; None for
            as little as rounding allows, which exact gradients need.
        krylov_dimension: of GMRES, until it restarts.
        check_jacobian: whether f's derivative is compared with a difference quotient, once in a solve.

    Raises:
        ValueError: if an option is not one of these or out of range.
    """

    linear_solver: str = "auto"
    dense_limit: int = 64
    max_iterations: int = 20
    newton_tol: float | None = None
    krylov_dimension: int = 60
    check_jacobian: bool = True

    def __post_init__(self) -> None:
        if self.linear_solver not in ("auto", "dense", "gmres"):
            raise ValueError(f'linear_solver must be "auto", "dense" or "gmres", got {self.linear_solver!r}')
        if self.max_iterations < 2 or self.krylov_dimension < 1:
            raise ValueError("max_iterations must be at least 2 and krylov_dimension at least 1")
        if self.newton_tol is not None and not 0 < self.newton_tol < 1:
            raise ValueError(f"newton_tol must be between 0 and 1, got {self.newton_tol}")

    def dense(self, unknowns: int) -> bool:
        """Whether systems of this many unknowns are solved by LU."""
        return self.linear_solver == "dense" or (self.linear_solver == "auto" and unknowns <= self.dense_limit)


OPTIONS = frozenset(field.name for field in fields(NewtonOptions))
"""Their names."""


def tolerance_weights(layout: Layout, rtol: Any, atol: Any, state: Tensor) -> Tensor:
    """The error that tolerances, numbers or tensors, allow in each component in a step from a state, shape (B, n)."""
    size = state.abs()
    weights = (atol + rtol * size).to(size).expand(size.shape)
    flat = layout.flat(torch.complex(weights, weights) if state.is_complex() else weights)
    # Zero tolerances leave rounding.
    return flat.clamp_min(torch.finfo(flat.dtype).tiny ** 0.5)


@dataclass(frozen=True)
class StageSystem:
    """The equations of the stages that are solved for together.

    Args:
        fields: f at each, s of them.
        base: E, shape (B, s, n).
        a: h a_ij, shape (s, s), in the state's precision.
    """

    fields: Sequence[StageField]
    base: Tensor
    a: Tensor

    def residual(self, z: Tensor) -> Tensor:
        """Z - h sum_j a_ij f(E_j + Z_j), shape (B, s, n)."""
        slopes = torch.stack([f.value(x) for f, x in zip(self.fields, (self.base + z).unbind(1), strict=True)], 1)
        return z - torch.einsum("ij,bjn->bin", self.a, slopes)


@dataclass(frozen=True)
class StageSolution:
    """What Newton's method arrived at.

    Args:
        z: the increments, shape (B, s, n).
        failed: which batch elements have no solution, shape (B,).
        reason: why, if any has none.
        iterations: how many there were.
    """

    z: Tensor
    failed: Tensor
    reason: str
    iterations: int


@dataclass
class NewtonCounts:
    """What solving has cost so far: evaluations of f without those of Jacobians, Jacobians, LU factorisations."""

    evaluations: int = 0
    jacobians: int = 0
    factorisations: int = 0
    products: int = 0


class Newton:
    """Solves the stages of one step after another, and keeps the Jacobian and its LU factors as long as they serve.

    Args:
        options: how.
        damping: whether to try parts of corrections where nothing else leads to a solution.

    Attributes:
        counts: what it has cost.
    """

    def __init__(self, options: NewtonOptions, damping: bool = True) -> None:
        self.options = options
        self._damping = damping
        self.counts = NewtonCounts()
        self._jacobian: Tensor | None = None
        self._factors: Factors | None = None
        self._factored: tuple[float, ...] = ()
        self._serves = False
        self._checked = False

    def forget(self) -> None:
        """Take a new Jacobian at the next chance."""
        self._serves = False

    def solve(self, system: StageSystem, guess: Tensor, weights: Tensor) -> StageSolution:
        """Solve the stages' equations.

        Args:
            system: the equations.
            guess: of the increments, shape (B, s, n).
            weights: the error that the tolerances allow in each component in a step, shape (B, n).

        Returns:
            The solution; where `failed`, what was arrived at.

        Raises:
            RuntimeError: if f's derivative, as autograd has it, is not that of f, or batch elements depend on one
                another.
        """
        if guess.numel() == 0:
            return StageSolution(guess, guess.new_zeros(len(guess), dtype=torch.bool), "", 0)
        if not self._checked:
            self._checked = True
            self._check(system, guess)
        s, n = guess.shape[1:]
        run = _Iteration(self, system, guess, weights)
        dense = self.options.dense(s * n)
        kept = self._jacobian
        if dense and self._serves and kept is not None and kept.shape[:2] == guess.shape[::2]:
            run(self._kept_factors(system).solve, 10)
            self._serves = run.rate <= _KEPT_RATE and not bool(run.open.any())
        if dense and bool(run.open.any()):
            run(self._new_factors(system, guess).solve, 10)
            self._serves = run.rate <= _KEPT_RATE
        reason = ""
        if bool(run.open.any()):
            self._serves = False
            self._jacobian = self._factors = None
            correct = self._newton(system) if dense else self._krylov(system)
            run(correct, self.options.max_iterations, last=True)
            if self._damping and bool(run.open.any()):
                run(correct, 2 * self.options.max_iterations, last=True, damped=True)
        if bool(run.open.any()):
            reason = run.reason()
        if reason or run.slow:
            self._check(system, guess)  # not for the first time, but f may depend on time
        return StageSolution(run.z, run.open, reason, run.iterations)

    def _check(self, system: StageSystem, guess: Tensor) -> None:
        if self.options.check_jacobian:
            for i in {0, len(system.fields) - 1}:
                check_derivative(system.fields[i], system.base[:, i] + guess[:, i])

    def _kept_factors(self, system: StageSystem) -> Factors:
        key = tuple(system.a.flatten().tolist())
        if self._factors is None or key != self._factored:
            assert self._jacobian is not None
            self._factors, self._factored = Factors(system.a, self._jacobian), key
            self.counts.factorisations += 1
        return self._factors

    def _new_factors(self, system: StageSystem, guess: Tensor) -> Factors:
        self._jacobian = self._factors = None  # freed before there are others
        self._jacobian = self._jacobian_at(system.fields[0], system.base[:, 0] + guess[:, 0])
        return self._kept_factors(system)

    def _jacobian_at(self, field: StageField, x: Tensor) -> Tensor:
        self.counts.jacobians += 1
        return jacobian(GraphOf(field.graph, x))

    def _newton(self, system: StageSystem) -> Callable[[Tensor, Tensor], Tensor]:
        """Corrections with the Jacobians at the iterate."""

        def correct(residual: Tensor, z: Tensor) -> Tensor:
            states = (system.base + z).unbind(1)
            blocks = torch.stack([self._jacobian_at(f, x) for f, x in zip(system.fields, states, strict=True)])
            self.counts.factorisations += 1
            return Factors(system.a, blocks).solve(residual)

        return correct

    def _krylov(self, system: StageSystem) -> Callable[[Tensor, Tensor], Tensor]:
        """The same without a matrix."""

        def correct(residual: Tensor, z: Tensor) -> Tensor:
            pushes = [Pushforward(f, x) for f, x in zip(system.fields, (system.base + z).unbind(1), strict=True)]

            def operator(v: Tensor) -> Tensor:
                parts = v.view_as(z).unbind(1)
                pushed = torch.stack([push(part) for push, part in zip(pushes, parts, strict=True)], 1)
                return v - torch.einsum("ij,bjn->bin", system.a, pushed).flatten(1)

            result = gmres(operator, residual, 1e-4, dimension=self.options.krylov_dimension)
            self.counts.products += result.products
            # Less accurate is slower, not wrong: convergence is judged by the corrections and the residual.
            useful = result.converged | (result.x != 0).any(-1)
            return torch.where(useful[:, None], result.x, float("nan"))

        return correct


class _Iteration:
    """Corrections of an iterate until each batch element's is right, with one way of making them after another."""

    def __init__(self, newton: Newton, system: StageSystem, guess: Tensor, weights: Tensor) -> None:
        self.newton = newton
        self.system = system
        self.guess = guess
        self.weights = weights[:, None]
        self.z = guess.clone()
        self.open = torch.ones(len(guess), dtype=torch.bool, device=guess.device)
        self.rate = 0.0
        self.slow = False
        """Whether Newton's own iteration took more corrections than it should: for another matrix than f's."""
        self.iterations = 0
        self._size = torch.zeros(len(guess), dtype=guess.dtype, device=guess.device)

    def __call__(self, correct: Callable[..., Tensor], limit: int, last: bool = False, damped: bool = False) -> None:
        """Iterate on the elements that are open.

        Args:
            correct: the correction for a residual, shape (B, s n), at an iterate if `last`.
            limit: the number of iterations.
            last: whether nothing better will be tried: then the tolerances decide.
            damped: whether parts of corrections are tried: what a stiff system's residual would too often ask for.
        """
        system, open_, options = self.system, self.open, self.newton.options
        z = torch.where(open_[:, None, None], self.guess, self.z)
        size = previous = before = torch.full_like(self._size, float("inf"))
        part, floor, origin, step = torch.ones_like(self._size), torch.zeros_like(self._size), z, z
        given_up = torch.zeros_like(open_)
        self.rate = 0.0
        eps = torch.finfo(z.dtype).eps
        for k in range(limit):
            residual = system.residual(z)
            self.newton.counts.evaluations += len(system.fields)
            self.iterations += 1
            if damped:
                norm = _norm(residual / self.weights)
                # Armijo's condition for the residual's norm.
                worse = self.open & ~(norm <= (1 - 0.25 * part) * before) & (size > _ROUNDING * floor)
                if bool((worse := worse & (part > _LEAST_PART)).any()):
                    part = torch.where(worse, 0.5 * part, part)
                    z = torch.where(worse[:, None, None], origin - part[:, None, None] * step, z)
                    continue
                before, part, origin = norm, torch.ones_like(norm), z
            flat = residual.flatten(1)
            step = (correct(flat, z) if last else correct(flat)).view_as(z)
            z = torch.where(self.open[:, None, None], z - step, z)
            size = _norm(step / self.weights)
            floor = eps * _norm((system.base + z) / self.weights)
            if options.newton_tol is not None:
                floor = floor.clamp_min(options.newton_tol)
            rate = size / previous
            if k == 0:
                rate = torch.where(size <= floor, 0.0, 1.0)
                left = size
            else:
                left = torch.where(rate < 1, size * rate / (1 - rate), float("inf"))
            right = (left <= floor) | (size <= floor)
            if k > 0:
                slow = rate > _SLOW_RATE
                right |= slow & (size <= _ROUNDING * floor)
                if last:
                    least = (_MOST_ROUNDING * floor).clamp_max(_ACCEPTED)
                    right |= slow & (size <= least) & (previous <= least)
                else:
                    # As it goes, it would not get there (Hairer, Wanner, IV.8).
                    hopeless = size * rate ** (limit - 1 - k) > _ROUNDING * floor
                    given_up |= self.open & (slow | hopeless) & ~right
                worst = torch.where(self.open & ~(size <= _ROUNDING * floor), rate, 0.0)
                self.rate = max(self.rate, float(worst.nan_to_num(nan=math.inf).max()))
            given_up |= self.open & ~size.isfinite()
            self.z = torch.where((self.open & right & ~given_up)[:, None, None], z, self.z)
            self._size = torch.where(self.open, size, self._size)
            self.open = self.open & ~(right & ~given_up)
            previous = size
            if not bool((self.open & ~given_up).any()):
                break
        if last:
            self.z = torch.where(self.open[:, None, None], z, self.z)
            self.slow = k > _NEWTONS_ITERATIONS

    def reason(self) -> str:
        """Why elements are still open."""
        if not bool(self._size[self.open].isfinite().all()):
            return "its matrix is singular, or f not finite"
        worst = float(self._size[self.open].max())
        return f"its last correction was {worst:.0e} of the error that the tolerances allow"


def check_derivative(field: StageField, x: Tensor) -> None:
    """Compare f's derivative, as autograd has it, with a difference quotient: both along and across random directions.

    Args:
        field: f.
        x: where, shape (B, n).

    Raises:
        RuntimeError: if they differ, or the slope of one batch element depends on another one's state.
    """
    generator = torch.Generator().manual_seed(0)
    there = field.value(x)
    if not bool(there.isfinite().all()):
        return  # the iteration will say so
    eps = torch.finfo(x.dtype).eps
    if bool((_row_norm(field.value(x) - there) > eps**0.5 * _row_norm(there)).any()):
        raise RuntimeError(
            "the vector field returns another value each time that it is evaluated at one point, so an implicit "
            "method's equations have no solution: it draws random numbers (dropout in training mode) or changes itself."
        )
    linearized = GraphOf(field.graph, x)
    across = _random_signs(x, generator) * (0.5 + torch.rand(x.shape, generator=generator).to(x))
    if len(x) > 1:
        _check_independence(linearized, across)
    size = x.abs().amax(-1, keepdim=True)
    along = _random_signs(x, generator) * (x.abs() + 1e-3 * torch.where(size > 0, size, 1))
    pulled = (linearized.pull(across) * along).sum(-1)
    offs, quotients = [], []
    for step in (eps ** (1 / 3), eps**0.5):
        ahead, behind = field.value(x + step * along), field.value(x - step * along)
        noise = 8 * eps * torch.maximum(ahead.abs(), behind.abs()).amax(-1) * across.abs().sum(-1) / step
        quotients.append((ahead - behind) / (2 * step))
        offs.append(((quotients[-1] * across).sum(-1) - pulled).abs() - noise)
    # A kink or many oscillations in between make one of them wrong, rarely both by as much; a part of f that autograd
    # does not see, both.
    off = torch.minimum(*offs)
    apart = ((quotients[0] - quotients[1]) * across).sum(-1).abs()
    scale = torch.maximum(pulled.abs(), _row_norm(quotients[0]))
    moved = (quotients[0] * across).sum(-1)
    wrong = (off > 1e-2 * scale) & (apart < 0.5 * off) & off.isfinite()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            "an implicit method needs the derivative of the vector field, and the one that autograd has is not the "
            f"field's: in random directions the field changes by {float(moved[row]):.3g}, its "
            f"derivative says {float(pulled[row]):.3g}. It detaches what it computes from the state, or converts it to "
            'integers or numpy. If the difference is meant: options={"check_jacobian": False}.'
        )


def _check_independence(linearized: GraphOf, across: Tensor) -> None:
    """Pull back a cotangent of every other row's slope: the states of the other rows must not notice."""
    every_other = across.clone()
    every_other[::2] = 0
    if bool(linearized.pull(every_other)[::2].any()):
        raise RuntimeError(
            "the slopes of some batch elements depend on the states of others, as with batch norm in training mode or "
            "attention over the batch, but an implicit method solves for each element of the leading dimension by "
            'itself. If they are meant to: options={"independent_batch": False}.'
        )


def _random_signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1


def _norm(z: Tensor) -> Tensor:
    """Root mean square over all but the batch, shape (B,)."""
    return z.flatten(1).square().mean(-1).sqrt()


def _row_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)
