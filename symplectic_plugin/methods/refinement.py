"""Iterative refinement: solving a linear system to rounding by approximate inverses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .linear import Factors, Operator, gmres, row_norm

_REFINEMENTS = 12
"""Corrections after which refinement stops."""
_ROUNDING = 8
"""Residual in units of the rounding error of a product below which a solution is not refined further."""
_ACCEPTED = 1e4
"""Residual, in the same units, up to which a solution that can't be refined further is accepted."""
_ACCEPTED_OF_FEW = 64.0
"""Residual, in the same units, up to which the solution of few products is accepted: a better inverse may follow."""


@dataclass(frozen=True)
class Refined:
    """Result of iterative refinement.

    Args:
        x: approximate solution, shape (B, m).
        residual: norm of the residual, relative to those of x and the right-hand side, shape (B,).
        reached: whether the residual is as small as rounding allows.
    """

    x: Tensor
    residual: Tensor
    reached: bool

    def required(self) -> Tensor:
        """Return the solution.

        Raises:
            RuntimeError: if its residual is larger than rounding.
        """
        if not self.reached:
            worst = float(self.residual.nan_to_num(nan=float("inf")).max())
            raise RuntimeError(
                "symplectic_adjoint: the adjoint of an implicit step could not be solved for (relative residual "
                f"{worst:.0e}): its matrix is singular, GMRES does not converge, or states of one batch depend on one "
                'another. Take smaller steps, or set the options linear_solver="dense" or independent_batch=False.'
            )
        return self.x


def refine(
    operator: Operator, right: Tensor, factors: Factors | None, dimension: int, few: int | None = None
) -> Refined:
    """Solve a system to rounding, by GMRES for the residual until the residual no longer shrinks.

    Args:
        operator: matrix.
        right: right-hand side, shape (B, m).
        factors: LU factors of the transpose of a matrix close to the operator, or None.
        dimension: largest dimension of GMRES's Krylov spaces.
        few: number of products after which to stop, or None.
    """
    if right.numel() == 0:
        return Refined(right, right.new_zeros(len(right)), True)
    if factors is None:
        preconditioner, x, largest = None, right, torch.ones_like(right[:, 0])
    else:
        preconditioner = partial(factors.solve, transposed=True)
        x, largest = preconditioner(right), factors.norm
    restarts, accepted = 5, _ACCEPTED
    if few is not None and few < dimension:
        dimension, restarts, accepted = few, 1, _ACCEPTED_OF_FEW
    eps = torch.finfo(right.dtype).eps
    best = torch.full_like(largest, float("inf"))
    products = 0
    for _ in range(_REFINEMENTS):
        image = operator(x)
        products += 1
        off, size = row_norm(right - image), row_norm(x)
        # The largest ratio seen is a lower bound of the operator's norm, which bounds the rounding of its products.
        largest = torch.maximum(largest, torch.where(size > 0, row_norm(image) / size, 0)).nan_to_num(nan=1.0)
        rounding = eps * (row_norm(right) + largest * size)
        small = off <= _ROUNDING * rounding
        shrinks = bool(((off < 0.5 * best) | small).all())
        if bool(small.all()) or not shrinks or (few is not None and products > few):
            break
        best = torch.minimum(best, off)
        correction = gmres(operator, right - image, 1e-4, preconditioner, dimension, restarts)
        x = x + correction.x
        products += correction.products
    return Refined(x, off / (row_norm(right) + size), bool((off <= accepted * rounding).all()))
