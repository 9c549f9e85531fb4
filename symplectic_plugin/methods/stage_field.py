"""Vector fields at the time of one stage, as functions of the state alone, and their derivatives.

A state is a real matrix of shape (B, n). Each row is a batch element, whose slope depends on no other row, so that the
Jacobian consists of B blocks of shape (n, n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

_CHUNK_ELEMENTS = 2**22
"""Largest number of entries of a Jacobian that are computed at a time, which bounds the memory of their graphs."""


@dataclass(frozen=True)
class Layout:
    """Layout of a host's states as real matrices of shape (B, n).

    Args:
        shape: shape of a state.
        dtype: dtype of a state. A complex number becomes two real ones, since f need not be holomorphic.
        independent: whether the leading dimension is a batch of states that do not depend on one another. A state of
            fewer than two dimensions is one batch element in any case.
    """

    shape: torch.Size
    dtype: torch.dtype
    independent: bool = True

    @property
    def batch(self) -> int:
        """Number of batch elements, B."""
        return self.shape[0] if self.independent and len(self.shape) > 1 else 1

    def flat(self, x: Tensor) -> Tensor:
        """Reshape states from (..., *shape) to (..., B, n), real."""
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        outer = x.ndim - len(self.shape) - (1 if self.dtype.is_complex else 0)
        return x.reshape(*x.shape[:outer], self.batch, self.size)

    def shaped(self, z: Tensor) -> Tensor:
        """Reshape states from (..., B, n) to (..., *shape), the inverse of `flat`."""
        if self.dtype.is_complex:
            return torch.view_as_complex(z.reshape((*z.shape[:-2], *self.shape, 2)).contiguous())
        return z.reshape((*z.shape[:-2], *self.shape))

    @property
    def size(self) -> int:
        """Number of real unknowns in one batch element, n."""
        return self.shape.numel() // max(self.batch, 1) * (2 if self.dtype.is_complex else 1)


class Linearized(Protocol):
    """Evaluation of f at one state, with its graph.

    Attributes:
        slope: value of f without the graph, shape (B, n).
    """

    slope: Tensor

    def pull(self, cotangent: Tensor, *, batched: bool = False) -> Tensor:
        """Compute (df/dx)^T cotangent and keep the graph.

        Args:
            cotangent: cotangent of the slope, shape (B, n); if `batched`, m of them, shape (m, B, n).
            batched: whether there are several cotangents, whose products are vectorised.

        Returns:
            A tensor of the cotangent's shape.
        """

    def pull_all(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pull a cotangent of the slope back to everything that f depends on, and free the graph.

        The cotangents of parameters are added up by the implementation.

        Args:
            cotangent: cotangent of the slope, shape (B, n).

        Returns:
            The cotangent of the state, shape (B, n), and that of the stage's time, or None if it is not wanted.
        """


@dataclass(frozen=True)
class StageField:
    """Vector field at one stage, as three functions of the state x, shape (B, n).

    Args:
        value: computes f(x), shape (B, n), without a graph.
        graph: computes f(x), shape (B, n), with a graph back to x if gradients are enabled.
        linearize: evaluates f at x with the graph that the adjoint needs.
    """

    value: Callable[[Tensor], Tensor]
    graph: Callable[[Tensor], Tensor]
    linearize: Callable[[Tensor], Linearized]


class GraphOf:
    """`Linearized` for f as a function of the state alone.

    Args:
        graph: computes f(x) with a graph back to x.
        x: state to evaluate f at, shape (B, n).
    """

    def __init__(self, graph: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.enable_grad():
            self.leaf = x.detach().requires_grad_()
            self.result = graph(self.leaf)
        self.slope = self.result.detach()

    def pull(self, cotangent: Tensor, *, batched: bool = False) -> Tensor:
        if not self.result.requires_grad:
            return torch.zeros_like(cotangent)
        (product,) = torch.autograd.grad(
            self.result, self.leaf, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return torch.zeros_like(cotangent) if product is None else product

    def pull_all(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.pull(cotangent), None


def stage_field(function: Callable[[Tensor], Tensor], layout: Layout) -> StageField:
    """Build the stage field of a forward solve.

    Args:
        function: computes f from a state as the host has it.
        layout: layout of the state.
    """

    def graph(x: Tensor) -> Tensor:
        return layout.flat(function(layout.shaped(x)))

    def value(x: Tensor) -> Tensor:
        with torch.no_grad():
            return graph(x).detach()

    return StageField(value, graph, lambda x: GraphOf(graph, x))


def rows_at_a_time(batch: int, n: int) -> int:
    """Number of rows of each block of a Jacobian, shape (batch, n, n), that are computed at a time."""
    return max(1, min(n, _CHUNK_ELEMENTS // max(1, batch * n)))


def jacobian(linearized: Linearized) -> Tensor:
    """Compute df/dx, shape (B, n, n), by vector-Jacobian products with the n unit vectors, for all rows at once.

    The products are vectorised as in torch.func.jacrev; one by one where an operation of f has no rule for vmap.
    """
    batch, n = linearized.slope.shape
    unit = torch.eye(n, dtype=linearized.slope.dtype, device=linearized.slope.device)
    rows = []
    for part in unit.split(rows_at_a_time(batch, n)):
        basis = part[:, None, :].expand(-1, batch, -1)
        try:
            rows.append(linearized.pull(basis, batched=True))
        except RuntimeError:  # no rule for vmap; any other error is raised again by the next line
            rows.append(torch.stack([linearized.pull(row.contiguous()) for row in basis]))
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).permute(1, 0, 2)


class Pushforward:
    """Jacobian-vector products of f at one state, in forward mode, or by two reverse passes where f has no other mode.

    Args:
        field: vector field.
        x: state, shape (B, n).
    """

    def __init__(self, field: StageField, x: Tensor) -> None:
        self.field = field
        self.x = x.detach()
        self._transposed: tuple[Tensor, Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Compute (df/dx) v, shape (B, n)."""
        if self._transposed is None:
            try:
                # An f that differentiates may replace a state that requires no gradient by a copy without tangent.
                with torch.enable_grad(), forward_ad.dual_level():
                    result = self.field.graph(forward_ad.make_dual(self.x.requires_grad_(), v))
                    tangent = forward_ad.unpack_dual(result).tangent
                return torch.zeros_like(v) if tangent is None else tangent.detach()
            except (NotImplementedError, RuntimeError):
                # An operation of f has no forward mode. The reverse passes raise f's own errors, if there are any.
                self._transposed = self._transpose()
        u, product = self._transposed
        if not product.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(product, u, v, retain_graph=True)[0]

    def _transpose(self) -> tuple[Tensor, Tensor]:
        """Build the graph of (df/dx)^T u, which is linear in u; returns u and the product."""
        with torch.enable_grad():
            leaf = self.x.detach().clone().requires_grad_()
            slope = self.field.graph(leaf)
            u = torch.zeros_like(slope).requires_grad_()
            if not slope.requires_grad:
                return u, torch.zeros_like(slope)
            (product,) = torch.autograd.grad(slope, leaf, u, create_graph=True, allow_unused=True)
        return u, torch.zeros_like(slope.detach()) if product is None else product
