"""One step of the symplectic partner of an implicit Runge-Kutta method, from the step's end to its start.

With the slopes' cotangents kappa_i = h b_i Lambda_i, and r_i the cotangent that slope k_i has from outside the stages,
that is from the step's end, the outputs in the step and the step after:

    kappa_i = r_i + h sum_j a_ji xi_j,    xi_i = (df/dx)^T kappa_i   at (t_n + c_i h, X_i)

Where a is lower triangular these are s systems (I - h a_ii J^T) kappa_i = ..., solved from the last stage to the first,
else one system for all stages. Only f is differentiated, once per stage: the way that the stages were solved for does
not matter (implicit function theorem; for all Runge-Kutta methods, Sanz-Serna, SIAM Review 58, 2016).

An additive method (Kennedy, Carpenter 2003) has slopes and kappa of both parts at each stage; xi is the sum of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .implicit_step import StepFields, weighted_sum
from .implicit_tableaux import ImplicitMethod
from .linear import Factors
from .newton import NewtonOptions
from .refinement import refine
from .stage_field import GraphOf, Linearized, jacobian

_FEW_PRODUCTS = 8
"""Products up to which the LU factors of another stage or step are used: more cost as much as new factors."""


@dataclass(frozen=True)
class StepAdjoint:
    """Cotangents of a step's slopes, stages and stage times.

    The cotangent of the step's start is that of its end plus the sum over xi_i, where a first slope that was given has
    xi_1 = 0. The cotangent of the step's size, for a fixed start, is
    sum_i (<r_i, k_i> + <xi_i, X_i - x_n>) / h + sum_i c_i tau_i, with r_i without the part from the step after, and
    tau_i the cotangents of the stage times.

    Args:
        slopes: kappa_i, shape (s, B, n); for an additive method, those of the stiff part.
        stages: xi_i, shape (s, B, n).
        times: tau_i, None where f does not depend on the time or its cotangent is not wanted.
    """

    slopes: Tensor
    stages: Tensor
    times: list[Tensor | None]


class TransposedSteps:
    """Steps of one backward pass, which share LU factors.

    Args:
        method: method whose partner takes the steps.
        options: options of the linear solvers.

    Attributes:
        factorisations: number of LU factorisations so far.
    """

    def __init__(self, method: ImplicitMethod, options: NewtonOptions) -> None:
        self.method = method
        self.options = options
        self.factorisations = 0
        self._columns = method.tableau.a.T.tolist()
        self._nonstiff_columns = [] if method.nonstiff is None else method.nonstiff.a.T.tolist()
        self._kept: tuple[tuple[float, torch.Size], Factors] | None = None
        if not method.diagonally_implicit:
            self._inverse = torch.linalg.inv(method.tableau.a)

    def take(
        self, fields: StepFields, stages: Tensor, h: float, cotangents: Tensor, *, first_slope_given: bool = False
    ) -> StepAdjoint:
        """Take a step: carry the cotangents of the slopes back to the stages.

        Args:
            fields: f at the times of the stages, as for `ImplicitSteps.take`.
            stages: X_i, shape (s, B, n).
            h: size of the step.
            cotangents: r_i, shape (s, B, n).
            first_slope_given: whether the first slope was given to the step. Its cotangent kappa_1 is then a result,
                and not carried on to the first stage.

        Raises:
            RuntimeError: if the transposed equations can't be solved to rounding.
        """
        if self.method.diagonally_implicit or h == 0:
            return self._take_one_by_one(fields, stages, h, cotangents, first_slope_given=first_slope_given)
        return self._take_together(fields, stages, h, cotangents)

    def _take_one_by_one(
        self, fields: StepFields, stages: Tensor, h: float, cotangents: Tensor, *, first_slope_given: bool
    ) -> StepAdjoint:
        kappa, xi = torch.zeros_like(cotangents), torch.zeros_like(cotangents)
        times: list[Tensor | None] = [None] * len(stages)
        for i in reversed(range(len(stages))):
            later, size = slice(i + 1, None), h * self._columns[i][i]
            kappa[i] = cotangents[i] + h * weighted_sum(self._columns[i][later], xi[later])
            if i == 0 and first_slope_given:
                break
            if fields.nonstiff is not None:
                nonstiff = cotangents[i] + h * weighted_sum(self._nonstiff_columns[i][later], xi[later])
                xi[i], times[i] = fields.nonstiff[i].linearize(stages[i]).pull_all(nonstiff)
            linearized = fields.stages[i].linearize(stages[i])
            if size == 0:
                product, time = linearized.pull_all(kappa[i])
                xi[i] += product
            else:
                known = kappa[i].clone()
                kappa[i] = self._solve(linearized, size, known + size * xi[i])
                _, time = linearized.pull_all(kappa[i])
                # The product would magnify the rounding error of kappa by the stiffness of f.
                xi[i] = (kappa[i] - known) / size
            times[i] = _sum(times[i], time)
        return StepAdjoint(kappa, xi, times)

    def _solve(self, linearized: Linearized, size: float, right: Tensor) -> Tensor:
        """Solve (I - size J^T) kappa = right, by the factors of an earlier stage or step where few products suffice."""

        def operator(v: Tensor) -> Tensor:
            return v - size * linearized.pull(v)

        dimension = self.options.krylov_dimension
        if not self.options.dense(right.shape[1]) or right.numel() == 0:
            return refine(operator, right, None, dimension).required()
        key, kept = (size, right.shape), self._kept
        if kept is not None and kept[0] == key:
            refined = refine(operator, right, kept[1], dimension, _FEW_PRODUCTS)
            if refined.reached:
                return refined.x
        kept = self._kept = None  # frees the memory before the new factors are made
        self.factorisations += 1
        factors = Factors(right.new_full((1, 1), size), jacobian(linearized))
        self._kept = key, factors
        return refine(operator, right, factors, dimension).required()

    def _take_together(self, fields: StepFields, stages: Tensor, h: float, cotangents: Tensor) -> StepAdjoint:
        s, batch, n = stages.shape
        transposed = (h * self.method.tableau.a.T).to(stages)
        right = cotangents.transpose(0, 1).reshape(batch, s * n)

        def operator(v: Tensor) -> Tensor:
            cotangents = v.view(batch, s, n).unbind(1)
            pulled = [f.linearize(x).pull(k) for f, x, k in zip(fields.stages, stages, cotangents, strict=True)]
            return v - torch.einsum("ij,jbn->bin", transposed, torch.stack(pulled)).flatten(1)

        factors = None
        if self.options.dense(s * n) and right.numel() > 0:
            blocks = [jacobian(GraphOf(f.graph, x)) for f, x in zip(fields.stages, stages, strict=True)]
            self.factorisations += 1
            factors = Factors(transposed.T, torch.stack(blocks), columns=False)
        solution = refine(operator, right, factors, self.options.krylov_dimension).required()
        kappa = solution.view(batch, s, n).transpose(0, 1)
        times = [f.linearize(x).pull_all(k)[1] for f, x, k in zip(fields.stages, stages, kappa, strict=True)]
        xi = torch.einsum("ji,jbn->ibn", (self._inverse / h).to(kappa), kappa - cotangents)
        return StepAdjoint(kappa, xi, times)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
