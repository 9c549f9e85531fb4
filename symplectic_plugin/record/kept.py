"""What is kept of one step."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from .stage_graphs import StageGraphs
from .step_graph import StepGraph

Graph = StepGraph | StageGraphs
"""What may be kept of a step with its graph."""


class Kept:
    """What is kept of one step.

    Args:
        previous: the step that ends where this one starts, if it can be had by taking that one again.
        state: the state at its start.
        slope: the slope there, if it was handed on and can't be evaluated again.
        stages: the states of its stages, the first of them left out; for an implicit method what they are made of, see
            `ImplicitSolve`.
        graph: its graph, or those of its evaluations.
        step: whatever `Advance` knows the step by.
        end: the state at its end, as long as no step follows that keeps it.

    Attributes:
        index: how many steps lead here from one that has no `previous`.
    """

    __slots__ = (
        "__weakref__", "_checkpoints", "end", "graph", "graph_size", "index", "previous", "size", "slope", "stages",
        "stages_size", "state", "step",
    )  # fmt: skip

    def __init__(
        self,
        previous: Kept | None,
        state: Tensor,
        slope: Tensor | None,
        stages: list[Tensor] | None,
        graph: Graph | None,
        step: Any = None,
        end: Tensor | None = None,
    ) -> None:
        self.previous = previous
        self.end = end
        if previous is not None:
            previous.end = None
        self.index: int = 0 if previous is None else previous.index + 1
        self.state: Any = state
        self.slope: Any = slope
        self.stages = stages
        self.graph = graph
        self.step = step
        self.size = self.stages_size = self.graph_size = 0
        self._checkpoints: weakref.ref[Any] | None = None

    def __del__(self) -> None:
        if self._checkpoints is not None and (checkpoints := self._checkpoints()) is not None:
            checkpoints.release(self)
