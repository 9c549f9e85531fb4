"""One evaluation of the vector field, or those of a step at once, with the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graphs import has_storage, nodes_between, saved_storages

Keywords = Mapping[str, Any]

Kind = tuple[int, int]
"""How many nodes an evaluation made in this thread; and how many evaluations they are of, if a program made them."""


@dataclass(slots=True, eq=False)
class Evaluation:
    """One evaluation of f, or several that a program made at once, with the graph.

    Args:
        leaf: the state, where the graph ends, or where that of the state begins.
        time: the time, where the graph ends if a gradient of times is wanted.
        argument: the state as f was handed it.
        keywords: what else f was handed.
        slope: what it returned, the latest one.
        others: what else is kept with it.
        at_once: how many a program made; 0 for one that none made.
    """

    leaf: Tensor
    time: Tensor
    argument: Tensor
    keywords: Keywords
    slope: Tensor
    others: Sequence[Tensor] = ()
    at_once: int = 0

    @property
    def kind(self) -> Kind:
        """Those of a kind are taken to be as large."""
        return nodes_between(self.argument, self.slope), self.at_once

    def storages(self, behind: Iterable[Any] = ()) -> dict[int, int]:
        """The memory that it holds: the size in bytes of each storage, by its address.

        Args:
            behind: nodes of the graph that are not its own.
        """
        storages = saved_storages(self.slope, (self.argument.grad_fn, *behind))
        for tensor in (self.slope, *self.others):
            if has_storage(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        if has_storage(self.leaf):  # it may be a view of something larger, which is there anyway
            storages[self.leaf.untyped_storage().data_ptr()] = self.leaf.numel() * self.leaf.element_size()
        return storages


def require_slope(slope: Any, x: Tensor) -> Tensor:
    """What is to be a slope at state x.

    Raises:
        ValueError: if it is not a tensor of numbers of the state's shape.
    """
    if isinstance(slope, Tensor) and slope.dtype is torch.bool:
        raise ValueError("symplectic_adjoint: the vector field must return numbers, got booleans: convert them")
    if not isinstance(slope, Tensor) or slope.shape != x.shape:
        got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
        raise ValueError(
            f"symplectic_adjoint: the vector field must return a tensor of the state's shape {tuple(x.shape)}, "
            f"got {got}"
        )
    return slope
