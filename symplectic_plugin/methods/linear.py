"""Linear systems with one matrix for each batch element: LU factors, and GMRES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""Linear map from (B, m) to (B, m), row by row."""


def row_norm(x: Tensor) -> Tensor:
    """Compute the Euclidean norm over the last dimension."""
    return torch.linalg.vector_norm(x, dim=-1)


class Factors:
    """LU factors of I - (A kron J), with coefficients A (times the step's size) and Jacobians J of f.

    Args:
        a: coefficients A, shape (s, s).
        jacobians: Jacobians, shape (B, n, n) if all stages share one, else (s, B, n, n).
        columns: whether block (i, j) has the Jacobian of stage j, as in equations for the states, or that of stage i,
            as in equations for the slopes.

    Attributes:
        singular: whether the matrix has no inverse, shape (B,).
        norm: Frobenius norm of the matrix, shape (B,).
    """

    def __init__(self, a: Tensor, jacobians: Tensor, *, columns: bool = True) -> None:
        s = len(a)
        blocks = jacobians if jacobians.ndim == 4 else jacobians.expand(s, *jacobians.shape)
        batch, n = blocks.shape[1:3]
        products = torch.einsum("ij,jbmn->bimjn" if columns else "ij,ibmn->bimjn", a, blocks)
        matrix = products.reshape(batch, s * n, s * n).neg_()
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        self.norm = torch.linalg.matrix_norm(matrix)
        self._factors, self._pivots, info = torch.linalg.lu_factor_ex(matrix)
        diagonal = self._factors.diagonal(dim1=-2, dim2=-1).abs()
        eps = torch.finfo(matrix.dtype).eps
        tiny = eps * diagonal.amax(-1) * (s * n)
        self.singular = (info != 0) | ~self.norm.isfinite() | (diagonal.amin(-1) <= tiny * eps)

    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        """Solve for right-hand sides of shape (B, m), with the matrix or its transpose; NaN where it is singular."""
        solution = torch.linalg.lu_solve(self._factors, self._pivots, right[..., None], adjoint=transposed)[..., 0]
        return torch.where(self.singular[:, None], torch.full_like(solution, float("nan")), solution)


@dataclass(frozen=True)
class KrylovResult:
    """Result of GMRES.

    Args:
        x: approximate solution, shape (B, m).
        converged: whether the residual meets the tolerance, shape (B,).
        products: number of products with the operator.
    """

    x: Tensor
    converged: Tensor
    products: int


def gmres(
    operator: Operator,
    right: Tensor,
    tolerance: float,
    preconditioner: Operator | None = None,
    dimension: int = 60,
    restarts: int = 5,
) -> KrylovResult:
    """Solve a system for each row by restarted GMRES (Saad, Schultz, SIAM J. Sci. Stat. Comput. 7, 1986).

    The rows share the products with the operator, and each has a Krylov space of its own. The preconditioner acts from
    the right, so that the residual compared with the tolerance is the true one.

    Args:
        operator: matrices.
        right: right-hand sides, shape (B, m).
        tolerance: largest norm of a residual, relative to that of `right`.
        preconditioner: approximate inverse.
        dimension: largest dimension of the Krylov spaces.
        restarts: number of Krylov spaces, each begun at the solution from the one before.
    """
    goal = tolerance * row_norm(right)
    x, residual = torch.zeros_like(right), right
    products = 0
    for _ in range(restarts):
        norm = row_norm(residual)
        if bool((norm <= goal).all()) or not bool(norm.isfinite().all()):
            break
        step, taken = _minimize(operator, preconditioner, residual, goal, min(dimension, right.shape[1]))
        better = x + step
        remaining = right - operator(better)
        products += taken + 1
        improved = row_norm(remaining) < norm
        x = torch.where(improved[:, None], better, x)
        residual = torch.where(improved[:, None], remaining, residual)
        if not bool(improved.any()):
            break
    return KrylovResult(x, row_norm(residual) <= goal, products)


def _minimize(
    operator: Operator, preconditioner: Operator | None, residual: Tensor, goal: Tensor, columns: int
) -> tuple[Tensor, int]:
    """Minimise the residual over a Krylov space, built by Arnoldi's method.

    Args:
        operator: matrices.
        preconditioner: approximate inverse.
        residual: residual at the start, shape (B, m), finite.
        goal: norm of a residual that is small enough, shape (B,).
        columns: largest dimension of the space.

    Returns:
        The step from the start, shape (B, m), and the number of products with the operator.
    """
    limits = torch.finfo(residual.dtype)
    norm = row_norm(residual)
    basis = [residual / norm.clamp_min(limits.tiny)[:, None]]
    directions: list[Tensor] = []
    h = residual.new_zeros(len(residual), columns + 1, columns)
    target = residual.new_zeros(len(residual), columns + 1)
    target[:, 0] = norm
    for j in range(columns):
        directions.append(basis[j] if preconditioner is None else preconditioner(basis[j]))
        w = operator(directions[j])
        size = row_norm(w)
        q = torch.stack(basis, 1)
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            overlap = torch.einsum("bjm,bm->bj", q, w)
            w = w - torch.einsum("bjm,bj->bm", q, overlap)
            h[:, : j + 1, j] += overlap
        left = row_norm(w)
        left = torch.where(left <= 10 * limits.eps * size, 0, left)  # the space is exhausted
        h[:, j + 1, j] = left
        basis.append(torch.where(left[:, None] > 0, w / left.clamp_min(limits.tiny)[:, None], 0))
        weights, off = _least_squares(h[:, : j + 2, : j + 1], target[:, : j + 2])
        if bool(((off <= 0.3 * goal) | ~off.isfinite()).all()):
            break
    return torch.einsum("bjm,bj->bm", torch.stack(directions, 1), weights), len(directions)


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise |matrix y - target| for each batch element; returns y and the minimum."""
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    # A dependent column comes from a row that is solved already, or from a singular operator.
    empty = diagonal.abs() <= 10 * torch.finfo(r.dtype).eps * diagonal.abs().amax(-1, keepdim=True)
    r = r + torch.diag_embed(torch.where(empty, torch.ones_like(diagonal), 0))
    right = torch.where(empty, 0, torch.einsum("bij,bi->bj", q, target))
    weights = torch.linalg.solve_triangular(r, right[..., None], upper=True)[..., 0]
    off = row_norm(target - torch.einsum("bij,bj->bi", matrix, weights))
    return weights, off
