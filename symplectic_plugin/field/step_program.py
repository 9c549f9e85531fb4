"""The stages and slopes of a step, or of several, as one program of torch.compile's: what a call costs is paid once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods.tableau import ButcherTableau
from .compiled import Compiled
from .cotangents import wide
from .evaluation import require_slope


class TakenStep(NamedTuple):
    """What a program returns of a step.

    Args:
        stages: the states of the stages, the first of them left out; but for the last one, if that is the step's end,
            without their graphs.
        slopes: the slopes, but for the first one if that was given; without their graphs, if these are not needed.
        moved: what the step adds to the state, without its graph but in half precision; None if its end is the last
            stage.
        end: the state at its end; None if that is the last stage.
    """

    stages: list[Tensor]
    slopes: list[Tensor]
    moved: Tensor | None
    end: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        """All that there is."""
        return [*self.stages, *self.slopes, *(x for x in (self.moved, self.end) if x is not None)]


class StepProgram:
    """Steps of an explicit method, compiled.

    Args:
        function: `function(t, x)`, the vector field with what the host has put around it.
        compiled: what the user gave, compiled, which is in it.
        tableau: the method's.
        with_slopes: whether the slopes are to have a graph. Each graph that is there is paid for, used or not.

    Attributes:
        works: whether it is of use.
    """

    def __init__(
        self, function: Callable[..., Tensor], compiled: Compiled, tableau: ButcherTableau, with_slopes: bool
    ) -> None:
        self.function = function
        self.compiled = compiled
        self.works = True
        a, b = tableau.numbers
        self._step = _step(a, None if tableau.first_same_as_last else b, with_slopes)
        self._key = f"{a} {b} {with_slopes} "

    def __call__(self, times: Tensor, sizes: Sequence[float], start: Tensor, slope: Tensor | None) -> list[TakenStep]:
        """Take steps one after the other, with their graphs if grad is enabled.

        Args:
            times: of the stages whose slopes are to be evaluated, shape (steps, stages).
            sizes: of the steps.
            start: the state at the start of the first.
            slope: the slope there, if it is given; then that is the only step.
        """
        precision = torch.float32 if start.device.type == "mps" else torch.float64
        h = torch.tensor(sizes, dtype=precision, device=start.device)
        count, stages = times.shape
        key, make = f"{count} steps {stages} stages {self._key}", functools.partial(_steps, count, self._step)
        return [TakenStep(*taken) for taken in self.compiled.run(key, make, self.function, times, h, start, slope)]


def _steps(count: int, step: Any) -> Any:
    """So many steps."""

    def steps(
        function: Callable[..., Tensor], times: Tensor, sizes: Tensor, start: Tensor, slope: Tensor | None
    ) -> list[tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]]:
        taken = []
        for n in range(count):
            stages, slopes, moved, end = step(function, times[n], sizes[n], start, slope)
            taken.append((stages, slopes, moved, end))
            start, slope = stages[-1] if end is None else end, None
        return taken

    return steps


def _step(a: Sequence[Sequence[float]], b: Sequence[float] | None, with_slopes: bool) -> Any:
    """A step with these coefficients; without weights its end is its last stage."""

    def step(
        function: Callable[..., Tensor], times: Tensor, h: Tensor, start: Tensor, slope: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
        slopes = [] if slope is None else [slope]
        stages = []
        for t in times:
            stage = start
            row = a[len(slopes)]
            for j, k in enumerate(slopes):  # zip with strict=False is not compiled by torch 2.5
                if row[j] != 0:
                    stage = stage + _scaled(k, h * row[j], start)
            stages.append(stage)
            slopes.append(require_slope(function(t, stage), stage))
        moved = None
        if b is not None:
            for j, k in enumerate(slopes):
                if b[j] != 0:
                    term = _scaled(k, h * b[j], start)
                    moved = term if moved is None else moved + term
        first = 1 if slope is None else 0
        last = len(stages) if b is not None else len(stages) - 1
        detached = [stage.detach() for stage in stages[first:last]]
        end = None if moved is None else start + moved
        if moved is not None and wide(start.dtype) == start.dtype:
            moved = moved.detach()
        evaluated = [k if with_slopes else k.detach() for k in slopes[1 - first :]]
        return [*detached, *stages[max(first, last) :]], evaluated, moved, end

    return step


def _scaled(slope: Tensor, weight: Tensor, state: Tensor) -> Tensor:
    """A slope times a number, in the state's dtype: under autocast the slope may have less precision, and a state that
    is a number itself would take the weight's."""
    return (slope.to(state.dtype) * weight).to(state.dtype)
