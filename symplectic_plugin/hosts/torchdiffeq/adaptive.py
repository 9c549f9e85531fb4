"""Records the steps of torchdiffeq's adaptive methods."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...record.method import Method, Reevaluation, Step, TakeStep
from ...record.trajectory import Trajectory
from ._compat import Perturb
from .adaptive_step import PreparedTableau, adaptive_step, runge_kutta_step
from .recording import Recording
from .times import TimesFromStart


class Adaptive(Recording):
    """Records the steps of torchdiffeq's adaptive methods."""

    dtype: torch.dtype
    rk_state: Any
    min_step: Tensor
    max_step: Tensor
    step_t: Any
    jump_t: Any
    tableau: Any

    def begin(self, t: Tensor, *, recorded: bool) -> TimesFromStart:
        """Begin a solve over the times t; and to record it, if wanted."""
        self.tableau = PreparedTableau.of(self.tableau)
        if recorded:
            dtypes = self.dtype, self.y0.abs().dtype
            self.record(dtypes, max(2, t.numel()), None, want_time=t.requires_grad)
        self._has_callback = self.has_callbacks("callback_step", "callback_accept_step", "callback_reject_step")
        self._slope_handed_on = False
        self._first_keywords: Mapping[str, Any] = {}
        self._times = TimesFromStart(t)
        return self._times

    def output_times(self, t: Tensor) -> Tensor:
        return t.to(self.dtype)

    def end_state(self) -> Tensor:
        return self.rk_state.y1

    def step_alone(self, method: Method, dtype: torch.dtype) -> TakeStep:
        """Return torchdiffeq's step without its step control."""
        tableau, device = self.tableau, self.y0.device

        def take_step(f: Reevaluation, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
            t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=dtype).to(device)
            assert slope is not None
            end, last_slope, *_ = runge_kutta_step(f, state, slope, t0, h, t1, tableau)
            return end, last_slope.clone()  # it is a view of all slopes

        return take_step

    def _adaptive_step(self, rk_state: Any) -> Any:
        if self.func.recorder is None:
            return self.host_step(rk_state)
        before = rk_state.y1.clone() if self._has_callback else None
        new = self.host_step(rk_state)
        if before is not None and not torch.equal(before, rk_state.y1):
            raise RuntimeError(
                "symplectic_adjoint: a callback changed the state in place. With an adaptive method the slope there "
                "was evaluated before, so the gradient would be wrong: use a fixed-grid method, or stop at an event"
            )
        if new.t1 is rk_state.t1:
            self.func.field.report.rejected += 1
        else:
            self._accepted(rk_state, new)
        return new

    def _accepted(self, rk_state: Any, new: Any) -> None:
        """Record a step that was accepted, from one state of the solver to the next."""
        recorder = self.recorder
        method, n = recorder.trajectory.method, len(recorder.trajectory.checkpoints)
        if (len(self.step_t) or len(self.jump_t)) and self._accepted_size != self._proposed_size(rk_state.dt):
            self._times.cut(n, self.output_at(new.t1))
        # Else it can be evaluated again from the state: but not where f drew numbers for it two steps ago.
        slope_needed = self._slope_handed_on and (recorder.store.keeps_slope or recorder.draws is not None)
        # On other devices they are read back when the solve is done, all at once.
        number: Callable[[Any], Any] = float if self.y0.device.type == "cpu" else lambda x: x
        step = Step(
            number(rk_state.t1),
            number(new.t1),
            number(self._accepted_size),
            self._slope_handed_on,
            self._first_keywords,
            None if self._slope_handed_on else recorder.first_draw,
            recorder.draws,
        )
        slope = rk_state.f1.clone() if slope_needed else None  # a copy: it is a view of all slopes of its step
        recorder.end_step(step, rk_state.y1, slope, self.kept_stages(step))
        # After a jump the host evaluates the slope anew, on the other side.
        after_jump, keywords = self.func.evaluated_after_jump, method.keywords
        self._slope_handed_on = method.hands_on_slope and not after_jump
        inside = keywords[-1] if self._slope_handed_on else keywords[0]
        self._first_keywords = {"perturb": Perturb.NEXT} if after_jump else inside

    def kept_stages(self, step: Step) -> list[Tensor] | None:
        """Return what may be kept of the step that was taken last, if not the states of its stages."""
        return None

    def host_step(self, rk_state: Any) -> Any:
        """Take torchdiffeq's step with its step control."""
        return adaptive_step()(self, rk_state)

    def output_at(self, t: Tensor) -> int | None:
        """Return the index of the output time that a step was cut to end at, if it was cut for one."""
        return None

    def _interp_fit(self, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> Any:
        # Called for accepted steps alone, few of which have outputs inside.
        self._accepted_size = dt
        return _WhenNeeded(functools.partial(self.base._interp_fit, weakref.proxy(self), y0, y1, k, dt))

    def _proposed_size(self, dt: Tensor) -> Tensor:
        """Return the step size before a step_t or jump_t cuts it."""
        if not hasattr(self, "max_step"):  # torchdiffeq 0.2.3
            return dt
        return (dt if dt.isfinite() else self.min_step).clamp(self.min_step, self.max_step)

    def places(self, times: Tensor) -> list[tuple[int, float]]:
        self._read_times()
        return super().places(times)

    def place_of_event(self, t: Tensor) -> list[tuple[int, float]]:
        self._read_times()
        return super().place_of_event(t)

    def _read_times(self) -> None:
        """Read the steps' times back from the device, all at once."""
        trajectory: Trajectory = self.recorder.trajectory
        steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
        if steps and isinstance(steps[0].t0, Tensor):
            numbers = torch.stack([torch.stack([step.t0, step.t1, step.h]) for step in steps]).tolist()
            for checkpoint, step, (t0, t1, h) in zip(trajectory.checkpoints, steps, numbers, strict=True):
                checkpoint.set_step(replace(step, t0=t0, t1=t1, h=h))


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
