"""A step's evaluations, each with a graph of its own: its stages are no functions of each other.

Kept where memory allows, but a step's own graph (step_graph.py) can't be made: that has the step's times in it as
numbers, so that these get no gradient, and must be known beforehand.
"""

from __future__ import annotations

from torch import Tensor

from ..field.cotangents import StandIns
from ..field.evaluation import Evaluation, Keywords, Kind
from ..field.vector_field import VectorField


class StageGraphs:
    """The graphs of one step's evaluations, made while it is taken.

    Args:
        field: the vector field.
        start: the state at the step's start.
        first_slope: the slope there, if it is not evaluated in the step.
        want_time: whether the products with df/dt will be needed.

    Attributes:
        evaluations: by stage; None for the first one if its slope was not evaluated in the step.
        stages: the states of the stages.
        slopes: the slopes, without graphs.
        stand_ins: what takes the place of dependencies in them.
        kinds: of each evaluation.
        size: the bytes that they keep, once they have been counted.
        before, index: as for a step's graph that goes on from no other.
    """

    before: None = None
    index = 0

    def __init__(self, field: VectorField, start: Tensor, first_slope: Tensor | None, want_time: bool) -> None:
        self.field = field
        self._want_time = want_time
        self.stand_ins: StandIns | None = field.stand_ins
        self.size = 0
        self.evaluations: list[Evaluation | None] = []
        self.stages: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.kinds: list[Kind] = []
        if first_slope is not None:
            self.evaluations.append(None)
            self.stages.append(start)
            self.slopes.append(first_slope.clone())  # it may be a view of all slopes of the step before

    def take(self, evaluation: Evaluation, stand_ins: StandIns | None) -> None:
        """Take an evaluation that was made already for that of the first stage: as a step's graph does."""
        self.stand_ins = stand_ins
        self.evaluations, self.stages, self.slopes, self.kinds = [], [], [], []
        self.add(evaluation)

    def evaluate(self, t: Tensor, state: Tensor, keywords: Keywords) -> Tensor:
        """The slope of the next stage, returned without its graph."""
        self.add(self.field.differentiable(t, state, keywords, self._want_time, self.stand_ins))
        return self.slopes[-1]

    def add(self, evaluation: Evaluation) -> None:
        """Take an evaluation for that of the next stage."""
        self.evaluations.append(evaluation)
        self.stages.append(evaluation.argument.detach())
        self.slopes.append(evaluation.slope.detach())
        self.kinds.append(evaluation.kind)

    @property
    def latest(self) -> Evaluation:
        """The latest evaluation."""
        evaluation = self.evaluations[-1]
        assert evaluation is not None
        return evaluation
