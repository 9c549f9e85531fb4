"""Mixed into torchdiffeq's solver classes, these note the steps that a solve accepts, and leave it as it is."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from ...randomness import GeneratorStates
from ...replay import Times
from ...trajectory import Step, Trajectory
from ...vector_field import VectorField
from .methods import hands_on_slope, read_dense_output, read_method


def recording(base: type) -> Any:
    """The class of a solver that does what `base` does and notes its steps."""
    return _recording(base, Adaptive if issubclass(base, RKAdaptiveStepsizeODESolver) else FixedGrid)


@functools.cache
def _recording(base: type, recorder: type) -> type:
    return type(base.__name__, (recorder, base), {"base": base})


class RecordedField:
    """The vector field as the base solver calls it: without graphs, but for the one that shows what it depends on."""

    def __init__(self, field: VectorField, func: Any, initial: Tensor) -> None:
        self.field = field
        self.func = func
        self.initial = initial
        self.discover = False
        self.evaluated_after_jump = False
        # Where the generators were, if f draws: before the first evaluation of this step, before the latest one, and
        # before the one outside of a step that gave its first slope.
        self.draws: GeneratorStates | None = None
        self.last_draw: GeneratorStates | None = None
        self.first_draw: GeneratorStates | None = None

    def begin_step(self) -> None:
        """Forget what was noted of the evaluations before."""
        self.evaluated_after_jump = False
        self.draws = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)  # the callbacks

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        keywords = {} if perturb is Perturb.NONE else {"perturb": perturb}
        if perturb is Perturb.NEXT:
            self.evaluated_after_jump = True
        if not self.discover:
            if self.field.draws:
                self.last_draw = self.field.generators.states()
                self.draws = self.draws or self.last_draw
            return self.field(t, y, keywords)
        self.discover = False
        before = self.field.generators.states()
        slope = self.field.discover(t, y, keywords)
        if self.field.draws:
            self.first_draw = self.last_draw = self.draws = before
        if torch.promote_types(slope.dtype, y.dtype) != y.dtype:
            raise ValueError(
                f"symplectic_adjoint: func returned {slope.dtype} for a state of {y.dtype}: return the state's dtype, "
                "or give y0 in the wider one"
            )
        return slope


@dataclass(frozen=True)
class StageTimes:
    """The times that torchdiffeq hands to f in a step.

    Args:
        c: the stages' times in units of the step, float64.
        solver_dtype: in which the solver keeps time.
        dtype: in which it computes the stages' times.
        device: the state's.
    """

    c: Tensor
    solver_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device

    def __call__(self, step: Step) -> Tensor:
        t0, t1, h = torch.tensor([step.t0, step.t1, step.h], dtype=self.solver_dtype).to(self.dtype)
        # As torchdiffeq does, so that a stage at the step's end is at t1 to the last bit.
        return torch.where(self.c == 1, t1, t0 + self.c.to(self.dtype) * h).to(self.device)


class _Recorder:
    """What the recorders of both families share."""

    trajectory: Trajectory | None = None
    func: RecordedField
    y0: Tensor
    end_state: Callable[[], Tensor]
    """The state at the end of the last step."""

    def record(self, solver_dtype: torch.dtype, stage_dtype: torch.dtype) -> None:
        """Begin to note steps.

        Raises:
            ValueError: if the method is not an explicit Runge-Kutta method.
        """
        tableau, keywords = read_method(self)
        dense = read_dense_output(self, tableau)
        c = tableau.with_end_stage().c if dense.end_stage else tableau.c
        stage_times = StageTimes(c, solver_dtype, stage_dtype, self.y0.device)
        self.trajectory = Trajectory(tableau, hands_on_slope(self), keywords, dense, stage_times)
        self.func.discover = True

    def note(self, step: Step, state: Tensor, slope: Tensor | None) -> None:
        """Add an accepted step to the trajectory."""
        assert self.trajectory is not None
        self.trajectory.steps.append(step)
        self.trajectory.states.append(state)
        self.trajectory.slopes.append(slope)

    def places(self, times: Tensor) -> list[tuple[int, float]]:
        """The step that each output after the first is made from, the first one to reach it, and its place there."""
        assert self.trajectory is not None
        steps = self.trajectory.steps
        ends = [step.t1 for step in steps]
        in_step = [bisect.bisect_left(ends, t) for t in times.tolist()[1:]]
        for n, following in itertools.pairwise(in_step):
            if n == following and self.trajectory.dense.end_stage and steps[n].draws is not None:
                raise RuntimeError(
                    "symplectic_adjoint: func draws random numbers, and interp='cubic' evaluates it anew for each "
                    "output time: with several in one step there is no gradient. Use interp='linear' or smaller steps"
                )
        return self._thetas(in_step, times[1:])

    def place_of_event(self, t: Tensor) -> list[tuple[int, float]]:
        """The place of an event, which is in the last step, or at the start (step -1)."""
        assert self.trajectory is not None
        n = len(self.trajectory.steps) - 1
        return self._thetas([n], t.reshape(1)) if n >= 0 else [(-1, 0.0)]

    def _thetas(self, in_step: list[int], times: Tensor) -> list[tuple[int, float]]:
        """Steps, and the places of times in them, computed in the solver's precision as torchdiffeq does."""
        assert self.trajectory is not None
        steps = [self.trajectory.steps[n] for n in in_step]
        t0, t1 = (torch.tensor([getattr(step, end) for step in steps], dtype=times.dtype) for end in ("t0", "t1"))
        return list(zip(in_step, ((times.cpu() - t0) / (t1 - t0)).tolist(), strict=True))

    def finish(self, places: list[tuple[int, float]]) -> Trajectory:
        """The trajectory, with the places of its outputs."""
        trajectory, self.trajectory = self.trajectory, None
        assert trajectory is not None
        trajectory.outputs = places
        if trajectory.steps:
            trajectory.states.append(self.end_state())
            trajectory.ends = True
        return trajectory


