"""The implicit methods' steps with an exact gradient, for torchdyn's loops."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ...adjoint.function import Inputs, attach_step
from ...field.evaluation import require_slope
from ...field.witness import refuse_transforms
from ...record.implicit_solve import ImplicitSolve, slopes_to_keep
from ...record.method import Reevaluation, Step, TakeStep
from .implicit import ImplicitSolver
from .solve import Solve, StageTimes, require_size, times_of_step
from .steps import AdjointSteps


class ImplicitAdjointSteps(AdjointSteps):
    """A mixin for `ImplicitSolver`: steps with an exact gradient."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None) -> Any:
        """Take torchdyn's step, with a gradient for the state, the time and size, the slope handed on, and f.

        Raises:
            ValueError: if the step can't be differentiated.
        """
        assert isinstance(self, ImplicitSolver)
        if not torch.is_grad_enabled():
            return ImplicitSolver.step(self, f, x, t, dt, k1, args)
        if self.loss is not None:
            raise ValueError(
                "symplectic_adjoint: there is no integral_loss with the implicit methods: make the integral a part of "
                "the state"
            )
        solve: Solve = self.__dict__["solve"]
        if solve.function is not f:
            solve.enter(self, f, x, slope_is_given=k1 is not None)
        return _step(self, solve, x, t, dt, k1)


def _step(solver: Any, solve: Solve, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None) -> Any:
    refuse_transforms()
    begin = time.perf_counter()
    recorder, implicit = solve.recorder, solver.implicit_solve(x)  # a loop may change the shape of the state
    field, tableau, state = recorder.field, solver.method.tableau, x.detach()
    if t.requires_grad or dt.requires_grad:
        recorder.want_time()
    if not recorder.is_discovered:
        recorder.evaluate(t.detach(), state, {})
    t0, h = t.item(), dt.item()
    if k1 is not None:
        require_size(t0, h, dt.dtype)
    # Where it was evaluated just before it can be again. Not where it is the last slope of the step that led here: that
    # is f there only as far as the stage's equation is solved.
    handed_on = k1 is not None and not solve.is_at_start(k1, x)
    given = None if k1 is None else require_slope(k1, x).detach().to(x.dtype)
    step = Step(t0, t0 + h, h, handed_on)
    stage_times = StageTimes(tableau.c.tolist(), t.shape, [t.dtype] * tableau.stages, t.device)
    fields = implicit.fields(field, stage_times([step])[0], [{}] * tableau.stages, recorder.count)
    taken = implicit.take(solver.steps, fields, h, state, given)
    end, more = solver.result(taken, state, t.detach(), dt.detach())
    if bool(taken.failed.any()):  # torchdyn will take a smaller one
        field.report.rejected += 1
        assert more is not None
        return more[0], end, *more[1:]
    take_step = _take_alone(implicit, stage_times, hands_on=more is not None)
    method = solve.method(None, stage_times, take_step, hands_on_slope=handed_on, implicit=implicit)
    trajectory = solve.trajectory(step, method, x, end)
    stages = slopes_to_keep(taken.parts, first_is_known=handed_on)
    recorder.keep(trajectory.checkpoints[0], x, k1 if handed_on else None, stages)
    slopes = {} if more is None else {tableau.stages - 1: more[0]}
    inputs = Inputs(x, (t, dt), times_of_step, k1 if handed_on else None)
    end, slopes = attach_step(end, slopes, trajectory, field, inputs)
    solve.ended(trajectory, end, None)
    solve.note(time.perf_counter() - begin)
    return (None, end, None) if more is None else (*slopes.values(), end, *more[1:])


def _take_alone(implicit: ImplicitSolve, stage_times: StageTimes, *, hands_on: bool) -> TakeStep:
    """Return the step by itself, to be taken again."""
    keywords: list[dict[str, Any]] = [{}] * implicit.method.tableau.stages

    def take_step(f: Reevaluation, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Not with `f`, which gives no graph: Newton's method needs derivatives.
        fields = implicit.fields(f.field, stage_times([step])[0], keywords, f.count)
        taken = implicit.take(implicit.steps_again(), fields, step.h, state, slope)
        end = state + implicit.layout.shaped(taken.increment)
        return end, implicit.layout.shaped(taken.slopes[-1]) if hands_on else None

    return take_step
