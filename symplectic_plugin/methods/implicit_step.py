"""One step of an implicit Runge-Kutta method.

The stages X_i = x_n + h sum_j a_ij f(t_n + c_j h, X_j) are solved for one after another where a is lower triangular
(diagonally implicit methods), else all together. An additive method (Kennedy, Carpenter 2003) adds the slopes of two
parts of f: implicit ones of the stiff part, explicit ones of the nonstiff part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .implicit_tableaux import ImplicitMethod
from .newton import Newton, NewtonOptions
from .newton_iteration import StageSystem
from .stage_field import StageField


@dataclass(frozen=True)
class StepFields:
    """Vector field at the times of a step's stages.

    Args:
        stages: f, or the stiff part of f, at each stage.
        nonstiff: nonstiff part of f at each stage, for an additive method.
    """

    stages: Sequence[StageField]
    nonstiff: Sequence[StageField] | None = None


@dataclass(frozen=True)
class TakenStep:
    """Stages, slopes and increment of a step.

    Args:
        stages: X_i, shape (s, B, n).
        parts: slopes k_i, shape (1, s, B, n); for an additive method those of both parts, shape (2, s, B, n).
        increment: x_{n+1} - x_n, shape (B, n).
        failed: batch elements without a solution, shape (B,). If there are any, the other fields are unusable.
        reason: why they failed; empty if none did.
    """

    stages: Tensor
    parts: Tensor
    increment: Tensor
    failed: Tensor
    reason: str = ""

    @property
    def slopes(self) -> Tensor:
        """Slopes k_i of f, summed over its parts, shape (s, B, n)."""
        return total(self.parts)

    def failure(self, name: str, t: float, h: float) -> RuntimeError:
        """Return the error to raise for a step of size h from t of the method `name`, where elements failed."""
        return RuntimeError(
            f"{name}: Newton's method did not solve the step from t = {t:g} of size {h:g} ({int(self.failed.sum())} of "
            f"{len(self.failed)} batch elements): {self.reason}. Take smaller steps, or an adaptive method (kencarp3, "
            "kencarp5)."
        )


class ImplicitSteps:
    """Steps of one solve, which share Jacobians and LU factors.

    Args:
        method: method to take steps of.
        options: options of the nonlinear and linear solvers.

    Attributes:
        newton: solver for the stages.
    """

    def __init__(self, method: ImplicitMethod, options: NewtonOptions) -> None:
        self.method = method
        self.options = options
        # A controller that can take a smaller step gets further by that than by damping.
        self.newton = Newton(options, damping=method.embedded is None)
        self._tableaux = [tableau for tableau in (method.tableau, method.nonstiff) if tableau is not None]
        self._a, self._b = method.tableau.numbers
        if not method.diagonally_implicit:
            self._inverse = torch.linalg.inv(method.tableau.a)

    def take(
        self, fields: StepFields, x: Tensor, h: float, weights: Tensor, first_slope: Tensor | None = None
    ) -> TakenStep:
        """Take a step.

        Args:
            fields: f at the times of the stages.
            x: state at the step's start, shape (B, n).
            h: size of the step.
            weights: error that the tolerances allow in each component, shape (B, n).
            first_slope: slope at the step's start if it is known, shape (B, n); None for an additive method.

        Raises:
            RuntimeError: if f has no usable derivative, see `check_derivative`.
        """
        if self.method.diagonally_implicit or h == 0:
            return self._take_one_by_one(fields, x, h, weights, first_slope)
        a = (h * self.method.tableau.a).to(x)
        base = x[:, None].expand(-1, len(a), -1)
        solution = self.newton.solve(StageSystem(fields.stages, base, a), torch.zeros_like(base), weights)
        # The slopes come from the equations: f at the stages would magnify their rounding errors by its stiffness.
        slopes = torch.einsum("ij,bjn->ibn", (self._inverse / h).to(x), solution.z)
        stages = (base + solution.z).transpose(0, 1)
        return TakenStep(stages, slopes[None], h * self.rate(slopes), solution.failed, solution.reason)

    def moved(self, parts: Tensor) -> Tensor:
        """Compute (X_i - x_n) / h, shape (s, B, n), from slopes shaped as `TakenStep.parts`."""
        products = [
            torch.einsum("ij,jbn->ibn", tableau.a.to(part), part)
            for tableau, part in zip(self._tableaux, parts, strict=True)
        ]
        return total(torch.stack(products))

    def rate(self, slopes: Tensor) -> Tensor:
        """Compute (x_{n+1} - x_n) / h, shape (B, n), from the slopes of f, shape (s, B, n)."""
        return weighted_sum(self._b, slopes)

    def _take_one_by_one(
        self, fields: StepFields, x: Tensor, h: float, weights: Tensor, first_slope: Tensor | None
    ) -> TakenStep:
        s = len(self._a)
        stages, parts = x.new_zeros(s, *x.shape), x.new_zeros(len(self._tableaux), s, *x.shape)
        stiff = parts[0]
        failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i in range(s):
            known, size = self._known(x, h, parts[:, :i]), h * self._a[i][i]
            if size == 0:
                stages[i] = known
                stiff[i] = fields.stages[i].value(known) if i > 0 or first_slope is None else first_slope
            else:
                guess = (stages[i - 1] if i else x) - known
                system = StageSystem(fields.stages[i : i + 1], known[:, None], x.new_full((1, 1), size))
                solution = self.newton.solve(system, guess[:, None], weights)
                if bool(solution.failed.any()):
                    reason = f"stage {i + 1} has no solution: {solution.reason}"
                    return TakenStep(stages, parts, 0 * x, solution.failed, reason)
                stages[i] = known + solution.z[:, 0]
                stiff[i] = solution.z[:, 0] / size
            if fields.nonstiff is not None:
                parts[1, i] = fields.nonstiff[i].value(stages[i])
        return TakenStep(stages, parts, h * self.rate(total(parts)), failed)

    def _known(self, x: Tensor, h: float, parts: Tensor) -> Tensor:
        """Compute the known part of a stage from the slopes of the stages before, shape (1 or 2, i, B, n)."""
        i = parts.shape[1]
        for tableau, slopes in zip(self._tableaux, parts, strict=True):
            if i:
                x = x + h * weighted_sum(tableau.numbers[0][i], slopes)
        return x


def weighted_sum(weights: Sequence[float], rows: Tensor) -> Tensor:
    """Compute sum_i w_i rows_i over the rows, of which there may be none or fewer than weights."""
    result = torch.zeros_like(rows[0]) if len(rows) else rows.new_zeros(rows.shape[1:])
    for weight, row in zip(weights, rows, strict=False):
        if weight != 0:
            result = result.add(row, alpha=weight)
    return result


def total(parts: Tensor) -> Tensor:
    """Sum over the parts of a vector field, the first dimension."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
