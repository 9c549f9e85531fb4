"""Taking the steps of a recorded solve again, without graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kept import Kept
from .randomness import GeneratorStates
from .runge_kutta import combined
from .tableau import ButcherTableau
from .trajectory import Trajectory
from .vector_field import VectorField

_CHUNK = 64
"""For how many steps the stages' times are made at once."""


class Retaker:
    """Takes steps again.

    Args:
        trajectory: the solve.
        field: its vector field.
    """

    def __init__(self, trajectory: Trajectory, field: VectorField) -> None:
        self.trajectory = trajectory
        self.field = field
        self._times: dict[int, Sequence[Sequence[Tensor]]] = {}

    def stage_times(self, n: int) -> Sequence[Tensor]:
        """The times of the stages of step n, of which those of its neighbours are made as well."""
        chunk = n // _CHUNK
        if chunk not in self._times:
            if len(self._times) > 1:
                del self._times[next(iter(self._times))]
            steps = self.trajectory.steps[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            self._times[chunk] = self.trajectory.stage_times(steps)
        return self._times[chunk][n % _CHUNK]

    def take(
        self, tableau: ButcherTableau, n: int, start: Tensor, slope: Tensor | None
    ) -> tuple[list[Tensor | None], list[GeneratorStates | None]]:
        """Take a step as far as the slopes that its stages are made of.

        Where f draws random numbers, all evaluations are made in the order in which the host made them.

        Args:
            tableau: the method's, or that with one more stage.
            n: which step.
            start: the state at its start.
            slope: its first slope, if it was handed on and is not to be evaluated again.

        Returns:
            The slopes, None for those that no stage is made of; and where the random number generators were before
            each evaluation, if f draws.
        """
        field, step = self.field, self.trajectory.steps[n]
        times, keywords = self.stage_times(n), self.trajectory.stage_keywords(step)
        rows, later = tableau.numbers[0], tableau.later
        draws: list[GeneratorStates | None] = [None] * tableau.stages
        slopes: list[Tensor | None] = []
        for i in range(tableau.stages):
            if (before := step.draws_before(i)) is not None:
                field.generators.set(before)
            if step.draws is not None:
                draws[i] = field.generators.states()
            current = slope if i == 0 and step.slope_handed_on else None
            if current is None and (later[i] or (step.draws is not None and i < tableau.stages - 1)):
                current = field(times[i], combined(start, rows[i], slopes, step.h), keywords[i])
                field.report.recomputed += 1
            slopes.append(current)
        return slopes, draws

    def advance(self, kept: Kept, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take a step from what is at its start to what is at its end, as the host did: the same to the last bit."""
        return advance(self.trajectory, self.field, kept.step, state, slope)


def advance(
    trajectory: Trajectory, field: VectorField, n: int, state: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Take step n from the state at its start, and the slope if it is handed on, to those at its end."""
    step = trajectory.steps[n]

    def evaluate(t: Tensor, x: Tensor, **keywords: Any) -> Tensor:
        field.report.recomputed += 1
        return field(t, x, keywords)

    with torch.no_grad():
        if trajectory.hands_on_slope and (slope is None or not step.slope_handed_on):
            if (before := step.draws_before(0)) is not None:
                field.generators.set(before)
            slope = evaluate(trajectory.stage_times([step])[0][0], state, **step.first_keywords)
        if step.draws is not None:
            field.generators.set(step.draws)
        return trajectory.take_step(evaluate, step, state, slope)
