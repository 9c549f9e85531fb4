"""One evaluation of the vector field, with its graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .graphs import nodes_between, saved_storages

Keywords = Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Evaluation:
    """One evaluation of f, with its graph.

    Args:
        leaf: the state, where the graph ends, or where that of the state begins.
        time: the time, where the graph ends if a gradient of times is wanted.
        argument: the state as f was handed it.
        keywords: what else f was handed.
        slope: what it returned.
    """

    leaf: Tensor
    time: Tensor
    argument: Tensor
    keywords: Keywords
    slope: Tensor

    @property
    def nodes(self) -> int:
        """How many nodes it made in this thread."""
        return nodes_between(self.argument, self.slope)

    def storages(self, behind: Iterable[Any] = ()) -> dict[int, int]:
        """The memory that it holds: the size in bytes of each storage, by its address.

        Args:
            behind: nodes of the graph that are not its own.
        """
        storages = saved_storages(self.slope, (self.argument.grad_fn, *behind))
        if self.slope.layout is torch.strided:
            storages[self.slope.untyped_storage().data_ptr()] = self.slope.untyped_storage().nbytes()
        if self.leaf.layout is torch.strided:  # it may be a view of something larger, which is there anyway
            storages[self.leaf.untyped_storage().data_ptr()] = self.leaf.numel() * self.leaf.element_size()
        return storages
