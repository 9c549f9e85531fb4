"""The graphs of a step's evaluations, each by itself: the step's stages are no functions of each other."""

from __future__ import annotations

from torch import Tensor

from ..field.cotangents import StandIns
from ..field.evaluation import Evaluation


class StageGraphs:
    """The graphs of one step's evaluations, made while the step is taken.

    Args:
        stand_ins: leaves that take the place of dependencies in the graphs.
        start: state at the step's start.
        first_slope: slope there, if it is not evaluated in the step.

    Attributes:
        evaluations: one for each stage; None for the first stage if its slope was not evaluated in the step.
        stages: states of the stages, without graphs.
        slopes: slopes, without graphs.
        nodes: number of autograd nodes of each evaluation.
    """

    def __init__(self, stand_ins: StandIns, start: Tensor, first_slope: Tensor | None = None) -> None:
        self.stand_ins = stand_ins
        self.evaluations: list[Evaluation | None] = []
        self.stages: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.nodes: list[int] = []
        if first_slope is not None:
            self.evaluations.append(None)
            self.stages.append(start)
            self.slopes.append(first_slope.clone())  # the host may hand on a view of all slopes of the step before

    def add(self, evaluation: Evaluation) -> Tensor:
        """Add the evaluation of the next stage, and return its slope without the graph."""
        slope = evaluation.slope.detach()
        self.evaluations.append(evaluation)
        self.stages.append(evaluation.argument.detach())
        self.slopes.append(slope)
        self.nodes.append(evaluation.nodes)
        return slope
