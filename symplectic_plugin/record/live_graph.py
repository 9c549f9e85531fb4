"""The live graph of a solve: autograd's own, from the initial state through every step to the outputs.

Backward passes are plain backpropagation then: no part of the adjoint sweep stands between the solution and autograd.
Nothing here looks at the nodes of a step (see `field.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods.explicit import weighted_sum
from .method import Method


class LiveStep:
    """One step of a live graph.

    Args:
        method: the method.
        origin: state at the step's start, with its history.
        h: step size.
        first_slope: slope there with its history, if it is there already.
        nodes: number of autograd nodes of the first slope's evaluation, if that is counted in the step.

    Attributes:
        stages: states of the stages.
        slopes: slopes.
        nodes: number of autograd nodes of each evaluation in the step.
    """

    def __init__(
        self, method: Method, origin: Tensor, h: float, first_slope: Tensor | None = None, nodes: Sequence[int] = ()
    ) -> None:
        self.origin = origin
        self.h = h
        self._tableau = method.tableau
        self.stages: list[Tensor] = [] if first_slope is None else [origin]
        self.slopes: list[Tensor] = [] if first_slope is None else [first_slope]
        self.nodes = list(nodes)
        self._end: Tensor | None = None

    def next_stage(self, value: Tensor) -> Tensor:
        """Return the next stage with its history, and with the value as the host rounds it. Grad must be enabled."""
        i = len(self.slopes)
        if i == 0:
            return self.origin
        stage = weighted_sum(self.origin, self._tableau.numbers[0][i], self.slopes, self.h)
        stage = stage.clone() if stage is self.origin else stage
        stage.data.copy_(value)  # no node has saved the stage yet
        return stage

    @property
    def end(self) -> Tensor:
        """State at the step's end, with its history."""
        if self._end is None:
            if self._tableau.first_same_as_last:
                self._end = self.stages[self._tableau.stages - 1]
            else:
                with torch.enable_grad():
                    self._end = weighted_sum(self.origin, self._tableau.numbers[1], self.slopes, self.h)
        return self._end

    def ends_in(self, end: Tensor) -> None:
        """Set the state at the end, where the caller has computed it with its history."""
        self._end = end

    def end_at(self, value: Tensor) -> None:
        """Give the state at the end the value that the host has computed, where the end is computed here."""
        if self._end is None and self.end is not self.stages[-1] and self.end is not self.origin:
            self.end.data.copy_(value)  # no node has saved the end yet
