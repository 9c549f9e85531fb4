"""One evaluation of the vector field, with its autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import has_storage
from .graphs import saved_storages

Keywords = Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Evaluation:
    """One evaluation of f with its graph.

    Args:
        leaf: the state, in which the graph ends.
        time: the time, in which the graph ends too if a gradient of times is wanted.
        argument: the state as f was handed it, a view of the leaf.
        keywords: further arguments that f was handed.
        slope: the value that f returned, in the shape of the state.
        nodes: number of autograd nodes that the evaluation made in this thread. Evaluations with the same number are
            taken to be of the same size.
    """

    leaf: Tensor
    time: Tensor
    argument: Tensor
    keywords: Keywords
    slope: Tensor
    nodes: int = 0

    def storages(self, behind: Iterable[Any] = ()) -> dict[int, int]:
        """Find the memory that the evaluation holds.

        Args:
            behind: autograd nodes at which the graph of something else begins.

        Returns:
            The size in bytes of each storage, by its address.
        """
        storages = saved_storages(self.slope, (self.argument.grad_fn, *behind))
        if has_storage(self.slope):
            storages[self.slope.untyped_storage().data_ptr()] = self.slope.untyped_storage().nbytes()
        if has_storage(self.leaf):  # the leaf may be a view of something larger, which is there anyway
            storages[self.leaf.untyped_storage().data_ptr()] = self.leaf.numel() * self.leaf.element_size()
        return storages


def require_slope(slope: Any, x: Tensor) -> Tensor:
    """Require a slope to be a tensor of numbers in the shape of the state.

    Args:
        slope: the value that f returned.
        x: the state that f was handed.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(slope, Tensor) and slope.dtype.is_floating_point and slope.shape == x.shape:
        return slope
    if not isinstance(slope, Tensor) or slope.shape != x.shape:
        got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
        raise ValueError(
            f"symplectic_adjoint: the vector field must return a tensor of the state's shape {tuple(x.shape)}, "
            f"got {got}"
        )
    if slope.dtype is torch.bool:
        raise ValueError("symplectic_adjoint: the vector field must return numbers, got booleans: convert them")
    return slope
