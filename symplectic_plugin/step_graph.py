"""A step with its graph: its stages, slopes and end as functions of the state and the slope at its start.

Kept where memory allows, so that a backward pass through the step is autograd's own and nothing is evaluated again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cotangents import CotangentSums
from .graphs import saved_storages
from .tableau import ButcherTableau
from .vector_field import Evaluation, Keywords, VectorField


class StepGraph:
    """The graph of one step, made while the host takes it.

    Args:
        field: the vector field.
        tableau: the method's.
        start: the state at the step's start.
        h: the step's size.
        first_slope: the slope there, if it is not evaluated in the step.

    Attributes:
        first: the evaluation that gave that slope, if it was not the last one of another step.
    """

    def __init__(
        self, field: VectorField, tableau: ButcherTableau, start: Tensor, h: float, first_slope: Tensor | None
    ) -> None:
        self.field = field
        self.h = h
        self._a, self._b = tableau.numbers
        self._begin(start.detach().requires_grad_())
        self.stages: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.first_slope: Tensor | None = None
        self.first: Evaluation | None = None
        if first_slope is not None:
            self.first_slope = first_slope.detach().requires_grad_()
            self.stages.append(self._origin)
            self.slopes.append(self.first_slope)

    def _begin(self, leaf: Tensor) -> None:
        with torch.enable_grad():
            self.leaf, self._origin = leaf, leaf.view_as(leaf)

    def take(self, evaluation: Evaluation) -> None:
        """Take the evaluation that discovered what f depends on for that of the first stage."""
        self.leaf, self._origin = evaluation.leaf, evaluation.argument
        self.stages, self.slopes = [evaluation.argument], [evaluation.slope]

    def evaluate(self, t: Tensor, state: Tensor, keywords: Keywords) -> Tensor:
        """The slope of the next stage, of which the host has computed the state; returned without its graph."""
        i = len(self.slopes)
        with torch.enable_grad():
            stage = self._combined(self._a[i]) if i else self._origin
            if i:
                stage.data.copy_(state)  # as the host rounds it; no node has saved it yet
            slope = self.field.evaluate(t.detach().clone(), stage, keywords, self.field.stand_ins)
        self.stages.append(stage)
        self.slopes.append(slope)
        return slope.detach()

    def _combined(self, weights: Sequence[float]) -> Tensor:
        """x + h sum_j w_j k_j, over the slopes that are there."""
        result = self._origin
        for weight, slope in zip(weights, self.slopes, strict=False):
            if weight != 0:
                result = torch.add(result, slope, alpha=self.h * weight)
        return result.clone() if result is self._origin else result

    def pull(
        self, adjoint: Tensor, slope_cotangents: Sequence[tuple[int, Tensor]], sums: CotangentSums, keep_graph: bool
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """Carry cotangents back to the start of the step.

        Args:
            adjoint: of the state at its end, in the state's shape.
            slope_cotangents: of slopes, beside what acts through the end, with their stages.
            sums: takes the cotangents of what f depends on.
            keep_graph: whether the graph is not to be freed.

        Returns:
            The cotangents of the state and of the first slope, each None for zero. None if the graph has something in
            it that was not found on the way forward.
        """
        with torch.enable_grad():
            outputs, cotangents = [self._combined(self._b)], [adjoint]
        for i, cotangent in slope_cotangents:
            if self.slopes[i].requires_grad:
                outputs.append(self.slopes[i])
                cotangents.append(cotangent.to(self.slopes[i].dtype))
        leaves = [self.leaf] if self.first_slope is None else [self.leaf, self.first_slope]
        if self.field.strangers(outputs, self._origin.grad_fn, leaves, sums):
            return None
        grads = torch.autograd.grad(
            outputs, [*leaves, *sums.inputs], cotangents, allow_unused=True, retain_graph=keep_graph
        )
        sums.add(grads[len(leaves) :])
        return grads[0], None if self.first_slope is None else grads[1]

    def storages(self) -> dict[int, int]:
        """The memory that it holds: the size in bytes of each storage, by its address."""
        storages = {}
        for slope in self.slopes:
            storages.update(saved_storages(slope))
        for tensor in (*self.stages, *self.slopes):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return storages

    @property
    def nodes(self) -> int:
        """How many nodes were made for it in this thread, after its first slope."""
        first, last = self.slopes[0].grad_fn or self._origin.grad_fn, self.slopes[-1].grad_fn
        return 0 if first is None or last is None else last._sequence_nr() - first._sequence_nr()
