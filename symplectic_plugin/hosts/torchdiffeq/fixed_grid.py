"""Takes and records the steps of torchdiffeq's fixed-grid methods."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...methods.explicit import explicit_step, weighted_sum
from ...record.method import Method, Reevaluation, StageTimeCache, Step, TakeStep
from .recording import Recording
from .times import TimesFromGrid, TimesFromStart


def _explicit_step(method: Method, f: Reevaluation, step: Step, state: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    """Take a step from a state to the one at the end."""
    times = method.stage_times([step])[0]
    slopes = explicit_step(method.tableau, lambda i, x: f(times[i], x, **method.keywords[i]), state, step.h)
    return state + weighted_sum(None, method.tableau.numbers[1], slopes, step.h), None


class FixedGrid(Recording):
    """Records the steps of torchdiffeq's fixed-grid methods."""

    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor]
    interp: str

    def begin(self, t: Tensor, *, recorded: bool) -> TimesFromGrid | TimesFromStart:
        """Begin a solve over the times t, or from the only one up to an event; and to record it, if wanted."""
        stage_dtype = self.y0.abs().dtype
        self._grid: list[Step] | None = None
        # A user's own step may do something besides.
        self.is_own = type(self).base.__module__.startswith("torchdiffeq.")
        self._has_callback = self.has_callbacks("callback_step")
        if not recorded:
            return TimesFromStart(t)
        if t.ndim == 0:
            self.record((stage_dtype, stage_dtype), 2, None, want_time=t.requires_grad)
            return TimesFromStart(t)
        # The grid is built in the caller's grad mode: it may depend on t, on y0, and on whatever built it.
        grid = self.grid_constructor(self.func.func, self.initial, t)
        self.grid_constructor = lambda func, y0, t: grid.detach()
        want_time = t.requires_grad or grid.requires_grad
        self.record((grid.dtype, grid.dtype), len(t), len(grid) - 1, want_time=want_time)
        points, sizes = grid.tolist(), grid.detach().diff().tolist()
        keywords = self.recorder.trajectory.method.keywords[0]
        self._grid = [Step(*times, first_keywords=keywords) for times in zip(points, points[1:], sizes, strict=False)]
        self._stage_times = StageTimeCache(self._grid, self.recorder.trajectory.method.stage_times)
        return TimesFromGrid(t, grid)

    def step_alone(self, method: Method, dtype: torch.dtype) -> TakeStep:
        """Return torchdiffeq's step without its loop over the grid."""
        if self.is_own:
            return functools.partial(_explicit_step, method)
        solver, base, device = copy.copy(self), type(self).base, self.y0.device
        vars(solver).update(func=None, y0=None, initial=None, store=None)

        def take_step(f: Reevaluation, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, None]:
            t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=dtype).to(device)
            return state + base._step_func(solver, f, t0, h, t1, state)[0], None

        return take_step

    def output_times(self, t: Tensor) -> Tensor:
        return t

    def end_state(self) -> Tensor:
        y0, dy = self._last
        return y0 + dy

    def integrate(self, t: Tensor) -> Tensor:
        """Return the solution at the times t, shape (len(t), *y0.shape)."""
        # torchdiffeq's loop over the grid, but with times as numbers, so that none is waited for.
        ends = [] if not self._grid else [self._grid[0].t0, self._grid[-1].t1]
        outputs, m, y0 = t.tolist(), 1, self.y0
        if not self.is_own or self._has_callback or self.interp != "linear" or ends != [*outputs[:1], *outputs[-1:]]:
            return super().integrate(t)  # type: ignore[misc]
        solution = torch.empty(len(t), *y0.shape, dtype=y0.dtype, device=y0.device)
        solution[0] = y0
        for n, step in enumerate(self._grid or ()):
            dy, _ = self._take(step, self._stage_times[n], y0, follows=n > 0)
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
        if self.func.recorder is None:
            return super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        trajectory = self.recorder.trajectory
        if self._grid is None:
            step = Step(float(t0), float(t1), float(dt), first_keywords=trajectory.method.keywords[0])
        else:
            step = self._grid[len(trajectory.checkpoints)]
        # A callback may have changed the state.
        follows = bool(trajectory.checkpoints) and (not self._has_callback or torch.equal(y0, self.end_state()))
        if self.is_own and trajectory.method.implicit is None:
            return self._take(step, trajectory.method.stage_times([step])[0], y0, follows=follows)
        self.func.begin_step(y0, None, step.h, follows=follows)
        result = super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        self._took(step, y0, result[0], follows=follows)
        return result

    def _take(self, step: Step, times: Sequence[Tensor], y0: Tensor, *, follows: bool) -> tuple[Tensor, Tensor]:
        """Take a step: return what it adds to the state, and the slope at its start."""
        recorder = self.recorder
        recorder.begin_step(y0, None, step.h, follows=follows)
        result = recorder.take_step(step, times, y0)
        self._took(step, y0, result[0], follows=follows)
        return result

    def _took(self, step: Step, y0: Tensor, dy: Tensor, *, follows: bool) -> None:
        """Record a step that was taken."""
        recorder = self.recorder
        step = step if recorder.draws is None else replace(step, draws=recorder.draws)
        recorder.end_step(step, y0, None, self.kept_stages(step), follows=follows)
        self._last = y0, dy

    def kept_stages(self, step: Step) -> list[Tensor] | None:
        """Return what may be kept of the step that was taken last, if not the states of its stages."""
        return None
