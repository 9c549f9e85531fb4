"""Mixed into the solvers of implicit methods, these note the steps that a solve accepts.

f is evaluated any number of times while the stages of a step are solved for. None of that is noted: a stage is what was
arrived at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...adjoint.implicit_step_back import slopes_to_keep
from ...field.evaluation import Evaluation
from ...methods.implicit_step import ImplicitSteps, StepFields, TakenStep
from ...methods.implicit_tableaux import ImplicitMethod
from ...record.implicit_solve import ImplicitSolve, require_exact
from ...record.trajectory import Step, TakeStep, Trajectory
from .adaptive import Adaptive
from .fixed_grid import FixedGrid
from .methods import hands_on_slope
from .recorded_field import RecordedField
from .times import StartingTime


class _ImplicitRecorder:
    """What the recorders of both families have in place of the explicit ones' parts."""

    method: ImplicitMethod
    trajectory: Trajectory | None
    func: RecordedField
    y0: Tensor
    steps: ImplicitSteps
    weights: Callable[[Tensor], Tensor]
    parts: Any
    layout: Any
    stage_keywords: Callable[[], list[dict[str, Any]]]
    _taken: TakenStep

    def parts_of(self, func: RecordedField) -> Any:
        return super().parts_of(func.func)  # type: ignore[misc]

    def implicit_solve(self) -> ImplicitSolve:
        """How the stages are solved for.

        Raises:
            ValueError: if not to rounding.
        """
        return ImplicitSolve(self.method, require_exact(self.steps.options), self.layout, self.weights, self.parts)

    def discovered(self, evaluation: Evaluation) -> int:
        """The bytes that solving for the stages takes.

        Raises:
            ValueError: if the stages can't be solved for to rounding.
        """
        assert self.trajectory is not None
        assert self.trajectory.implicit is not None
        return self.trajectory.implicit.require_equations(self.func.field, evaluation)

    def fields(self, times: Sequence[Tensor], keywords: Sequence[dict[str, Any]]) -> StepFields:
        """f at the stages of a step, as the vector field that dependencies and counts belong to."""
        solve = ImplicitSolve(self.method, self.steps.options, self.layout, self.weights, self.parts)
        return solve.fields(self.func.field, times, keywords, self._evaluated)

    def _evaluated(self) -> None:
        self.func.field.report.evaluations += 1

    def take(self, *args: Any) -> TakenStep:
        """Take a step, and remember it."""
        self._taken = super().take(*args)  # type: ignore[misc]
        return self._taken

    def kept_stages(self, step: Step) -> list[Tensor]:
        """What is kept of the stages of the step that was taken last: their slopes."""
        return slopes_to_keep(self._taken.parts, step.slope_handed_on)

    def _wants_graph(self) -> bool:
        return False

    def begin_step(self, *_: Any) -> None:
        """Begin a step, or another attempt at it: no evaluation is one of a stage."""
        self.func.begin_step(0, None)
        self.func.first = None

    def step_alone(self, _: Any, dtype: torch.dtype) -> TakeStep:
        """The method's step without step control."""
        field, solve, device = self.func.field, self.implicit_solve(), self.y0.device
        c, keywords = self.method.tableau.c.tolist(), self.stage_keywords()
        stage_dtype, hands_on = self.stage_dtype(dtype), hands_on_slope(self)

        def recomputed() -> None:
            field.report.recomputed += 1

        def take_step(f: Any, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
            # Not with `f`, which gives no graph: Newton's method needs derivatives.
            t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=dtype).to(device, stage_dtype)
            times = [t1 if c_i == 1 else t0 + c_i * h for c_i in c]
            fields = solve.fields(field, times, [step.first_keywords, *keywords[1:]], recomputed)
            taken = solve.take(solve.steps_again(), fields, step.h, state, slope)
            end = state + solve.layout.shaped(taken.increment)
            return end, solve.layout.shaped(taken.slopes[-1]) if hands_on else None

        return take_step

    def stage_dtype(self, solver_dtype: torch.dtype) -> torch.dtype:
        """In which the times of stages are computed."""
        return solver_dtype


class ImplicitAdaptive(_ImplicitRecorder, Adaptive):
    """Notes the steps of the adaptive implicit methods."""

    def begin(self, t: Tensor, recorded: bool) -> StartingTime:
        """Begin a solve over the times t, and to note its steps if they are to be recorded."""
        self._output_times = {time: m for m, time in enumerate(t.reshape(-1).to(self.dtype).tolist()) if m > 0}
        return super().begin(t, recorded)

    def output_at(self, t: Tensor) -> int | None:
        """The index of the output time that a step was cut to end at: those of additive methods are."""
        if self.method.nonstiff is None or bool((self.jump_t == t).any()):
            return None
        return self._output_times.get(float(t))

    def stage_dtype(self, solver_dtype: torch.dtype) -> torch.dtype:
        """In which the times of stages are computed."""
        return self.y0.abs().dtype

    def host_step(self, rk_state: Any) -> Any:
        """A step by the implicit method, and torchdiffeq's step control."""
        return self.base._adaptive_step(self, rk_state)


class ImplicitFixedGrid(_ImplicitRecorder, FixedGrid):
    """Notes the steps of the implicit methods on a grid."""

    start_keywords: Callable[[], dict[str, Any]]

    def record(
        self, solver_dtype: torch.dtype, stage_dtype: torch.dtype, outputs: int, steps: int | None = None
    ) -> None:
        """Begin to note steps."""
        super().record(solver_dtype, stage_dtype, outputs, steps)
        assert self.trajectory is not None
        if self.trajectory.dense.start_stage:
            self.trajectory.keywords.append(self.start_keywords())

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        if self.func.on_discovery is not None:
            self.func(t0, y0)  # which shows what f depends on, before it is iterated with
        return super()._step_func(func, t0, dt, t1, y0)