class Adaptive(_Recorder):
    """Notes the steps of torchdiffeq's adaptive methods."""

    dtype: torch.dtype
    rk_state: Any
    min_step: Tensor
    max_step: Tensor
    step_t: Tensor
    jump_t: Tensor

    def begin(self, t: Tensor) -> StartingTime:
        """Begin to note the steps of a solve over the times t."""
        self.record(self.dtype, self.y0.abs().dtype)
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

    def _adaptive_step(self, rk_state: Any) -> Any:
        self.func.begin_step()
        new = super()._adaptive_step(rk_state)  # type: ignore[misc]
        if self.trajectory is not None and new.t1 is not rk_state.t1:
            if (len(self.step_t) or len(self.jump_t)) and self._accepted_size != self._proposed_size(rk_state.dt):
                self._times.cut_steps.append(len(self.trajectory.steps))
            # Else it can be evaluated again from the state: but not where f drew numbers for it two steps ago.
            slope_needed = self._slope_handed_on and (
                not self.trajectory.tableau.first_same_as_last or self.func.draws is not None
            )
            self.note(
                Step(
                    float(rk_state.t1),
                    float(new.t1),
                    float(self._accepted_size),
                    self._slope_handed_on,
                    self._first_keywords,
                    None if self._slope_handed_on else self.func.first_draw,
                    self.func.draws,
                ),
                rk_state.y1,
                rk_state.f1.clone() if slope_needed else None,  # a copy: it is a view of all slopes of its step
            )
            # After a jump the host evaluates the slope anew, on the other side.
            self._slope_handed_on = not self.func.evaluated_after_jump
            self.func.first_draw = self.func.last_draw
            self._first_keywords = self.trajectory.keywords[-1] if self._slope_handed_on else {"perturb": Perturb.NEXT}
        return new

    def _interp_fit(self, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> Any:
        self._accepted_size = dt  # called for accepted steps alone
        return super()._interp_fit(y0, y1, k, dt)  # type: ignore[misc]

    def _proposed_size(self, dt: Tensor) -> Tensor:
        """The step size before a step_t or jump_t cuts it."""
        if not hasattr(self, "max_step"):  # torchdiffeq 0.2.3
            return dt
        return (dt if dt.isfinite() else self.min_step).clamp(self.min_step, self.max_step)


class FixedGrid(_Recorder):
    """Notes the steps of torchdiffeq's fixed-grid methods."""

    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor]

    def begin(self, t: Tensor) -> GridTimes | StartingTime:
        """Begin to note the steps of a solve over the times t, or from the only one up to an event."""
        stage_dtype = self.y0.abs().dtype
        if t.ndim == 0:
            self.record(stage_dtype, stage_dtype)
            return StartingTime(t)
        # The grid is built in the caller's grad mode: it may depend on t, on y0, and on whatever built it.
        grid = self.grid_constructor(self.func.func, self.func.initial, t)
        self.grid_constructor = lambda func, y0, t: grid.detach()
        self.record(grid.dtype, grid.dtype)
        return GridTimes(t, grid)

    def output_times(self, t: Tensor) -> Tensor:
        """Output times as the solver sees them."""
        return t

    def end_state(self) -> Tensor:
        """The state at the end of the last step."""
        y0, dy = self._last
        return y0 + dy

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        self.func.begin_step()
        result = super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        if self.trajectory is not None:
            keywords = self.trajectory.keywords[0]
            self.note(Step(float(t0), float(t1), float(dt), False, keywords, None, self.func.draws), y0, None)
            self._last = y0, result[0]
        return result


class StartingTime:
    """Times that are the start and constant step sizes: all move with the start."""

    def __init__(self, t: Tensor) -> None:
        self.inputs = (t,)
        self.cut_steps: list[int] = []
        """Steps cut to end at a step_t or jump_t, which does not move: the step's size takes up the start's move."""

    def __call__(self, trajectory: Trajectory, t: Tensor) -> Times:
        """The solve's times as functions of t: the output times, or the start alone of a solve up to an event."""
        start = t.reshape(-1)[0].double()
        moved = start - start.detach()
        starts, sizes = (
            torch.tensor([getattr(step, name) for step in trajectory.steps], dtype=torch.float64, device=t.device)
            for name in ("t0", "h")
        )
        last = self.cut_steps[0] if self.cut_steps else len(starts)
        step = torch.arange(len(starts), device=t.device)
        moving = torch.where(step <= last, moved, 0.0)
        outputs = torch.tensor(
            [trajectory.steps[n].t0 + theta * trajectory.steps[n].h for n, theta in trajectory.outputs if n >= 0],
            dtype=torch.float64, device=t.device,
        )  # fmt: skip
        # An event's time is a constant, as in torchdiffeq.
        return Times(
            starts + moving, sizes - torch.where(step == last, moved, 0.0), t[1:].double() if t.ndim else outputs
        )


class GridTimes:
    """Times that are a grid's points: each step's size moves with both its ends."""

    def __init__(self, t: Tensor, grid: Tensor) -> None:
        self.inputs = (t, grid)

    def __call__(self, trajectory: Trajectory, t: Tensor, grid: Tensor) -> Times:
        """The solve's times as functions of the output times and the grid."""
        return Times(grid[:-1].double(), grid.diff().double(), t[1:].double())
