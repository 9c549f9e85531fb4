"""Notes the steps of torchdiffeq's adaptive methods."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb

from ...record.trajectory import Step, TakeStep
from .adaptive_step import PreparedTableau, adaptive_step, runge_kutta_step
from .recorder import Method, Recorder
from .times import StartingTime


class Adaptive(Recorder):
    """Notes the steps of torchdiffeq's adaptive methods."""

    dtype: torch.dtype
    rk_state: Any
    min_step: Tensor
    max_step: Tensor
    step_t: Any
    jump_t: Any
    tableau: Any

    def begin(self, t: Tensor, recorded: bool) -> StartingTime:
        """Begin a solve over the times t, and to note its steps if they are to be recorded."""
        self.tableau = PreparedTableau.of(self.tableau)
        if recorded:
            self.record(self.dtype, self.y0.abs().dtype, max(2, t.numel()))
            # Where a step may be cut short, its size is not known when it begins, nor its graph made.
            self.func.whole = self.func.whole and self.step_t is None and self.jump_t is None
        self._has_callback = self.has_callbacks("callback_step", "callback_accept_step", "callback_reject_step")
        self._slope_handed_on = False
        self._first_keywords: Mapping[str, Any] = {}
        self._times = StartingTime(t)
        return self._times

    def output_times(self, t: Tensor) -> Tensor:
        """Output times as the solver sees them."""
        return t.to(self.dtype)

    def end_state(self) -> Tensor:
        """The state at the end of the last step."""
        return self.rk_state.y1

    def step_alone(self, method: Method, dtype: torch.dtype) -> TakeStep:
        """torchdiffeq's step without its step control."""
        tableau, device = self.tableau, self.y0.device

        def take_step(f: Any, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
            t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=dtype).to(device)
            assert slope is not None
            end, last_slope, *_ = runge_kutta_step(f, state, slope, t0, h, t1, tableau)
            return end, last_slope.clone()  # it is a view of all slopes

        return take_step

    def _adaptive_step(self, rk_state: Any) -> Any:
        # Where a step may be cut short, its size is not known yet.
        uncut = self.trajectory is not None and not len(self.step_t) and not len(self.jump_t)
        size = self._proposed_size(rk_state.dt) if uncut else None
        self.begin_step(rk_state.y1, rk_state.f1, size, self._slope_handed_on)
        before = rk_state.y1.clone() if self._has_callback and self.trajectory is not None else None
        new = self.host_step(rk_state)
        if before is not None and not torch.equal(before, rk_state.y1):
            raise RuntimeError(
                "symplectic_adjoint: a callback changed the state in place. With an adaptive method the slope there "
                "was evaluated before, so the gradient would be wrong: use a fixed-grid method, or stop at an event"
            )
        if self.trajectory is None:
            return new
        if new.t1 is rk_state.t1:
            self.func.field.report.rejected += 1
            return new
        if (len(self.step_t) or len(self.jump_t)) and self._accepted_size != self._proposed_size(rk_state.dt):
            self._times.cut_steps[len(self.trajectory.steps)] = self.output_at(new.t1)
        # Else it can be evaluated again from the state: but not where f drew numbers for it two steps ago.
        slope_needed = self._slope_handed_on and (self.checkpoints.keeps_slope or self.func.draws is not None)
        # On other devices they are read back when the solve is done, all at once.
        number: Callable[[Any], Any] = float if self.y0.device.type == "cpu" else lambda x: x
        self.note(
            Step(
                number(rk_state.t1),
                number(new.t1),
                number(self._accepted_size),
                self._slope_handed_on,
                self._first_keywords,
                None if self._slope_handed_on else self.func.first_draw,
                self.func.draws,
            ),
            rk_state.y1,
            rk_state.f1.clone() if slope_needed else None,  # a copy: it is a view of all slopes of its step
        )
        # After a jump the host evaluates the slope anew, on the other side.
        after_jump, keywords = self.func.evaluated_after_jump, self.trajectory.keywords
        self._slope_handed_on = self.trajectory.hands_on_slope and not after_jump
        self.func.first_draw = self.func.last_draw
        inside = keywords[-1] if self._slope_handed_on else keywords[0]
        self._first_keywords = {"perturb": Perturb.NEXT} if after_jump else inside
        return new

    def host_step(self, rk_state: Any) -> Any:
        """torchdiffeq's step and its step control."""
        return adaptive_step()(self, rk_state)

    def output_at(self, t: Tensor) -> int | None:
        """The index of the output time that a step was cut to end at, if it was cut for one."""
        return None

    def _interp_fit(self, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> Any:
        # Called for accepted steps alone, few of which have outputs inside.
        self._accepted_size = dt
        return _WhenNeeded(functools.partial(self.base._interp_fit, weakref.proxy(self), y0, y1, k, dt))

    def _proposed_size(self, dt: Tensor) -> Tensor:
        """The step size before a step_t or jump_t cuts it."""
        if not hasattr(self, "max_step"):  # torchdiffeq 0.2.3
            return dt
        return (dt if dt.isfinite() else self.min_step).clamp(self.min_step, self.max_step)

    def read_times(self) -> None:
        """Have the steps' times as numbers."""
        assert self.trajectory is not None
        steps = self.trajectory.steps
        if steps and isinstance(steps[0].t0, Tensor):
            numbers = torch.stack([torch.stack([step.t0, step.t1, step.h]) for step in steps]).tolist()
            self.trajectory.steps = [
                replace(step, t0=t0, t1=t1, h=h) for step, (t0, t1, h) in zip(steps, numbers, strict=True)
            ]


class _WhenNeeded(Sequence[Tensor]):
    """A list that is made when it is looked into."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self._make = make
        self._made: Sequence[Tensor] | None = None

    def _list(self) -> Sequence[Tensor]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __len__(self) -> int:
        return len(self._list())
