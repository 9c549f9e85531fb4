"""Records the steps of the implicit methods.

f is evaluated any number of times while the stages of a step are solved for. None of these evaluations is recorded: a
stage is what the iteration arrives at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods.implicit_step import ImplicitSteps, StepFields, TakenStep
from ...methods.implicit_tableaux import ImplicitMethod
from ...record.implicit_solve import ImplicitSolve, require_exact, slopes_to_keep
from ...record.method import Method, Reevaluation, Step, TakeStep
from .adaptive import Adaptive
from .fixed_grid import FixedGrid
from .methods import hands_on_slope
from .recorded_function import RecordedFunction
from .times import TimesFromStart


class _ImplicitRecording:
    """The recording of both families of implicit methods, where it differs from that of the explicit ones."""

    method: ImplicitMethod
    func: RecordedFunction
    y0: Tensor
    steps: ImplicitSteps
    weights: Callable[[Tensor], Tensor]
    parts: Any
    layout: Any
    stage_keywords: Callable[[], list[dict[str, Any]]]
    _taken: TakenStep

    def parts_of(self, func: RecordedFunction) -> Any:
        """Return the two parts of an additive method's vector field, as functions in torchdiffeq's wrappers."""
        parts = super().parts_of(func.func)  # type: ignore[misc]
        func.field.set_parts(parts)
        return parts

    def implicit_solve(self) -> ImplicitSolve:
        """Return how the stages are solved for.

        Raises:
            ValueError: if not to rounding.
        """
        return ImplicitSolve(self.method, require_exact(self.steps.options), self.layout, self.weights)

    def fields(self, times: Sequence[Tensor], keywords: Sequence[dict[str, Any]]) -> StepFields:
        """Return f at the stages of a step, as the vector field that dependencies and counts belong to."""
        solve = ImplicitSolve(self.method, self.steps.options, self.layout, self.weights)
        return solve.fields(self.func.field, times, keywords, self._evaluated)

    def _evaluated(self) -> None:
        self.func.field.report.evaluations += 1

    def take(self, *args: Any) -> TakenStep:
        """Take a step, and remember it."""
        self._taken = super().take(*args)  # type: ignore[misc]
        return self._taken

    def kept_stages(self, step: Step) -> list[Tensor]:
        """Return what may be kept of the step that was taken last: its slopes."""
        return slopes_to_keep(self._taken.parts, first_is_known=step.slope_handed_on)

    def step_alone(self, _: Method, dtype: torch.dtype) -> TakeStep:
        """Return the method's step without step control."""
        solve, device = self.implicit_solve(), self.y0.device
        c, keywords = self.method.tableau.c.tolist(), self.stage_keywords()
        stage_dtype, hands_on = self.stage_dtype(dtype), hands_on_slope(self)

        def take_step(f: Reevaluation, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
            t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=dtype).to(device, stage_dtype)
            times = [t1 if c_i == 1 else t0 + c_i * h for c_i in c]
            fields = solve.fields(f.field, times, [step.first_keywords, *keywords[1:]], f.count)
            taken = solve.take(solve.steps_again(), fields, step.h, state, slope)
            end = state + solve.layout.shaped(taken.increment)
            return end, solve.layout.shaped(taken.slopes[-1]) if hands_on else None

        return take_step

    def stage_dtype(self, solver_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the times of stages are computed."""
        return solver_dtype


class ImplicitAdaptive(_ImplicitRecording, Adaptive):
    """Records the steps of the adaptive implicit methods."""

    def begin(self, t: Tensor, *, recorded: bool) -> TimesFromStart:
        """Begin a solve over the times t; and to record it, if wanted."""
        self._output_times = {time: m for m, time in enumerate(t.reshape(-1).to(self.dtype).tolist()) if m > 0}
        return super().begin(t, recorded=recorded)

    def output_at(self, t: Tensor) -> int | None:
        """Return the index of the output time that a step was cut to end at: those of additive methods are."""
        if self.method.nonstiff is None or bool((self.jump_t == t).any()):
            return None
        return self._output_times.get(float(t))

    def stage_dtype(self, solver_dtype: torch.dtype) -> torch.dtype:
        return self.y0.abs().dtype

    def host_step(self, rk_state: Any) -> Any:
        """Take a step by the implicit method, with torchdiffeq's step control."""
        self.func.begin_step(rk_state.y1, rk_state.f1, 0.0)
        return self.base._adaptive_step(self, rk_state)


class ImplicitFixedGrid(_ImplicitRecording, FixedGrid):
    """Records the steps of the implicit methods on a grid."""

    start_keywords: Callable[[], dict[str, Any]]

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        if self.func.recorder is not None and not self.func.recorder.is_discovered:
            self.func(t0, y0)  # which shows what f depends on, before it is iterated with
        return super()._step_func(func, t0, dt, t1, y0)
