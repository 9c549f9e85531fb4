"""The vector field at the time of one stage, as a function of the state alone, and its derivatives.

All of it in one layout: a state is a real matrix of shape (B, n), one row a batch element whose slope depends on no
other row, so that the Jacobian is B blocks of shape (n, n).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

_CHUNK_ELEMENTS = 2**22
"""How many numbers of a Jacobian are made at a time: the memory of that many states is needed."""


@dataclass(frozen=True)
class Layout:
    """How a host's states are laid out as (B, n).

    Args:
        shape: the state's.
        dtype: the state's. Complex numbers are pairs of real ones here, since f need not be holomorphic.
        independent: whether the leading dimension is a batch of states that do not depend on one another. States of
            fewer than two dimensions are one state in any case.
    """

    shape: torch.Size
    dtype: torch.dtype
    independent: bool = True

    @property
    def batch(self) -> int:
        """B."""
        return self.shape[0] if self.independent and len(self.shape) > 1 else 1

    def flat(self, x: Tensor) -> Tensor:
        """States of shape (..., *shape) as (..., B, n), real."""
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        outer = x.ndim - len(self.shape) - (1 if self.dtype.is_complex else 0)
        return x.reshape(*x.shape[:outer], self.batch, self.size)

    def shaped(self, z: Tensor) -> Tensor:
        """The inverse of `flat`."""
        if self.dtype.is_complex:
            return torch.view_as_complex(z.reshape((*z.shape[:-2], *self.shape, 2)).contiguous())
        return z.reshape((*z.shape[:-2], *self.shape))

    @property
    def size(self) -> int:
        """n, the number of unknowns in one batch element."""
        return self.shape.numel() // max(self.batch, 1) * (2 if self.dtype.is_complex else 1)


class Linearized(Protocol):
    """f with the graph of one evaluation."""

    slope: Tensor
    """f, shape (B, n), without its graph."""

    def pull(self, cotangent: Tensor, batched: bool = False) -> Tensor:
        """(df/dx)^T cotangent, shape (B, n); the graph is kept.

        Args:
            cotangent: of the slope, shape (B, n), or (m, B, n) if `batched`.
        """

    def pull_all(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, and the cotangent of the stage's time if it is wanted; what f else depends on gets its share.

        The graph is gone then.
        """


@dataclass(frozen=True)
class StageField:
    """f at one stage.

    Args:
        value: f(x), shapes (B, n), without a graph.
        graph: f(x) with a graph back to x, whatever the mode.
        linearize: f at x, with the graph that the adjoint needs.
    """

    value: Callable[[Tensor], Tensor]
    graph: Callable[[Tensor], Tensor]
    linearize: Callable[[Tensor], Linearized]


class GraphOf:
    """`Linearized` for f as a function of the state alone."""

    def __init__(self, graph: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.enable_grad():
            self.leaf = x.detach().requires_grad_()
            self.result = graph(self.leaf)
        self.slope = self.result.detach()

    def pull(self, cotangent: Tensor, batched: bool = False) -> Tensor:
        if not self.result.requires_grad:
            return torch.zeros_like(cotangent)
        (product,) = torch.autograd.grad(
            self.result, self.leaf, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return torch.zeros_like(cotangent) if product is None else product

    def pull_all(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.pull(cotangent), None


def stage_field(function: Callable[[Tensor], Tensor], layout: Layout) -> StageField:
    """f at one stage, for a forward solve.

    Args:
        function: f as a function of a host's state.
        layout: how that is laid out.
    """

    def graph(x: Tensor) -> Tensor:
        return layout.flat(function(layout.shaped(x)))

    def value(x: Tensor) -> Tensor:
        with torch.no_grad():
            return graph(x).detach()

    return StageField(value, graph, lambda x: GraphOf(graph, x))


def rows_at_a_time(batch: int, n: int) -> int:
    """How many rows of each block are made at a time."""
    return max(1, min(n, _CHUNK_ELEMENTS // max(1, batch * n)))


def jacobian(linearized: Linearized) -> Tensor:
    """df/dx, shape (B, n, n), by vector-Jacobian products with the n unit vectors, each for the whole batch at once.

    They are vectorised as in torch.func.jacrev, or made one by one where f has an operation that can't be.
    """
    batch, n = linearized.slope.shape
    unit = torch.eye(n, dtype=linearized.slope.dtype, device=linearized.slope.device)
    rows = []
    for part in unit.split(rows_at_a_time(batch, n)):
        basis = part[:, None, :].expand(-1, batch, -1)
        try:
            rows.append(linearized.pull(basis, batched=True))
        except RuntimeError:  # an autograd.Function without a rule for vmap; anything else is raised again
            rows.append(torch.stack([linearized.pull(row.contiguous()) for row in basis]))
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).permute(1, 0, 2)


class Pushforward:
    """Jacobian-vector products of f at one point, in forward mode, or twice in reverse mode where f has no other."""

    def __init__(self, field: StageField, x: Tensor) -> None:
        self.field = field
        self.x = x.detach()
        self._transposed: tuple[Tensor, Tensor] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """(df/dx) v, shape (B, n)."""
        if self._transposed is None:
            try:
                # Requiring a gradient: else an f that differentiates may replace the state by a copy that does.
                with torch.enable_grad(), forward_ad.dual_level():
                    result = self.field.graph(forward_ad.make_dual(self.x.requires_grad_(), v))
                    tangent = forward_ad.unpack_dual(result).tangent
                return torch.zeros_like(v) if tangent is None else tangent.detach()
            except (NotImplementedError, RuntimeError):
                # Something in f has no forward mode: by two backward passes, which raise f's own errors if it has any.
                self._transposed = self._transpose()
        u, product = self._transposed
        if not product.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(product, u, v, retain_graph=True)[0]

    def _transpose(self) -> tuple[Tensor, Tensor]:
        """u and (df/dx)^T u, which is linear in u."""
        with torch.enable_grad():
            leaf = self.x.detach().clone().requires_grad_()
            slope = self.field.graph(leaf)
            u = torch.zeros_like(slope).requires_grad_()
            if not slope.requires_grad:
                return u, torch.zeros_like(slope)
            (product,) = torch.autograd.grad(slope, leaf, u, create_graph=True, allow_unused=True)
        return u, torch.zeros_like(slope.detach()) if product is None else product
