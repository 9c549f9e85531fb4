"""Taking the steps of a recorded solve again, without graphs or with that of one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..field.cotangents import StandIns
from ..field.random_numbers import GeneratorStates
from ..field.vector_field import VectorField
from ..methods.explicit import combined
from ..methods.tableau import ButcherTableau
from ..record.kept import Graph, Kept
from ..record.stage_graphs import StageGraphs
from ..record.step_graph import StepGraph
from ..record.trajectory import TimesOfSteps, Trajectory


class Retaker:
    """Takes steps again.

    Args:
        trajectory: the solve.
        field: its vector field.
    """

    def __init__(self, trajectory: Trajectory, field: VectorField) -> None:
        self.trajectory = trajectory
        self.field = field
        self.stage_times = TimesOfSteps(trajectory.steps, trajectory.stage_times)

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
        times, keywords = self.stage_times[n], self.trajectory.stage_keywords(step)
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

    def graph(
        self, n: int, start: Tensor, slope: Tensor | None, stand_ins: StandIns, by_stage: bool, want_time: bool
    ) -> Graph:
        """The graph of a step, made again.

        Args:
            n: which step.
            start: the state at its start.
            slope: its first slope, if it was handed on and is not to be evaluated again.
            stand_ins: what takes the place of dependencies in it.
            by_stage: whether it is to be a graph for each evaluation.
            want_time: whether the products with df/dt will be needed, of each evaluation.
        """
        field, tableau, step = self.field, self.trajectory.tableau, self.trajectory.steps[n]
        times, keywords = self.stage_times[n], self.trajectory.stage_keywords(step)
        if step.slope_handed_on and slope is None:
            slope = field(times[0], start, keywords[0])
            field.report.recomputed += 1
        first = slope if step.slope_handed_on else None
        graph: Graph
        if by_stage:
            graph = StageGraphs(field, start, first, want_time)
        else:
            graph = StepGraph(field, tableau, start, step.h, first)
        graph.stand_ins = stand_ins
        missing = slice(len(graph.slopes), tableau.stages)
        at_once = self.trajectory.at_once
        if (
            at_once is not None
            and isinstance(graph, StepGraph)
            and at_once(graph, times[missing], keywords[missing], first is not None)
        ):
            field.report.recomputed += missing.stop - missing.start
            return graph
        for i in range(missing.start, missing.stop):
            if (before := step.draws_before(i)) is not None:
                field.generators.set(before)
            if isinstance(graph, StepGraph):
                with torch.enable_grad():
                    graph.add_stage(times[i], None, keywords[i])
            else:
                graph.evaluate(times[i], combined(start, tableau.numbers[0][i], graph.slopes, step.h), keywords[i])
            field.report.recomputed += 1
        return graph

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
