"""Steps by torchdiffeq whose stages are one compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...field.compiled import Compiled
from ...field.evaluation import Keywords
from ...field.step_program import StepProgram, TakenStep
from ...field.vector_field import VectorField
from ...methods.tableau import ButcherTableau
from ...record.step_graph import StepGraph
from .unperturbed import Unperturbed


class StepAtOnce:
    """Takes steps by a program.

    Args:
        field: the vector field, of an `Unperturbed`.
        compiled: what the user gave, compiled, which is in that.
        tableau: the method's.
        with_slopes: whether anything but steps' ends is made of slopes.
    """

    def __init__(self, field: VectorField, compiled: Compiled, tableau: ButcherTableau, with_slopes: bool) -> None:
        function: Any = field.function
        self._unperturbed: Unperturbed = function
        self._field = field
        self._program = StepProgram(self._unperturbed.inner, compiled, tableau, with_slopes)

    def __call__(
        self,
        graph: StepGraph,
        times: Sequence[Tensor],
        keywords: Sequence[Keywords],
        is_given: bool,
        following: Sequence[tuple[float, Sequence[Tensor]]] = (),
    ) -> bool:
        """Have all slopes of a step evaluated, with their graph; returns whether that could be done.

        Args:
            graph: the step's.
            times: of the stages whose slopes are to be evaluated.
            keywords: with which the host has f evaluated for them.
            is_given: whether the first slope is the one that is in the graph already.
            following: the sizes and times of steps that will go on from this one, to be taken at once with it.
        """
        if graph.add_taken():
            return True
        if graph.stand_ins or not self._works(times, graph.origin):
            return False
        if graph.before is None:  # the first one is to show what a step keeps; others don't go on from each other
            following = ()
        moved = self._times([times, *(of_step for _, of_step in following)], keywords)
        return graph.add_stages(self._program, moved, [graph.h, *(h for h, _ in following)], is_given)

    def without_graph(
        self, times: Sequence[Tensor], keywords: Sequence[Keywords], h: float, start: Tensor, slope: Tensor | None
    ) -> TakenStep | None:
        """The same without graphs; None if it can't be done.

        Args:
            times, keywords: as for a call.
            h: the step's size.
            start: the state at its start.
            slope: the slope there, if it is given.
        """
        if not self._works(times, start):
            return None
        given = None if slope is None else slope.contiguous()  # each other layout would be compiled for as well
        with torch.no_grad():
            taken = self._field.taken_by(self._program, self._times([times], keywords), [h], start, given)
        return None if taken is None else taken[0]

    def _works(self, times: Sequence[Tensor], start: Tensor) -> bool:
        # Numbers that a program draws are others than those that f does.
        program = self._program
        works = program.works and program.compiled.is_compiled
        return works and not self._field.draws and self._unperturbed.leaves(times[0], start)

    def _times(self, times: Sequence[Sequence[Tensor]], keywords: Sequence[Keywords]) -> Tensor:
        """The times of steps as f is to have them."""
        moved = [
            Unperturbed.moved(t, **of_stage)
            for of_step in times
            for t, of_stage in zip(of_step, keywords, strict=False)  # there may be one more time
        ]
        return torch.stack(moved).view(len(times), -1)
