"""One step of an implicit Runge-Kutta method, and its symplectic partner's step back.

With the slopes' cotangents kappa_i = h b_i Lambda_i (see `sweep`), and r_i what acts on slope k_i from outside the
stages, that is the step's end, the outputs in it and the step after:

    kappa_i = r_i + h sum_j a_ji xi_j,    xi_i = (df/dx)^T kappa_i   at (t_n + c_i h, X_i)

Where a is lower triangular these are s systems (I - h a_ii J^T) kappa_i = ..., one for each stage, from the last to the
first, else one system for all of them. Nothing is differentiated but f, and f only once per stage: how the stages were
found does not matter (the implicit function theorem; for all Runge-Kutta methods, Sanz-Serna, SIAM Review 58, 2016).

An additive method (Kennedy, Carpenter 2003) has slopes kappa of both parts at each stage; xi is the sum of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .implicit_tableaux import ImplicitMethod
from .linear import Factors, Operator, gmres
from .newton import Newton, NewtonOptions, StageSystem
from .stage_field import GraphOf, Linearized, StageField, jacobian


@dataclass(frozen=True)
class StepFields:
    """The vector field at the times of a step's stages.

    Args:
        stages: f, or its stiff part, at each stage.
        nonstiff: its other part at each stage, for an additive method.
    """

    stages: Sequence[StageField]
    nonstiff: Sequence[StageField] | None = None


@dataclass(frozen=True)
class TakenStep:
    """A step as it was taken.

    Args:
        stages: X_i, shape (s, B, n).
        parts: the slopes k_i, shape (1, s, B, n); for an additive method those of the two parts, (2, s, B, n).
        increment: x_{n+1} - x_n, shape (B, n).
        failed: which batch elements have no solution, shape (B,). Then the rest holds whatever was arrived at.
        reason: why, if any has none.
    """

    stages: Tensor
    parts: Tensor
    increment: Tensor
    failed: Tensor
    reason: str = ""

    @property
    def slopes(self) -> Tensor:
        """k_i, of both parts together, shape (s, B, n)."""
        return total(self.parts)


@dataclass(frozen=True)
class StepAdjoint:
    """What acts on a step's stages.

    Args:
        slopes: kappa_i, shape (s, B, n); for an additive method, those of the stiff part.
        stages: xi_i, the cotangents of the stages, shape (s, B, n). The start's is that of the end plus their sum; a
            first slope that was handed on has none.
        times: of the stages, None where f does not depend on it or it is not wanted.

    The cotangent of the step's size, its start held, is sum_i (<r_i, k_i> + <xi_i, X_i - x_n>) / h + sum_i c_i tau_i,
    with r_i less what came from the step after, and tau_i the times' cotangents.
    """

    slopes: Tensor
    stages: Tensor
    times: list[Tensor | None]


_FEW_PRODUCTS = 8
"""As long as a solution takes no more products than this with the LU factors of another step, they serve."""


@dataclass(frozen=True)
class _Refined:
    """What iterative refinement arrived at.

    Args:
        x: the solution.
        residual: relative, shape (B,).
        reached: whether that is as small as rounding allows.
        products: how many with the matrix it took.
    """

    x: Tensor
    residual: Tensor
    reached: bool
    products: int

    def required(self) -> Tensor:
        """The solution.

        Raises:
            RuntimeError: if it is not there.
        """
        if not self.reached:
            worst = float(self.residual.nan_to_num(nan=float("inf")).max())
            raise RuntimeError(
                "symplectic_adjoint: the adjoint of an implicit step could not be solved for (relative residual "
                f"{worst:.0e}): its matrix is singular, GMRES does not converge, or states of one batch depend on one "
                'another. Take smaller steps, or set the options linear_solver="dense" or independent_batch=False.'
            )
        return self.x


class ImplicitSteps:
    """Takes the steps of one solve, forward or back, and keeps what one of them can use of the one before.

    Args:
        method: the method.
        options: how its equations are solved.
    """

    def __init__(self, method: ImplicitMethod, options: NewtonOptions) -> None:
        self.method = method
        self.options = options
        self.newton = Newton(options, damping=method.embedded is None)  # else a smaller step is the better remedy
        self._a = method.tableau.a.tolist()
        self._b = method.tableau.b.tolist()
        self._transposed: tuple[tuple[float, torch.Size], Factors] | None = None
        self._nonstiff = None if method.nonstiff is None else method.nonstiff.a.tolist()
        if not method.diagonally_implicit:
            self._inverse = torch.linalg.inv(method.tableau.a)

    def take(
        self, fields: StepFields, x: Tensor, h: float, weights: Tensor, first_slope: Tensor | None = None
    ) -> TakenStep:
        """Take a step.

        Args:
            fields: f at the stages' times.
            x: the state at its start, shape (B, n).
            h: its size.
            weights: the error that the tolerances allow in each component, shape (B, n).
            first_slope: the slope at its start if it is known, shape (B, n); not for an additive method.
        """
        if self.method.diagonally_implicit or h == 0:
            return self._take_one_by_one(fields, x, h, weights, first_slope)
        s, a = self.method.tableau.stages, self.method.tableau.a
        base = x[:, None].expand(-1, s, -1)
        solution = self.newton.solve(StageSystem(fields.stages, base, (h * a).to(x)), torch.zeros_like(base), weights)
        # Not f at the stages, which would magnify what is left of their error by f's stiffness.
        slopes = torch.einsum("ij,bjn->ibn", (self._inverse / h).to(x), solution.z)
        increment = h * self._weighted(self._b, slopes)
        return TakenStep((base + solution.z).transpose(0, 1), slopes[None], increment, solution.failed, solution.reason)

    def moved(self, parts: Tensor) -> Tensor:
        """(X_i - x_n) / h, shape (s, B, n), of stages with these slopes, as `TakenStep` has them."""
        tableaux = [self.method.tableau, self.method.nonstiff]
        return total(
            torch.stack(
                [
                    torch.einsum("ij,jbn->ibn", tableau.a.to(part), part)
                    for tableau, part in zip(tableaux, parts, strict=False)
                    if tableau is not None
                ]
            )
        )

    def rate(self, slopes: Tensor) -> Tensor:
        """(x_{n+1} - x_n) / h, shape (B, n), of a step with these slopes of all parts together."""
        return self._weighted(self._b, slopes)

    def _take_one_by_one(
        self, fields: StepFields, x: Tensor, h: float, weights: Tensor, first_slope: Tensor | None
    ) -> TakenStep:
        a, s = self._a, self.method.tableau.stages
        stages, stiff = (x.new_zeros(s, *x.shape) for _ in range(2))
        nonstiff = stiff if self._nonstiff is None else torch.zeros_like(stiff)
        failed = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i in range(s):
            known = x + h * self._weighted(a[i][:i], stiff) if i else x
            if self._nonstiff is not None and i:
                known = known + h * self._weighted(self._nonstiff[i][:i], nonstiff)
            if a[i][i] * h == 0:
                stages[i] = known
                given = first_slope if i == 0 else None
                stiff[i] = fields.stages[i].value(known) if given is None else given
            else:
                guess = (stages[i - 1] if i else x) - known
                size = x.new_full((1, 1), h * a[i][i])
                system = StageSystem(fields.stages[i : i + 1], known[:, None], size)
                solution = self.newton.solve(system, guess[:, None], weights)
                stages[i] = known + solution.z[:, 0]
                stiff[i] = solution.z[:, 0] / (h * a[i][i])
                failed = failed | solution.failed
                if bool(failed.any()):
                    reason = f"stage {i + 1} has no solution: {solution.reason}"
                    return TakenStep(stages, stiff[None], 0 * x, failed, reason)
            if fields.nonstiff is not None:
                nonstiff[i] = fields.nonstiff[i].value(stages[i])
        parts = stiff[None] if self._nonstiff is None else torch.stack([stiff, nonstiff])
        return TakenStep(stages, parts, h * self.rate(total(parts)), failed)

    def back(
        self,
        fields: StepFields,
        stages: Tensor,
        h: float,
        cotangents: Tensor,
        first_slope_given: bool = False,
    ) -> StepAdjoint:
        """Carry the cotangents of a step's slopes back to its stages.

        Args:
            fields: f at the stages' times, as `take` had it.
            stages: X_i, shape (s, B, n).
            h: the step's size.
            cotangents: r_i, shape (s, B, n).
            first_slope_given: whether the first slope was, so that its cotangent is all that is wanted of it.

        Raises:
            RuntimeError: if the transposed equations can't be solved to rounding.
        """
        if self.method.diagonally_implicit or h == 0:
            return self._back_one_by_one(fields, stages, h, cotangents, first_slope_given)
        return self._back_together(fields, stages, h, cotangents)

    def _back_one_by_one(
        self, fields: StepFields, stages: Tensor, h: float, cotangents: Tensor, first_slope_given: bool
    ) -> StepAdjoint:
        a, s = self._a, len(stages)
        kappa, xi = torch.zeros_like(cotangents), torch.zeros_like(cotangents)
        times: list[Tensor | None] = [None] * s
        for i in reversed(range(s)):
            kappa[i] = cotangents[i] + h * self._weighted([a[j][i] for j in range(i + 1, s)], xi[i + 1 :])
            if i == 0 and first_slope_given:
                break
            if fields.nonstiff is not None and self._nonstiff is not None:
                later = [self._nonstiff[j][i] for j in range(i + 1, s)]
                other = cotangents[i] + h * self._weighted(later, xi[i + 1 :])
                xi[i], times[i] = fields.nonstiff[i].linearize(stages[i]).pull_all(other)
            linearized = fields.stages[i].linearize(stages[i])
            if a[i][i] * h == 0:
                product, time = linearized.pull_all(kappa[i])
                xi[i] += product
            else:
                known, size = kappa[i].clone(), h * a[i][i]
                kappa[i] = self._solve_transposed(linearized, size, known + size * xi[i])
                _, time = linearized.pull_all(kappa[i])
                # Not the product, which magnifies the rounding of kappa by f's stiffness.
                xi[i] = (kappa[i] - known) / size
            times[i] = _sum(times[i], time)
        return StepAdjoint(kappa, xi, times)

    def _solve_transposed(self, linearized: Linearized, size: float, right: Tensor) -> Tensor:
        """The solution of (I - size J^T) kappa = right, by the factors of a stage or step near by if those serve."""

        def operator(v: Tensor) -> Tensor:
            return v - size * linearized.pull(v)

        if not self.options.dense(right.shape[1]) or right.numel() == 0:
            return self._refined(operator, right, None).required()
        key, kept = (size, right.shape), self._transposed
        if kept is not None and kept[0] == key:
            found = self._refined(operator, right, kept[1], _FEW_PRODUCTS)
            if found.reached:
                return found.x
        kept = self._transposed = None  # freed before there is another
        factors = Factors(right.new_full((1, 1), size), jacobian(linearized))
        self._transposed = key, factors
        return self._refined(operator, right, factors).required()

    def _refined(
        self, operator: Operator, right: Tensor, factors: Factors | None, patience: float = float("inf")
    ) -> _Refined:
        """A system's solution to rounding: iterative refinement of what LU factors of a matrix near by, or GMRES, give.

        Args:
            operator: the matrix.
            right: the right-hand side, shape (B, m).
            factors: of a matrix near by.
            patience: after how many products to give up.
        """
        if right.numel() == 0:
            return _Refined(right, right.new_zeros(len(right)), True, 0)
        eps = torch.finfo(right.dtype).eps
        norm = partial(torch.linalg.vector_norm, dim=-1)
        if factors is None:
            preconditioner, x, largest = None, right, torch.ones_like(right[:, 0])
        else:
            preconditioner = partial(factors.solve, transposed=True)
            x, largest = preconditioner(right), factors.norm
        best = torch.full_like(largest, float("inf"))
        products = 0
        dimension, restarts, enough = self.options.krylov_dimension, 5, 1e4
        if patience < dimension:
            dimension, restarts, enough = int(patience), 1, 64.0  # nothing but what is as good as by other factors
        for _ in range(12):
            image = operator(x)
            products += 1
            off, size = norm(right - image), norm(x)
            # The operator's norm, as far as it was seen, bounds the rounding of its products.
            largest = torch.maximum(largest, torch.where(size > 0, norm(image) / size, 0)).nan_to_num(nan=1.0)
            rounding = eps * (norm(right) + largest * size)
            if bool((off <= 8 * rounding).all()) or not bool(((off < 0.5 * best) | (off <= 8 * rounding)).all()):
                break
            if products > patience:
                break
            best = torch.minimum(best, off)
            correction = gmres(operator, right - image, 1e-4, preconditioner, dimension, restarts)
            x = x + correction.x
            products += correction.products
        return _Refined(x, off / (norm(right) + size), bool((off <= enough * rounding).all()), products)

    def _back_together(self, fields: StepFields, stages: Tensor, h: float, cotangents: Tensor) -> StepAdjoint:
        s, batch, n = stages.shape
        transposed = (h * self.method.tableau.a.T).to(stages)
        right = cotangents.transpose(0, 1).reshape(batch, s * n)

        def operator(v: Tensor) -> Tensor:
            parts = v.view(batch, s, n).unbind(1)
            pulled = [
                field.linearize(x).pull(part) for field, x, part in zip(fields.stages, stages, parts, strict=True)
            ]
            return v - torch.einsum("ij,jbn->bin", transposed, torch.stack(pulled)).flatten(1)

        factors = None
        if self.options.dense(s * n) and right.numel() > 0:
            blocks = torch.stack(
                [jacobian(GraphOf(field.graph, x)) for field, x in zip(fields.stages, stages, strict=True)]
            )
            factors = Factors(transposed.T, blocks, columns=False)

        kappa = self._refined(operator, right, factors).required().view(batch, s, n).transpose(0, 1)
        times = [f.linearize(x).pull_all(k)[1] for f, x, k in zip(fields.stages, stages, kappa, strict=True)]
        xi = torch.einsum("ji,jbn->ibn", (self._inverse / h).to(kappa), kappa - cotangents)
        return StepAdjoint(kappa, xi, times)

    @staticmethod
    def _weighted(weights: Sequence[float], rows: Tensor) -> Tensor:
        """sum_i w_i rows_i, over as many rows as there are weights."""
        total = torch.zeros_like(rows[0]) if len(rows) else rows.new_zeros(rows.shape[1:])
        for weight, row in zip(weights, rows, strict=False):
            if weight != 0:
                total = total.add(row, alpha=weight)
        return total


def total(parts: Tensor) -> Tensor:
    """What the parts of a vector field make together: their sum over the first dimension."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
