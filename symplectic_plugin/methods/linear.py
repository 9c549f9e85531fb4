"""Linear systems with one matrix for each batch element: LU factors, and GMRES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""A linear map of (B, m) to itself, row by row."""


class Factors:
    """LU factors of I - (A kron J), for coefficients A times the step's size and Jacobians of f.

    Args:
        a: shape (s, s).
        jacobians: shape (B, n, n), the same for all s stages; or (s, B, n, n), one of each.
        columns: where each of them differs, whether block (i, j) is that of stage j, as for unknown states, or that of
            stage i, as for unknown slopes.

    Attributes:
        singular: shape (B,), whether the matrix has no inverse.
        norm: shape (B,), the matrix's Frobenius norm.
    """

    def __init__(self, a: Tensor, jacobians: Tensor, columns: bool = True) -> None:
        s = len(a)
        blocks = jacobians if jacobians.ndim == 4 else jacobians.expand(s, *jacobians.shape)
        batch, n = blocks.shape[1:3]
        matrix = (
            torch.einsum("ij,jbmn->bimjn" if columns else "ij,ibmn->bimjn", a, blocks)
            .reshape(batch, s * n, s * n)
            .neg_()
        )
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        self.norm = torch.linalg.matrix_norm(matrix)
        self._factors, self._pivots, info = torch.linalg.lu_factor_ex(matrix)
        diagonal = self._factors.diagonal(dim1=-2, dim2=-1).abs()
        tiny = torch.finfo(matrix.dtype).eps * diagonal.amax(-1) * (s * n)
        self.singular = (
            (info != 0) | ~self.norm.isfinite() | (diagonal.amin(-1) <= tiny * torch.finfo(matrix.dtype).eps)
        )

    def solve(self, right: Tensor, transposed: bool = False) -> Tensor:
        """The solution for right-hand sides of shape (B, m); not finite where the matrix has no inverse."""
        solution = torch.linalg.lu_solve(self._factors, self._pivots, right[..., None], adjoint=transposed)[..., 0]
        return torch.where(self.singular[:, None], torch.full_like(solution, float("nan")), solution)


@dataclass(frozen=True)
class KrylovResult:
    """What GMRES arrived at.

    Args:
        x: shape (B, m).
        converged: whether the residual is as small as wanted, shape (B,).
        products: how often the operator was applied.
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
    """Solve a system for each row (Saad, Schultz, SIAM J. Sci. Stat. Comput. 7, 1986), preconditioned from the right.

    All rows share the products with the operator; each has its own Krylov space. The residual that is judged is the
    true one.

    Args:
        operator: the matrices.
        right: shape (B, m).
        tolerance: for the residual's norm, relative to that of `right`.
        preconditioner: an approximate inverse.
        dimension: of the Krylov space.
        restarts: how often to start again from what was arrived at.
    """
    dtype, (batch, m) = right.dtype, right.shape
    scale = torch.linalg.vector_norm(right, dim=-1)
    x = torch.zeros_like(right)
    residual = right
    products = 0
    precondition = preconditioner or (lambda v: v)
    tiny = torch.finfo(dtype).tiny
    for _ in range(restarts):
        norm = torch.linalg.vector_norm(residual, dim=-1)
        if bool((norm <= tolerance * scale).all()) or not bool(norm.isfinite().all()):
            break
        basis = [residual / norm.clamp_min(tiny)[:, None]]
        directions: list[Tensor] = []
        columns = min(dimension, m)
        h = right.new_zeros(batch, columns + 1, columns)
        target = right.new_zeros(batch, columns + 1)
        target[:, 0] = norm
        weights = right.new_zeros(batch, 0)
        for j in range(columns):
            directions.append(precondition(basis[j]))
            w = operator(directions[j])
            products += 1
            size = torch.linalg.vector_norm(w, dim=-1)
            q = torch.stack(basis, 1)
            for _ in range(2):  # twice is enough to be orthogonal to rounding
                overlap = torch.einsum("bjm,bm->bj", q, w)
                w = w - torch.einsum("bjm,bj->bm", q, overlap)
                h[:, : j + 1, j] += overlap
            left = torch.linalg.vector_norm(w, dim=-1)
            left = torch.where(left <= 10 * torch.finfo(dtype).eps * size, 0, left)  # the space is exhausted
            h[:, j + 1, j] = left
            basis.append(torch.where(left[:, None] > 0, w / left.clamp_min(tiny)[:, None], 0))
            weights, off = _least_squares(h[:, : j + 2, : j + 1], target[:, : j + 2])
            if bool(((off <= 0.3 * tolerance * scale) | ~off.isfinite()).all()):
                break
        step = torch.einsum("bjm,bj->bm", torch.stack(directions, 1), weights)
        better = x + step
        residual_then = right - operator(better)
        products += 1
        improved = torch.linalg.vector_norm(residual_then, dim=-1) < norm
        x = torch.where(improved[:, None], better, x)
        residual = torch.where(improved[:, None], residual_then, residual)
        if not bool(improved.any()):
            break
    norm = torch.linalg.vector_norm(residual, dim=-1)
    return KrylovResult(x, norm <= tolerance * scale, products)


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The weights y that bring matrix y closest to the target, and how close, for each batch element."""
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    # A column that brings nothing new: a row that has been solved, or a singular operator.
    empty = diagonal.abs() <= 10 * torch.finfo(r.dtype).eps * diagonal.abs().amax(-1, keepdim=True)
    r = r + torch.diag_embed(torch.where(empty, torch.ones_like(diagonal), 0))
    right = torch.where(empty, 0, torch.einsum("bij,bi->bj", q, target))
    weights = torch.linalg.solve_triangular(r, right[..., None], upper=True)[..., 0]
    off = torch.linalg.vector_norm(target - torch.einsum("bij,bj->bi", matrix, weights), dim=-1)
    return weights, off
