"""The implicit methods' steps with an exact gradient, for torchdyn's loops."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adjoint.implicit_step_back import slopes_to_keep
from ...adjoint.step_gradient import attach_step
from ...field.evaluation import require_slope
from ...field.vector_field import VectorField
from ...field.witness import refuse_transforms
from ...methods.implicit_step import TakenStep
from ...record.implicit_solve import ImplicitSolve, require_exact
from ...record.kept import Kept
from ...record.trajectory import NoOutputs, Step, TakeStep, Trajectory
from .implicit import ImplicitSolver
from .solve import Solve, StageTimes, require_size
from .solver import AdjointSteps


class ImplicitAdjointSteps(AdjointSteps):
    """Mixed into `ImplicitSolver`: steps with an exact gradient."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None) -> Any:
        """torchdyn's step, with a gradient for the state, the time and size, the slope handed on, and all f depends on.

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
            solve.enter(self, f, x)
        return _step(self, solve, x, t, dt, k1)


def _step(solver: Any, solve: Solve, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None) -> Any:
    refuse_transforms()
    field, checkpoints = solve.field, solve.checkpoints
    assert field is not None
    begin = time.perf_counter()
    layout, tableau = solver.layout(x), solver.method.tableau
    implicit = ImplicitSolve(solver.method, require_exact(solver.options), layout, solver.weights(layout))
    state = x.detach()
    if not solve.discovered:
        evaluation = field.discover(t.detach(), state, {}, t.requires_grad or dt.requires_grad)
        solve.discovered = True
        solving = implicit.require_equations(field, evaluation)
        checkpoints.measure(field, evaluation, state, tableau.stages, k1 is not None, 2, solving=solving)
    t0, h = t.item(), dt.item()
    if k1 is not None:
        require_size(t0, h, dt.dtype)
    # Where it was evaluated just before it can be again. Not where it is the last slope of the step that led here: that
    # is f there only as far as the stage's equation is solved.
    handed_on = k1 is not None and not solve.is_at_start(k1, x)
    given = None if k1 is None else require_slope(k1, x).detach().to(x.dtype)
    step = Step(t0, t0 + h, h, handed_on, {})
    stage_times = StageTimes(tableau.c.tolist(), t.shape, [t.dtype] * tableau.stages, t.device)

    def evaluated() -> None:
        field.report.evaluations += 1

    fields = implicit.fields(field, stage_times([step])[0], [{}] * tableau.stages, evaluated)
    taken = implicit.take(solver.steps, fields, h, state, given)
    end, more = solver.result(taken, state, t.detach(), dt.detach())
    if bool(taken.failed.any()):  # torchdyn will take a smaller one
        field.report.rejected += 1
        assert more is not None
        return more[0], end, *more[1:]
    trajectory = Trajectory(
        tableau, handed_on, [{}] * tableau.stages, NoOutputs(tableau.stages), stage_times,
        _take_alone(implicit, field, stage_times, more is not None), checkpoints, implicit, [step],
    )  # fmt: skip
    kept = _kept(solve, trajectory, taken, x, k1 if handed_on else None, end)
    trajectory = replace(trajectory, kept=[kept])
    slopes = {} if more is None else {tableau.stages - 1: more[0]}
    end, slopes = attach_step(end, slopes, trajectory, field, x, (t, dt), k1 if handed_on else None, False)
    end.symplectic_adjoint_step = weakref.ref(kept)  # type: ignore[attr-defined]
    solve.note(time.perf_counter() - begin)
    return (None, end, None) if more is None else (*slopes.values(), end, *more[1:])


def _kept(solve: Solve, trajectory: Trajectory, taken: TakenStep, x: Tensor, slope: Tensor | None, end: Tensor) -> Kept:
    """What is kept of a step: x is the state at its start, `slope` the one there if it was handed on."""
    checkpoints = solve.checkpoints
    previous = getattr(x, "symplectic_adjoint_step", lambda: None)()
    stages = slopes_to_keep(taken.parts, slope is not None) if checkpoints.wants_stages() else None
    kept = Kept(previous, x, slope, stages, None, trajectory, end)
    checkpoints.add(kept)
    return kept


def _take_alone(implicit: ImplicitSolve, field: VectorField, stage_times: StageTimes, hands_on: bool) -> TakeStep:
    """The step by itself, to be taken again."""

    def recomputed() -> None:
        field.report.recomputed += 1

    def take_step(f: Any, step: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Not with `f`, which gives no graph: Newton's method needs derivatives.
        fields = implicit.fields(field, stage_times([step])[0], [{}] * implicit.method.tableau.stages, recomputed)
        taken = implicit.take(implicit.steps_again(), fields, step.h, state, slope)
        end = state + implicit.layout.shaped(taken.increment)
        return end, implicit.layout.shaped(taken.slopes[-1]) if hands_on else None

    return take_step
