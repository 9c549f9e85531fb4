"""Takes and notes the steps of torchdiffeq's fixed-grid methods."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...methods.explicit import combined
from ...record.trajectory import Step, TakeStep, TimesOfSteps
from .recorder import Method, Recorder
from .times import GridTimes, StartingTime

_AT_ONCE = 3
"""How many steps a compiled program takes, where what a call costs shows. With more it takes longer to be compiled."""

_SMALL = 2**18
"""The bytes that an evaluation keeps with its graph where that shows."""


def _explicit_step(method: Method, f: Any, step: Step, state: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    """A step from a state to the one at its end."""
    a, b = method.tableau.numbers
    slopes: list[Tensor] = []
    for t, row, keywords in zip(method.stage_times([step])[0], a, method.keywords, strict=False):
        slopes.append(f(t, combined(state, row, slopes, step.h), **keywords))
    return state + combined(None, b, slopes, step.h), None


class FixedGrid(Recorder):
    """Notes the steps of torchdiffeq's fixed-grid methods."""

    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor]
    interp: str

    def begin(self, t: Tensor, recorded: bool) -> GridTimes | StartingTime:
        """Begin a solve over the times t, or from the only one up to an event; and to note its steps, if recorded."""
        stage_dtype = self.y0.abs().dtype
        self._grid: list[Step] | None = None
        self._stage_times: TimesOfSteps | None = None
        # Of torchdiffeq's own steps nothing but the tableau matters; a user's may do something besides.
        self.is_own = type(self).base.__module__.startswith("torchdiffeq.")
        self._has_callback = self.has_callbacks("callback_step")
        if not recorded:
            return StartingTime(t)
        if t.ndim == 0:
            self.record(stage_dtype, stage_dtype, 2)
            return StartingTime(t)
        # The grid is built in the caller's grad mode: it may depend on t, on y0, and on whatever built it.
        grid = self.grid_constructor(self.func.func, self.func.initial, t)
        self.grid_constructor = lambda func, y0, t: grid.detach()
        self.record(grid.dtype, grid.dtype, len(t), len(grid) - 1)
        assert self.trajectory is not None
        points, sizes, keywords = grid.tolist(), grid.detach().diff().tolist(), self.trajectory.keywords[0]
        self._grid = [Step(*times, False, keywords) for times in zip(points, points[1:], sizes, strict=False)]
        self._stage_times = TimesOfSteps(self._grid, self.trajectory.stage_times)
        return GridTimes(t, grid)

    def step_alone(self, method: Method, dtype: torch.dtype) -> TakeStep:
        """torchdiffeq's step without its loop over the grid."""
        if self.is_own:
            return functools.partial(_explicit_step, method)
        solver, base, device = copy.copy(self), type(self).base, self.y0.device
        vars(solver).update(func=None, y0=None, trajectory=None, checkpoints=None)

        def take_step(f: Any, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, None]:
            t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=dtype).to(device)
            return state + base._step_func(solver, f, t0, h, t1, state)[0], None

        return take_step

    def output_times(self, t: Tensor) -> Tensor:
        """Output times as the solver sees them."""
        return t

    def end_state(self) -> Tensor:
        """The state at the end of the last step."""
        y0, dy = self._last
        return y0 + dy

    def _follows(self, y0: Tensor) -> bool:
        """Whether the state at a step's start is where the step before ended: a callback may have changed it."""
        return not self._has_callback or torch.equal(y0, self.end_state())

    def integrate(self, t: Tensor) -> Tensor:
        """The solution at the times t, shape (len(t), *y0.shape)."""
        # torchdiffeq's loop over the grid, but with times as numbers, so that none is waited for.
        ends = [] if not self._grid else [self._grid[0].t0, self._grid[-1].t1]
        outputs, m, y0 = t.tolist(), 1, self.y0
        if not self.is_own or self._has_callback or self.interp != "linear" or ends != [*outputs[:1], *outputs[-1:]]:
            return super().integrate(t)  # type: ignore[misc]
        solution = torch.empty(len(t), *y0.shape, dtype=y0.dtype, device=y0.device)
        solution[0] = y0
        for n, step in enumerate(self._grid or ()):
            dy, _ = self._take(step, y0, n > 0, self._taken_with(n))
            y1 = y0 + dy
            while m < len(outputs) and step.t1 >= outputs[m]:
                if outputs[m] == step.t1:
                    solution[m] = y1
                else:
                    solution[m] = torch.add(y0, dy, alpha=(outputs[m] - step.t0) / (step.t1 - step.t0))
                m += 1
            y0 = y1
        return solution

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        if (trajectory := self.trajectory) is None:
            return super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        if self._grid is None:
            step = Step(float(t0), float(t1), float(dt), False, trajectory.keywords[0])
        else:
            step = self._grid[len(trajectory.steps)]
        follows = bool(trajectory.kept) and self._follows(y0)
        if self.is_own:
            return self._take(step, y0, follows)
        self.begin_step(y0, None, step.h, follows)
        result = super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        self._took(step, y0, result[0], follows)
        return result

    def _taken_with(self, n: int) -> Sequence[tuple[float, Sequence[Tensor]]]:
        """The sizes and times of the steps that may be taken at once with step n, if any may."""
        end = n + _AT_ONCE
        assert self._grid is not None
        assert self._stage_times is not None
        if self.func.at_once is None or end > len(self._grid) or self.func.field.report.evaluation_bytes > _SMALL:
            return ()
        return [(self._grid[m].h, self._stage_times[m]) for m in range(n + 1, end)]

    def _take(
        self, step: Step, y0: Tensor, follows: bool, taken_with: Sequence[tuple[float, Sequence[Tensor]]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Take a step: what it adds to the state, and the slope at its start."""
        assert self.trajectory is not None
        self.begin_step(y0, None, step.h, follows)
        if self._stage_times is None:
            stage_times = self.trajectory.stage_times([step])[0]
        else:
            stage_times = self._stage_times[len(self.trajectory.steps)]
        result = self.func.take_step(
            self.trajectory.tableau, step, stage_times, self.trajectory.keywords, y0, taken_with
        )
        self._took(step, y0, result[0], follows)
        return result

    def _took(self, step: Step, y0: Tensor, dy: Tensor, follows: bool) -> None:
        """Note a step that was taken."""
        self.note(step if self.func.draws is None else replace(step, draws=self.func.draws), y0, None, follows)
        self._last = y0, dy

    def read_times(self) -> None:
        """Have the steps' times as numbers, as they are."""
