"""Mixed into torchdiffeq's solver classes, these note the steps that a solve accepts, and leave it as it is."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq._impl import misc
from torchdiffeq._impl.misc import Perturb

from ...checkpoints import Checkpoints, Kept
from ...graphs import depends_on_another
from ...implicit.solve import ImplicitSolve
from ...runge_kutta import combined
from ...step_graph import StepGraph
from ...tableau import ButcherTableau
from ...trajectory import Step, TakeStep, Trajectory
from ...vector_field import Evaluation
from .adaptive_step import PreparedTableau, adaptive_step, runge_kutta_step
from .methods import hands_on_slope, read_dense_output, read_method
from .recorded_field import RecordedField
from .times import GridTimes, StageTimes, StartingTime

_CHUNK = 64
"""For how many steps the stages' times are made at once."""


class _Method(NamedTuple):
    """What has to be known of a method to take a step of it."""

    tableau: ButcherTableau
    keywords: list[dict[str, Any]]
    stage_times: StageTimes


def _explicit_step(method: _Method, f: Any, step: Step, state: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    """A step from a state to the one at its end."""
    a, b = method.tableau.numbers
    slopes: list[Tensor] = []
    for t, row, keywords in zip(method.stage_times([step])[0], a, method.keywords, strict=False):
        slopes.append(f(t, combined(state, row, slopes, step.h), **keywords))
    return state + combined(None, b, slopes, step.h), None


def _in_chunks(steps: Sequence[Step], stage_times: Callable[..., Sequence[Any]]) -> Iterator[Sequence[Tensor]]:
    """The times of the stages of steps one after the other, made for many at once."""
    for first in range(0, len(steps), _CHUNK):
        yield from stage_times(steps[first : first + _CHUNK])


class _Recorder(ABC):
    """What the recorders of both families share."""

    base: Any
    trajectory: Trajectory | None = None
    is_own = True
    checkpoints: Checkpoints
    func: RecordedField
    y0: Tensor

    @abstractmethod
    def step_alone(self, method: _Method, dtype: torch.dtype) -> TakeStep:
        """The step, taken by itself.

        Args:
            method: the solver's.
            dtype: in which the solver keeps time.
        """

    def has_callbacks(self, *names: str) -> bool:
        """Whether func has a callback of one of these names."""
        none = getattr(misc, "_null_callback", None)  # torchdiffeq 0.2.3 has no callbacks
        return any(getattr(self.func, name, none) is not none for name in names)

    @abstractmethod
    def end_state(self) -> Tensor:
        """The state at the end of the last step."""

    @abstractmethod
    def read_times(self) -> None:
        """Have the steps' times as numbers."""

    def record(
        self, solver_dtype: torch.dtype, stage_dtype: torch.dtype, outputs: int, steps: int | None = None
    ) -> None:
        """Begin to note steps.

        Args:
            solver_dtype: in which the solver keeps time.
            stage_dtype: in which it computes the times of stages.
            outputs: how many output times there are.
            steps: how many steps there will be, if that is known.

        Raises:
            ValueError: if the method is not a Runge-Kutta method.
        """
        tableau, keywords = read_method(self)
        dense = read_dense_output(self, tableau)
        stage_times = StageTimes(dense.times(tableau.c), solver_dtype, stage_dtype, self.y0.device)
        handed_on, checkpoints, field = hands_on_slope(self), self.checkpoints, self.func.field
        take_step = self.step_alone(_Method(tableau, keywords, stage_times), solver_dtype)
        self.trajectory = Trajectory(
            tableau, handed_on, keywords, dense, stage_times, take_step, checkpoints, self.implicit_solve()
        )
        self._evaluations = tableau.stages - (1 if handed_on else 0)
        self._planned = steps
        slope_kept = self.trajectory.keeps_slope
        # Outputs may be made of slopes that are in no graph.
        may_link = self.is_own and not dense.end_stage
        self.func.whole = may_link and checkpoints.storage.on_device and self._wants_graph()

        def begin(evaluation: Evaluation) -> bool:
            solving = self.discovered(evaluation)
            slopes_kept = slope_kept or (handed_on and field.draws)
            checkpoints.measure(field, evaluation, self.y0, tableau.stages, slopes_kept, outputs, steps, solving)
            # Within a graph autograd sums in the parameters' precision: of half precision that is to be no long sum.
            self._links_graphs = may_link and all(tensor.element_size() >= 4 for tensor in field.dependencies)
            wanted = self._wants_graph()
            self.func.whole = self.func.whole and wanted and self._links_graphs and not field.left_out
            return wanted

        self.func.on_discovery = begin
        self.func.has_room_for = checkpoints.has_room_for

    def implicit_solve(self) -> ImplicitSolve | None:
        """How the stages are solved for, if they have to be."""
        return None

    def discovered(self, evaluation: Evaluation) -> int:
        """Called with the first evaluation; returns the bytes that solving for the stages takes."""
        return 0

    def kept_stages(self, step: Step) -> list[Tensor]:
        """What is kept of the stages of the step that was taken last."""
        assert self.trajectory is not None
        return self.func.stages[0 if self.trajectory.hands_on_slope else 1 :]

    def _wants_graph(self) -> bool:
        assert self.trajectory is not None
        if self.func.want_time:
            return False  # it has no times in it
        remaining = 0 if self._planned is None else self._planned - len(self.trajectory.steps) - 1
        return self.checkpoints.wants_graphs(self._evaluations, remaining)

    def begin_step(self, start: Tensor, first_slope: Tensor | None, h: Any, follows: bool) -> None:
        """Begin a step, or another attempt at it.

        Args:
            start: the state at its start.
            first_slope: the slope there, if it is not evaluated in the step.
            h: its size, None if that is not known yet.
            follows: whether the state is where the step before ended, and the slope the last one of that.
        """
        if (trajectory := self.trajectory) is None:
            return
        func, graph = self.func, None
        if h is not None and self._wants_graph():
            before = self._graph_before() if follows else None
            graph = StepGraph(func.field, trajectory.tableau, start, float(h), first_slope, before)
            if first_slope is not None and before is not None:
                before.end_as(start)
            elif first_slope is not None and func.first is not None:
                func.take_first(graph, func.first)
        func.begin_step(self._evaluations, graph)

    def _graph_before(self) -> StepGraph | None:
        """The graph of the step before, if this step's is to go on from it."""
        assert self.trajectory is not None
        graph = self.trajectory.kept[-1].graph
        if graph is None or not self._links_graphs:
            return None
        # Where it is known how many steps there will be, the graphs of all of them fit.
        return graph if self._planned is not None or self.checkpoints.may_go_on(graph) else None

    def note(self, step: Step, state: Tensor, slope: Tensor | None, follows: bool = True) -> None:
        """Add an accepted step to the trajectory, with the state at its start and, if it has to be kept, the slope.

        Args:
            step: the step.
            state: the state at its start.
            slope: the slope there, None if it can be evaluated again.
            follows: whether the state is where the step before ended, if there is one.
        """
        trajectory, checkpoints, func = self.trajectory, self.checkpoints, self.func
        assert trajectory is not None
        stages: list[Tensor] | None = None
        graph, size = func.graph, 0
        if func.whole and (graph is None or (graph.before is None and trajectory.kept)):
            self._give_up_whole_graph(trajectory)
        if graph is not None:
            state = state if graph.before is None else graph.origin.detach()  # the same, which the graph has anyway
            size = checkpoints.size_of(graph)
        elif checkpoints.wants_stages() and step.draws is None:  # else they must be evaluated again, in the same order
            stages = self.kept_stages(step)
        func.first, func.stages, func.graph = None, [], None
        previous = trajectory.kept[-1] if trajectory.kept and follows else None
        kept = Kept(previous, state, slope, stages, graph, len(trajectory.kept))
        trajectory.steps.append(step)
        trajectory.kept.append(kept)
        checkpoints.add(kept, size, step.draws_size)

    def _give_up_whole_graph(self, trajectory: Trajectory) -> None:
        """The graphs of all steps are not to be one after all: have the sweep go through them, if it can."""
        self.func.whole = False
        graphs = [kept.graph for kept in trajectory.kept if kept.graph is not None and kept.graph.stand_ins is None]
        initial, field = self.func.initial, self.func.field
        # What is behind the initial state would be counted twice, if f depends on that too.
        shared = any(tensor is initial for tensor in field.dependencies)
        if graphs and (field.stand_ins or shared or depends_on_another(initial, field.dependencies)):
            self.checkpoints.drop_graphs()
        for graph in graphs:
            graph.stand_ins = field.stand_ins

    def is_whole(self, trajectory: Trajectory) -> bool:
        """Whether the graphs of all steps of a solve are one."""
        whole = self.func.whole and bool(trajectory.kept) and trajectory.kept[-1].graph is not None
        if whole and not self.checkpoints.may_join():
            self._give_up_whole_graph(trajectory)
        return whole and self.func.whole

    def places(self, times: Tensor) -> list[tuple[int, float]]:
        """The step that each output after the first is made from, the first one to reach it, and its place there."""
        assert self.trajectory is not None
        self.read_times()
        steps = self.trajectory.steps
        ends = [step.t1 for step in steps]
        outputs = times.tolist()[1:]
        in_step, n = [], 0
        for t in outputs:
            while ends[n] < t:  # not by bisection: a grid may go back
                n += 1
            in_step.append(n)
        for n, following in itertools.pairwise(in_step):
            if n == following and self.trajectory.dense.end_stage and steps[n].draws is not None:
                raise RuntimeError(
                    "symplectic_adjoint: func draws random numbers, and interp='cubic' evaluates it anew for each "
                    "output time: with several in one step there is no gradient. Use interp='linear' or smaller steps"
                )
        if all(ends[n] == t for n, t in zip(in_step, outputs, strict=True)):
            return [(n, 1.0) for n in in_step]
        return self._thetas(in_step, times[1:])

    def place_of_event(self, t: Tensor) -> list[tuple[int, float]]:
        """The place of an event, which is in the last step, or at the start (step -1)."""
        assert self.trajectory is not None
        self.read_times()
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
        if trajectory.kept:
            trajectory.kept[-1].end = self.end_state()
        report, checkpoints = self.func.field.report, self.checkpoints
        report.accepted = len(trajectory.steps)
        report.checkpoint_bytes, report.graph_bytes = checkpoints.most_states, checkpoints.most_graphs
        report.budget_bytes, report.kept = checkpoints.budget, checkpoints.chosen()
        return trajectory


class Adaptive(_Recorder):
    """Notes the steps of torchdiffeq's adaptive methods."""

    dtype: torch.dtype
    rk_state: Any
    min_step: Tensor
    max_step: Tensor
    step_t: Tensor
    jump_t: Tensor
    tableau: Any

    def begin(self, t: Tensor, recorded: bool) -> StartingTime:
        """Begin a solve over the times t, and to note its steps if they are to be recorded."""
        self.tableau = PreparedTableau.of(self.tableau)
        if recorded:
            self.record(self.dtype, self.y0.abs().dtype, max(2, t.numel()))
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

    def step_alone(self, method: _Method, dtype: torch.dtype) -> TakeStep:
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
        slope_needed = self._slope_handed_on and (self.trajectory.keeps_slope or self.func.draws is not None)
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


class FixedGrid(_Recorder):
    """Notes the steps of torchdiffeq's fixed-grid methods."""

    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor]
    interp: str

    def begin(self, t: Tensor, recorded: bool) -> GridTimes | StartingTime:
        """Begin a solve over the times t, or from the only one up to an event; and to note its steps, if recorded."""
        stage_dtype = self.y0.abs().dtype
        self._grid: list[Step] | None = None
        self._stage_times: Iterator[Sequence[Tensor]] | None = None
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
        self._stage_times = _in_chunks(self._grid, self.trajectory.stage_times)
        return GridTimes(t, grid)

    def step_alone(self, method: _Method, dtype: torch.dtype) -> TakeStep:
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
            dy, _ = self._take(step, y0, n > 0)
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

    def _take(self, step: Step, y0: Tensor, follows: bool) -> tuple[Tensor, Tensor]:
        """Take a step: what it adds to the state, and the slope at its start."""
        assert self.trajectory is not None
        self.begin_step(y0, None, step.h, follows)
        stage_times = self.trajectory.stage_times([step])[0] if self._stage_times is None else next(self._stage_times)
        result = self.func.take_step(self.trajectory.tableau, step, stage_times, self.trajectory.keywords, y0)
        self._took(step, y0, result[0], follows)
        return result

    def _took(self, step: Step, y0: Tensor, dy: Tensor, follows: bool) -> None:
        """Note a step that was taken."""
        self.note(step if self.func.draws is None else replace(step, draws=self.func.draws), y0, None, follows)
        self._last = y0, dy

    def read_times(self) -> None:
        """Have the steps' times as numbers, as they are."""
