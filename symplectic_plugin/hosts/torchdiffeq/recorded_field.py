"""The vector field as torchdiffeq's solvers call it, and what is noted of its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb, _PerturbFunc

from ...randomness import GeneratorStates
from ...runge_kutta import combined
from ...step_graph import StepGraph
from ...tableau import ButcherTableau
from ...trajectory import Step
from ...vector_field import Evaluation, Keywords, VectorField


class Unperturbed:
    """The vector field without the outermost of torchdiffeq's wrappers, where that does nothing.

    It moves a time to its neighbour on request, and puts it into the state's precision, at a cost that a small network
    feels.
    """

    def __init__(self, func: Any) -> None:
        self.func = func
        self.inner = func.base_func if type(func) is _PerturbFunc else func

    def __call__(self, t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Any:
        if perturb is Perturb.NONE and (t.dtype == y.dtype or self.inner is self.func):
            return self.inner(t, y)
        return self.func(t, y, perturb=perturb)


class RecordedField:
    """The vector field as the base solver calls it: without graphs, but for the one that shows what it depends on."""

    def __init__(self, field: VectorField, func: Any, initial: Tensor) -> None:
        self.field = field
        self.func = func
        self.initial = initial
        self.on_discovery: Callable[[Evaluation], bool] | None = None
        self.want_time = False
        self.evaluated_after_jump = False
        # Where the generators were, if f draws: before the first evaluation of this step, before the latest one, and
        # before the one outside of a step that gave its first slope.
        self.draws: GeneratorStates | None = None
        self.last_draw: GeneratorStates | None = None
        self.first_draw: GeneratorStates | None = None
        # The evaluation that gave the solve's first slope; the states of this step's stages, how many it will evaluate,
        # and its graph, if that is to be kept.
        self.first: Evaluation | None = None
        self.stages: list[Any] = []
        self.expected = 0
        self.graph: StepGraph | None = None
        self.latest_stage: Tensor | None = None
        self.has_room_for: Callable[[StepGraph], bool] = lambda graph: True

    def begin_step(self, evaluations: int, graph: StepGraph | None) -> None:
        """Forget what was noted of the evaluations before."""
        self.evaluated_after_jump = False
        self.draws = None
        self.stages = []
        self.expected, self.graph = evaluations, graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)  # the callbacks

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        if perturb is Perturb.NEXT:
            self.evaluated_after_jump = True
        in_step = len(self.stages) < self.expected
        # A copy of the time, for the graph: the caller's may be changed in place.
        t = t.detach().clone() if in_step and self.graph is not None else t
        slope = self._evaluate(t, y, {} if perturb is Perturb.NONE else {"perturb": perturb}, in_step)
        if in_step:
            self.stages.append(y)
        return slope

    def take_step(self, tableau: ButcherTableau, step: Step, times: Sequence[Tensor], keywords: Any, y: Tensor) -> Any:
        """What a step that has begun adds to the state y, and its first slope; its stages are computed here."""
        a, b = tableau.numbers
        slopes: list[Tensor] = []
        for t, row, of_stage in zip(times, a, keywords, strict=False):  # there may be one more time
            stage = combined(y, row, slopes, step.h) if self.graph is None or not slopes else None
            slopes.append(self._evaluate(t, stage, of_stage, True))
            self.stages.append(self.latest_stage if stage is None else stage)
        moved = combined(None, b, slopes, step.h) if self.graph is None else self.graph.moved.detach()
        return moved, slopes[0]

    def _evaluate(self, t: Tensor, y: Tensor | None, keywords: Keywords, in_step: bool) -> Tensor:
        field = self.field
        field.report.evaluations += 1
        if self.on_discovery is not None:
            assert y is not None
            return self._discover(t, y, keywords, in_step)
        if field.draws:
            self.last_draw = field.generators.states()
            self.draws = self.draws or self.last_draw
        if in_step and self.graph is not None:
            slope = self.graph.evaluate(t, y, keywords)
            self.latest_stage = self.graph.stages[-1].detach()
            if not self.has_room_for(self.graph):
                self.graph = None
            return slope
        assert y is not None
        return field(t, y, keywords)

    def _discover(self, t: Tensor, y: Tensor, keywords: Keywords, in_step: bool) -> Tensor:
        assert self.on_discovery is not None
        begin, self.on_discovery = self.on_discovery, None
        before = self.field.generators.states()
        evaluation = self.field.discover(t, y, keywords, self.want_time)
        if self.field.draws:
            self.first_draw = self.last_draw = self.draws = before
        slope = evaluation.slope
        if torch.promote_types(slope.dtype, y.dtype) != y.dtype:
            raise ValueError(
                f"symplectic_adjoint: func returned {slope.dtype} for a state of {y.dtype}: return the state's dtype, "
                "or give y0 in the wider one"
            )
        wanted = begin(evaluation) and not self.field.stand_ins
        if in_step:
            self.graph = self.graph if wanted else None
            if self.graph is not None:
                self.graph.take(evaluation)
        elif wanted:
            self.first = evaluation
        return slope.detach()
