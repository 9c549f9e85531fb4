"""Recomputing steps of a solve in the backward pass: their slopes, their graphs, or the state at their end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..field.cotangents import StandIns
from ..field.random_numbers import GeneratorStates
from ..field.vector_field import VectorField
from ..methods.explicit import explicit_step
from ..methods.tableau import ButcherTableau
from ..record.checkpoint import Checkpoint
from ..record.method import Reevaluation, Step
from ..record.stage_graphs import StageGraphs


class StepEvaluations:
    """f at the stages of one step of an explicit method, evaluated again.

    Args:
        field: the vector field.
        checkpoint: the step's.
        times: times of its stages, scalar tensors.
    """

    def __init__(self, field: VectorField, checkpoint: Checkpoint, times: Sequence[Tensor]) -> None:
        self.field = field
        self.step: Step = checkpoint.step
        self.times = times
        self.keywords = checkpoint.method.stage_keywords(checkpoint.step)

    def slopes(
        self, tableau: ButcherTableau, start: Tensor, first_slope: Tensor | None
    ) -> tuple[list[Tensor | None], list[GeneratorStates | None]]:
        """Evaluate the slopes that the stages are made of, without graphs.

        Where f draws random numbers, all evaluations are made, in the order in which the host made them.

        Args:
            tableau: the method's coefficients, perhaps with one more stage for outputs.
            start: state at the step's start.
            first_slope: first slope, if it was handed on and is not to be evaluated again.

        Returns:
            The slopes, None for those that no stage is made of; and the states of the random number generators before
            each evaluation, None if f does not draw.
        """
        field, draws_in_step = self.field, self.step.draws is not None
        draws: list[GeneratorStates | None] = [None] * tableau.stages
        given = first_slope if self.step.slope_handed_on else None

        def slope_at(i: int, stage: Tensor) -> Tensor | None:
            self._set_generators(i)
            if draws_in_step:
                draws[i] = field.generators.place
            if not (tableau.later[i] or (draws_in_step and i < tableau.stages - 1)):
                return None
            field.report.recomputed += 1
            return field(self.times[i], stage, self.keywords[i])

        if given is not None:
            self._set_generators(0)
        return explicit_step(tableau, slope_at, start, self.step.h, given), draws

    def graphs(
        self,
        tableau: ButcherTableau,
        start: Tensor,
        first_slope: Tensor | None,
        stand_ins: StandIns,
        *,
        want_time: bool,
    ) -> StageGraphs:
        """Evaluate all slopes with their graphs.

        Args:
            tableau: the method's coefficients.
            start: state at the step's start.
            first_slope: first slope, if it was handed on and is not to be evaluated again.
            stand_ins: leaves that take the place of dependencies.
            want_time: whether the products with df/dt will be needed.
        """
        field = self.field
        if self.step.slope_handed_on and first_slope is None:
            field.report.recomputed += 1
            first_slope = field(self.times[0], start, self.keywords[0])
        given = first_slope if self.step.slope_handed_on else None
        graphs = StageGraphs(stand_ins, start, given)

        def slope_at(i: int, stage: Tensor) -> Tensor:
            self._set_generators(i)
            field.report.recomputed += 1
            return graphs.add(
                field.differentiable(self.times[i], stage, self.keywords[i], stand_ins, want_time=want_time)
            )

        explicit_step(tableau, slope_at, start, self.step.h, given)
        return graphs

    def _set_generators(self, i: int) -> None:
        if (before := self.step.draws_before(i)) is not None:
            self.field.generators.draw_again_from(before)


def advance(
    field: VectorField, checkpoint: Checkpoint, state: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Take a step again as the host did, with the same values to the last bit.

    Args:
        field: the vector field.
        checkpoint: the step's.
        state: state at the step's start.
        slope: slope there, if it is handed on.

    Returns:
        The state at the step's end, and the slope there if it is handed on.
    """
    step, method = checkpoint.step, checkpoint.method
    with torch.no_grad():
        state, slope = state.detach(), None if slope is None else slope.detach()
        if method.hands_on_slope and (slope is None or not step.slope_handed_on):
            if (before := step.draws_before(0)) is not None:
                field.generators.draw_again_from(before)
            slope = Reevaluation(field)(method.stage_times([step])[0][0], state, **step.first_keywords)
        return method.take_step(Reevaluation(field, step.draws), step, state, slope)
