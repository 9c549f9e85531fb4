"""Newton's method for the stages of an implicit method's steps, with Jacobians that are kept from step to step.

Solutions are exact to rounding, whatever the tolerances: the adjoint is that of the equations, so an error left in the
stages is an error of the gradient. The tolerances decide what is a solution where rounding leaves no better one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .check_derivative import check_derivative
from .linear import Factors, gmres
from .newton_iteration import StageIteration, StageSystem
from .stage_field import GraphOf, Layout, Pushforward, StageField, jacobian

_KEPT_RATE = 0.1
"""Ratio of successive corrections up to which a Jacobian is kept for the next step."""
_SIMPLIFIED_ITERATIONS = 10
"""Iterations with one Jacobian for all stages before Newton's method takes a Jacobian at each iterate."""


@dataclass(frozen=True)
class NewtonOptions:
    """Options of the nonlinear and linear solvers.

    Args:
        linear_solver: "dense" for Jacobians and LU factors, "gmres" for Jacobian-vector products alone, "auto" to
            choose by size.
        dense_limit: largest number of unknowns in a batch element for which "auto" is "dense".
        max_iterations: iterations of Newton's method with a Jacobian in each.
        newton_tol: error left in the stages, as a part of the error that the tolerances allow in a step; None for as
            little as rounding allows, which exact gradients need.
        krylov_dimension: vectors of GMRES before a restart.
        check_jacobian: whether f's derivative is compared with a difference quotient, once in a solve.

    Raises:
        ValueError: if an option has none of these values or is out of range.
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
        """Tell whether systems of this many unknowns are solved by LU factors."""
        return self.linear_solver == "dense" or (self.linear_solver == "auto" and unknowns <= self.dense_limit)


OPTIONS = frozenset(field.name for field in fields(NewtonOptions))
"""Names of the fields of `NewtonOptions`."""


def tolerance_weights(layout: Layout, rtol: Any, atol: Any, state: Tensor) -> Tensor:
    """Compute the error that the tolerances allow in each component in a step from a state.

    Args:
        layout: layout of the state.
        rtol: relative tolerance, a number or a tensor.
        atol: absolute tolerance, a number or a tensor.
        state: state at the step's start, as the host has it.

    Returns:
        A tensor of shape (B, n), real and positive.
    """
    size = state.abs()
    weights = (atol + rtol * size).to(size).expand(size.shape)
    flat = layout.flat(torch.complex(weights, weights) if state.is_complex() else weights)
    # Zero tolerances would divide by zero.
    return flat.clamp_min(torch.finfo(flat.dtype).tiny ** 0.5)


@dataclass(frozen=True)
class StageSolution:
    """Result of Newton's method.

    Args:
        z: increments of the stages, shape (B, s, n); the last iterate where an element failed.
        failed: batch elements without a solution, shape (B,).
        reason: why they failed; empty if none did.
        iterations: number of iterations.
    """

    z: Tensor
    failed: Tensor
    reason: str
    iterations: int


@dataclass
class NewtonCounts:
    """Cost of the solves so far: evaluations of f beside those of Jacobians, Jacobians, LU factorisations, products."""

    evaluations: int = 0
    jacobians: int = 0
    factorisations: int = 0
    products: int = 0


class Newton:
    """Solver for the stages of one step after another, which keeps a Jacobian and its LU factors as long as they serve.

    Args:
        options: options of the solvers.
        damping: whether parts of corrections are tried where full ones lead to no solution.

    Attributes:
        counts: cost so far.
    """

    def __init__(self, options: NewtonOptions, *, damping: bool = True) -> None:
        self.options = options
        self.counts = NewtonCounts()
        self._damping = damping
        self._jacobian: Tensor | None = None
        self._factors: Factors | None = None
        self._factored: list[float] = []
        self._serves = False
        self._checked = False

    def forget(self) -> None:
        """Have the next solve take a new Jacobian."""
        self._serves = False

    def solve(self, system: StageSystem, guess: Tensor, weights: Tensor) -> StageSolution:
        """Solve the stages' equations.

        Args:
            system: equations.
            guess: increments to start from, shape (B, s, n).
            weights: error that the tolerances allow in each component in a step, shape (B, n).

        Raises:
            RuntimeError: if autograd's derivative of f differs from f's difference quotient, or batch elements depend
                on one another.
        """
        if guess.numel() == 0:
            return StageSolution(guess, guess.new_zeros(len(guess), dtype=torch.bool), "", 0)
        if not self._checked:
            self._checked = True
            self._check(system, guess)
        iteration = StageIteration(system, guess, weights, self.options.newton_tol)
        dense = self.options.dense(guess[0].numel())
        if dense:
            self._iterate_simplified(iteration, system, guess)
        if not iteration.solved:
            self._iterate_fully(iteration, self._newton_correction if dense else self._krylov_correction, system)
        self.counts.evaluations += iteration.residuals * len(system.fields)
        reason = "" if iteration.solved else iteration.reason()
        if reason or iteration.slow:
            self._check(system, guess)  # again, as f may depend on time
        return StageSolution(iteration.z, iteration.open, reason, iteration.residuals)

    def _iterate_simplified(self, iteration: StageIteration, system: StageSystem, guess: Tensor) -> None:
        """Iterate with one Jacobian for all stages and iterates: the kept one as long as it serves, then a new one."""
        kept = self._jacobian
        if self._serves and kept is not None and kept.shape[:2] == guess.shape[::2]:
            self._iterate_with(self._factors_of(kept, system), iteration)
            self._serves = self._serves and iteration.solved
        if not iteration.solved:
            kept = self._jacobian = self._factors = None  # frees their memory before new ones are made
            self._jacobian = self._jacobian_at(system.fields[0], system.base[:, 0] + guess[:, 0])
            self._iterate_with(self._factors_of(self._jacobian, system), iteration)

    def _iterate_with(self, factors: Factors, iteration: StageIteration) -> None:
        iteration.run(lambda residual, z: factors.solve(residual), _SIMPLIFIED_ITERATIONS)
        self._serves = iteration.rate <= _KEPT_RATE

    def _iterate_fully(self, iteration: StageIteration, correction: Callable[..., Tensor], system: StageSystem) -> None:
        """Iterate with the derivative at each iterate."""
        correct = partial(correction, system)
        self._serves = False
        self._jacobian = self._factors = None
        iteration.run(correct, self.options.max_iterations, final=True)
        if self._damping and not iteration.solved:
            iteration.run(correct, 2 * self.options.max_iterations, final=True, damped=True)

    def _check(self, system: StageSystem, guess: Tensor) -> None:
        if self.options.check_jacobian:
            for i in {0, len(system.fields) - 1}:
                check_derivative(system.fields[i], system.base[:, i] + guess[:, i])

    def _factors_of(self, kept: Tensor, system: StageSystem) -> Factors:
        """Factor the system's matrix with the Jacobian `kept`, unless that was done for the same coefficients."""
        coefficients = system.a.flatten().tolist()
        if self._factors is None or coefficients != self._factored:
            self._factors, self._factored = Factors(system.a, kept), coefficients
            self.counts.factorisations += 1
        return self._factors

    def _jacobian_at(self, field: StageField, x: Tensor) -> Tensor:
        self.counts.jacobians += 1
        return jacobian(GraphOf(field.graph, x))

    def _newton_correction(self, system: StageSystem, residual: Tensor, z: Tensor) -> Tensor:
        """Compute Newton's correction by LU factors of the matrix with a Jacobian at each stage."""
        states = (system.base + z).unbind(1)
        blocks = torch.stack([self._jacobian_at(f, x) for f, x in zip(system.fields, states, strict=True)])
        self.counts.factorisations += 1
        return Factors(system.a, blocks).solve(residual)

    def _krylov_correction(self, system: StageSystem, residual: Tensor, z: Tensor) -> Tensor:
        """Compute an inexact Newton correction by GMRES with Jacobian-vector products at each stage."""
        pushes = [Pushforward(f, x) for f, x in zip(system.fields, (system.base + z).unbind(1), strict=True)]

        def operator(v: Tensor) -> Tensor:
            pushed = [push(part) for push, part in zip(pushes, v.view_as(z).unbind(1), strict=True)]
            return v - torch.einsum("ij,bjn->bin", system.a, torch.stack(pushed, 1)).flatten(1)

        result = gmres(operator, residual, 1e-4, dimension=self.options.krylov_dimension)
        self.counts.products += result.products
        # An inaccurate correction slows the iteration, but is not taken for convergence.
        useful = result.converged | (result.x != 0).any(-1)
        return torch.where(useful[:, None], result.x, float("nan"))
