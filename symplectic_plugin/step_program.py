"""A step's stages and slopes as one program of torch.compile's, so that what a call costs is paid once a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .compiled import Compiled
from .tableau import ButcherTableau


class TakenStep(NamedTuple):
    """What a program returns.

    Args:
        stages: the states of the stages, the first of them left out; but for the last one, if that is the step's end,
            without their graphs.
        slopes: the slopes, but for the first one if that was given.
        moved: what the step adds to the state; None if its end is the last stage.
    """

    stages: list[Tensor]
    slopes: list[Tensor]
    moved: Tensor | None


class StepProgram:
    """One step of an explicit method, compiled.

    Args:
        function: `function(t, x)`, the vector field with what the host has put around it.
        compiled: what the user gave, compiled, which is in it.
        tableau: the method's.

    Attributes:
        works: whether it is of use.
    """

    def __init__(self, function: Callable[..., Tensor], compiled: Compiled, tableau: ButcherTableau) -> None:
        self.function = function
        self.compiled = compiled
        self.works = True
        a, b = tableau.numbers
        self._step = functools.partial(_step, a, None if tableau.first_same_as_last else b)
        self._key = f"step {a} {b} "

    def __call__(self, times: Sequence[Tensor], h: Tensor, start: Tensor, slope: Tensor | None) -> TakenStep:
        """Take a step, with its graph if grad is enabled.

        Args:
            times: of the stages whose slopes are to be evaluated.
            h: the step's size, a scalar.
            start: the state at its start.
            slope: the slope there, if it is given.
        """
        taken = self.compiled.run(self._key, self._step, self.function, times, h, start, slope)
        return TakenStep(*taken)


def _step(a: Sequence[Sequence[float]], b: Sequence[float] | None) -> Any:
    """A step with these coefficients; without weights its end is its last stage."""

    def step(
        function: Callable[..., Tensor], times: Sequence[Tensor], h: Tensor, start: Tensor, slope: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        slopes = [] if slope is None else [slope]
        stages = []
        for t in times:
            stage = start
            for weight, k in zip(a[len(slopes)], slopes, strict=False):
                if weight != 0:
                    stage = stage + _scaled(k, h * weight, start)
            stages.append(stage)
            slopes.append(function(t, stage))
        moved = None
        if b is not None:
            for weight, k in zip(b, slopes, strict=False):
                if weight != 0:
                    term = _scaled(k, h * weight, start)
                    moved = term if moved is None else moved + term
        first = 1 if slope is None else 0
        last = len(stages) if b is not None else len(stages) - 1
        detached = [stage.detach() for stage in stages[first:last]]
        return [*detached, *stages[max(first, last) :]], slopes[1 - first :], moved

    return step


def _scaled(slope: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """A slope times a number, in the state's dtype: under autocast the slope may have less precision, and a state that
    is a number itself would take the weight's."""
    return (slope.to(state.dtype) * weight).to(state.dtype)
