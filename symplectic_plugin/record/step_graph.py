"""A step with its graph: its stages, slopes and end as functions of the state and the slope at its start.

Kept where memory allows, so that a backward pass through the step is autograd's own and nothing is evaluated again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..field.cotangents import NO_STAND_INS, CotangentSums, StandIns
from ..field.evaluation import Evaluation, Keywords, Kind
from ..field.graphs import nodes_between, vjp
from ..field.step_program import StepProgram, TakenStep
from ..field.vector_field import VectorField
from ..methods.explicit import combined
from ..methods.tableau import ButcherTableau


class StepGraph:
    """The graph of one step, made while it is taken.

    Args:
        field: the vector field.
        tableau: the method's.
        start: the state at the step's start.
        h: the step's size.
        first_slope: the slope there, if it is not evaluated in the step.
        before: the step before, if this one's graph is to go on from its end.

    Attributes:
        origin: the state at the start, as the stages are made of it.
        leaf: where the graph ends: in the state at the start of the first of the steps that go on from each other.
        index: how many steps there are from that to this one.
        stand_ins: what takes the place of dependencies in it; None if it leads to these, and behind the initial state,
            so that it can't be gone back through by itself.
        stages: the states of the stages.
        slopes: the slopes.
        first_slope: the slope at the start, if the graph ends in that too.
        evaluations: how many there are in it.
        kinds: of each of them, or of those that a program made at once; none if they are counted in a step before.
        size: the bytes that it keeps, with the steps that it goes on from, once they have been counted.
    """

    def __init__(
        self,
        field: VectorField,
        tableau: ButcherTableau,
        start: Tensor,
        h: float,
        first_slope: Tensor | None = None,
        before: StepGraph | None = None,
    ) -> None:
        self.field = field
        self.tableau = tableau
        self.h = h
        self.before = before
        self.size = 0
        self.leaf: Tensor
        self.index: int
        self.stand_ins: StandIns | None
        self._end: Tensor | None = None
        self._moved: Tensor | None = None
        self.stages: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self.evaluations = self._at_once = 0
        self.kinds: list[Kind] = []
        # What the program that took this step has taken beyond it.
        self._following: list[TakenStep] = []
        self.first_slope: Tensor | None = None
        if before is not None:
            self.leaf, self.origin, self.index = before.leaf, before.end, before.index + 1
            self.stand_ins = before.stand_ins
            if first_slope is not None:
                self.stages, self.slopes = [self.origin], [before.slopes[-1]]
            return
        self.index = 0
        self.stand_ins = field.stand_ins
        with torch.enable_grad():
            self.leaf = start.detach().requires_grad_()
            self.origin = self.leaf.view_as(self.leaf)
        if first_slope is not None:
            self.first_slope = first_slope.detach().requires_grad_()
            self.stages.append(self.origin)
            self.slopes.append(self.first_slope)

    def take(self, evaluation: Evaluation, stand_ins: StandIns | None) -> None:
        """Take an evaluation that was made already for that of the first stage.

        Args:
            evaluation: f at the step's start.
            stand_ins: what takes the place of dependencies in it.
        """
        self.leaf, self.origin, self.stand_ins, self.first_slope = evaluation.leaf, evaluation.argument, stand_ins, None
        self.stages, self.slopes, self.kinds = [evaluation.argument], [evaluation.slope], [evaluation.kind]
        self.evaluations = 1

    def evaluate(self, t: Tensor, state: Tensor, keywords: Keywords) -> Tensor:
        """The slope of the next stage, returned without its graph.

        Args:
            t: time, a tensor that nobody changes.
            state: the stage as the host has computed it.
            keywords: passed on to f.
        """
        with torch.enable_grad():
            self.add_stage(t, state, keywords)
        return self.slopes[-1].detach()

    def add_stage(self, t: Tensor, state: Tensor | None, keywords: Keywords) -> None:
        """Evaluate the slope of the next stage, where grad is enabled; the stage is computed here without a state."""
        i = len(self.slopes)
        stage = combined(self.origin, self.tableau.numbers[0][i], self.slopes, self.h)
        if i and state is not None:
            stage = stage.clone() if stage is self.origin else stage
            stage.data.copy_(state)  # as the host rounds it; no node has saved it yet
        slope = self.field.evaluate(t, stage, keywords, self.stand_ins or NO_STAND_INS)
        self.stages.append(stage)
        self.slopes.append(slope)
        self.kinds.append((nodes_between(stage, slope), 0))
        self.evaluations += 1

    def add_stages(self, program: StepProgram, times: Tensor, sizes: Sequence[float], is_given: bool) -> bool:
        """Evaluate all slopes at once by a program, and those of steps that will go on from this one.

        Args:
            program: the method's.
            times, sizes: as it takes them.
            is_given: whether the first slope is not to be evaluated, but is the one that is there.

        Returns:
            Whether it could be done; if not, nothing has changed.
        """
        given = self.slopes[0] if is_given else None
        with torch.enable_grad():
            taken = self.field.taken_by(program, times, sizes, self.origin, given)
        if taken is None:
            return False
        if not is_given:
            self.slopes, self.kinds, self.evaluations = [], [], 0
        self._add(taken)
        self._at_once = times.numel()
        self.kinds.append(self.latest.kind)
        return True

    def add_taken(self) -> bool:
        """Add all slopes as the program that took the step before has evaluated them; returns whether it did."""
        taken = self.before._following if self.before is not None else []
        if taken:
            self._add(taken)
        return bool(taken)

    def _add(self, taken: list[TakenStep]) -> None:
        (stages, slopes, self._moved, self._end), *self._following = taken
        self.stages = [self.origin, *stages]
        self.slopes = [*self.slopes, *slopes]
        self.evaluations += len(slopes)

    @property
    def moved(self) -> Tensor:
        """What the step adds to the state; as a program has computed it without its graph, but in half precision."""
        if self._moved is None:
            with torch.enable_grad():
                self._moved = combined(None, self.tableau.numbers[1], self.slopes, self.h)
        return self._moved

    @property
    def end(self) -> Tensor:
        """The state at its end."""
        if self._end is None:
            if self._moved is None and self.tableau.first_same_as_last:
                self._end = self.stages[self.tableau.stages - 1]
            else:
                with torch.enable_grad():
                    self._end = self.origin + self.moved
        return self._end

    def end_as(self, state: Tensor) -> None:
        """Have the state at its end with the values that the host has computed."""
        if self.end is not self.stages[-1]:
            self.end.data.copy_(state)  # no node has saved it yet

    def pull(
        self, outputs: Sequence[Tensor], cotangents: Sequence[Tensor], sums: CotangentSums, keep_graph: bool
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """Carry cotangents back to the leaf, and to the first slope.

        Args:
            outputs: tensors of this step and of those that go on from it.
            cotangents: theirs.
            sums: takes the cotangents of what f depends on.
            keep_graph: whether the graph is not to be freed.

        Returns:
            The cotangents of the leaf and of the first slope, None for zero. None if the graph has something in it that
            was not found on the way forward.
        """
        leaves = [self.leaf] if self.first_slope is None else [self.leaf, self.first_slope]
        if self.field.strangers(outputs, self.origin.grad_fn, leaves, sums):
            return None
        grads = vjp(outputs, cotangents, [*leaves, *sums.inputs], keep_graph)
        sums.add(grads[len(leaves) :])
        return grads[0], None if self.first_slope is None else grads[1]

    @property
    def latest(self) -> Evaluation:
        """The latest evaluation in it, or all of them if they were made at once."""
        if self._at_once:
            start, others = self.origin, [*self.stages[1:], *self.slopes[:-1]]
            others += [x for taken in self._following for x in taken.tensors]
            return Evaluation(start, start, start, {}, self.slopes[-1], others, self._at_once)
        stage, slope = self.stages[-1], self.slopes[-1]
        return Evaluation(stage, stage, stage, {}, slope)
