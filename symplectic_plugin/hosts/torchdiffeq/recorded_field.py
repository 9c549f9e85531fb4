"""The vector field as torchdiffeq's solvers call it, and what is noted of its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb

from ...field.cotangents import StandIns
from ...field.evaluation import Evaluation, Keywords
from ...field.random_numbers import GeneratorStates
from ...field.vector_field import VectorField
from ...methods.explicit import combined
from ...methods.tableau import ButcherTableau
from ...record.kept import Graph
from ...record.step_graph import StepGraph
from ...record.trajectory import Step
from .step_at_once import StepAtOnce


class RecordedField:
    """The vector field as the base solver calls it: without graphs, but for the one that shows what it depends on."""

    def __init__(self, field: VectorField, func: Any, initial: Tensor) -> None:
        self.field = field
        self.func = func
        self.initial = initial
        self.on_discovery: Callable[[Evaluation], bool] | None = None
        # A step of the method with it, compiled, if that is wanted.
        self.at_once: StepAtOnce | None = None
        self.want_time = False
        self.evaluated_after_jump = False
        # Where the generators were, if f draws: before the first evaluation of this step, before the latest one, and
        # before the one outside of a step that gave its first slope.
        self.draws: GeneratorStates | None = None
        self.last_draw: GeneratorStates | None = None
        self.first_draw: GeneratorStates | None = None
        # Whether the graphs of all steps are to be one, which goes on behind the initial state.
        self.whole = False
        # The evaluation that gave the solve's first slope; the states of this step's stages, how many it will evaluate,
        # and its graph, if that is to be kept.
        self.first: Evaluation | None = None
        self.stages: list[Any] = []
        self.expected = 0
        self.graph: Graph | None = None
        self.has_room_for: Callable[[Graph], bool] = lambda graph: True

    def begin_step(self, evaluations: int, graph: Graph | None) -> None:
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

    def take_step(
        self,
        tableau: ButcherTableau,
        step: Step,
        times: Sequence[Tensor],
        keywords: Sequence[Keywords],
        y: Tensor,
        following: Sequence[tuple[float, Sequence[Tensor]]] = (),
    ) -> tuple[Tensor, Tensor]:
        """What a step that has begun adds to the state y, and its first slope; its stages are computed here.

        Args:
            tableau: the method's.
            step: the step.
            times: of its stages.
            keywords: to be passed on to f for them.
            y: the state at its start.
            following: the sizes and times of steps that may be taken at once with it.
        """
        a, b = tableau.numbers
        stages = list(zip(times, a, keywords, strict=False))  # there may be one more time
        slopes: list[Tensor] = []
        if self.on_discovery is not None:
            slopes.append(self._evaluate(times[0], y, keywords[0], True))
            self.stages.append(y)
        at_once = self.take_at_once(times[: len(a)], keywords[: len(a)], step.h, y, following=following)
        if at_once is not None:
            slopes = at_once
        elif isinstance(graph := self.graph, StepGraph):
            with torch.enable_grad():
                for t, _, of_stage in stages[len(slopes) :]:
                    self._count()
                    graph.add_stage(t, None, of_stage)
                    if not self.has_room_for(graph):
                        self.graph = None
                        slopes, self.stages = ([x.detach() for x in of] for of in (graph.slopes, graph.stages))
                        break
        if isinstance(self.graph, StepGraph):
            return self.graph.moved.detach(), self.graph.slopes[0].detach()
        for t, row, of_stage in stages[len(slopes) :]:
            stage = combined(y, row, slopes, step.h)
            slopes.append(self._evaluate(t, stage, of_stage, True))
            self.stages.append(stage)
        return combined(None, b, slopes, step.h), slopes[0]

    def take_at_once(
        self,
        times: Sequence[Tensor],
        keywords: Sequence[Keywords],
        h: float | None,
        y: Tensor,
        slope: Tensor | None = None,
        following: Sequence[tuple[float, Sequence[Tensor]]] = (),
    ) -> list[Tensor] | None:
        """The slopes of a step that has begun, if there is a program that evaluates them at once.

        Args:
            times: of the stages whose slopes are to be evaluated.
            keywords: to be passed on to f for them.
            h: the step's size, if it is known.
            y: the state at its start.
            slope: the slope there, if it is not to be evaluated.
            following: the sizes and times of steps that may be taken at once with it.
        """
        graph, at_once = self.graph, self.at_once
        if at_once is None or h is None or self.on_discovery is not None:
            return None
        if graph is None:
            taken = at_once.without_graph(times, keywords, h, y, slope)
            if taken is None:
                return None
            self.stages, slopes = [*([y] if slope is None else []), *taken.stages], taken.slopes
        elif isinstance(graph, StepGraph) and at_once(graph, times, keywords, slope is not None, following):
            given = 0 if slope is None else 1
            self.stages, slopes = graph.stages[given:], graph.slopes[given:]
            if not self.has_room_for(graph):
                self.graph = None
                self.stages, slopes = ([x.detach() for x in of] for of in (self.stages, slopes))
        else:
            return None
        self.field.report.evaluations += len(times)
        return slopes

    def _count(self) -> None:
        """Note that f is about to be evaluated."""
        field = self.field
        field.report.evaluations += 1
        if field.draws:
            self.last_draw = field.generators.states()
            self.draws = self.draws or self.last_draw

    def _evaluate(self, t: Tensor, y: Tensor, keywords: Keywords, in_step: bool) -> Tensor:
        self._count()
        if self.on_discovery is not None:
            return self._discover(t, y, keywords, in_step)
        if in_step and self.graph is not None:
            slope = self.graph.evaluate(t, y, keywords)
            if not self.has_room_for(self.graph):
                self.graph = None
            return slope
        return self.field(t, y, keywords)

    def _discover(self, t: Tensor, y: Tensor, keywords: Keywords, in_step: bool) -> Tensor:
        assert self.on_discovery is not None
        begin, self.on_discovery = self.on_discovery, None
        before = self.field.generators.states()
        is_initial = y.shape == self.initial.shape and y.data_ptr() == self.initial.data_ptr()
        self.whole = self.whole and is_initial and not self.want_time  # the graph of all steps has no times in it
        y = self.initial if self.whole else y
        evaluation = self.field.discover(t, y, keywords, self.want_time, self.whole)
        if self.field.draws:
            self.first_draw = self.last_draw = self.draws = before
        slope = evaluation.slope
        if torch.promote_types(slope.dtype, y.dtype) != y.dtype:
            raise ValueError(
                f"symplectic_adjoint: func returned {slope.dtype} for a state of {y.dtype}: return the state's dtype, "
                "or give y0 in the wider one"
            )
        if not begin(evaluation) or (self._stand_ins_in(evaluation) is None and not self.whole):
            self.graph = None
        elif not in_step:
            self.first = evaluation
        elif self.graph is not None:
            self.take_first(self.graph, evaluation)
        return slope.detach()

    def take_first(self, graph: Graph, evaluation: Evaluation) -> None:
        """Have the graph of the first step begin with the first evaluation."""
        graph.take(evaluation, self._stand_ins_in(evaluation))

    def _stand_ins_in(self, evaluation: Evaluation) -> StandIns | None:
        """What takes the place of dependencies in the first evaluation, as for `StepGraph`."""
        ends = evaluation.leaf.is_leaf and not self.field.stand_ins
        return self.field.stand_ins if ends else None
