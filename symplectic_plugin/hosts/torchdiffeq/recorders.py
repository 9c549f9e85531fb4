"""Mixed into torchdiffeq's solver classes, these note the steps that a solve accepts, and leave it as it is."""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq._impl import misc
from torchdiffeq._impl.misc import Perturb, _PerturbFunc

from ...checkpoints import Checkpoints, Kept
from ...implicit.solve import ImplicitSolve
from ...randomness import GeneratorStates
from ...replay import Times
from ...runge_kutta import combined
from ...step_graph import StepGraph
from ...tableau import ButcherTableau
from ...trajectory import Step, TakeStep, Trajectory
from ...vector_field import Evaluation, Keywords, VectorField
from .adaptive_step import PreparedTableau, adaptive_step, runge_kutta_step
from .methods import hands_on_slope, read_dense_output, read_method

_CHUNK = 64
"""For how many steps the stages' times are made at once, and graphs go on from each other."""


class Unperturbed:
    """The vector field without the outermost of torchdiffeq's wrappers, where that does nothing.

    It moves a time to its neighbour on request, and puts it into the state's precision, at a cost that a small network
    feels.
    """

    def __init__(self, func: Any) -> None:
        self.func = func
        self.inner = func.base_func if type(func) is _PerturbFunc else func

    def __call__(self, t: Tensor, y: Tensor, **keywords: Any) -> Any:
        return self.func(t, y, **keywords) if keywords or t.dtype != y.dtype else self.inner(t, y)


class RecordedField:
    """The vector field as the base solver calls it: without graphs, but for the one that shows what it depends on."""

    def __init__(self, field: VectorField, func: Any, initial: Tensor) -> None:
        self.field = field
        self.func = func
        self.initial = initial
        self.on_discovery: Callable[[Evaluation], bool] | None = None
        self.want_time = False
        self.evaluated_after_jump = False
        # Where the generators were, if f draws: before the first evaluation of this step, before the latest one, and
        # before the one outside of a step that gave its first slope.
        self.draws: GeneratorStates | None = None
        self.last_draw: GeneratorStates | None = None
        self.first_draw: GeneratorStates | None = None
        # The evaluation that gave the solve's first slope; the states of this step's stages, how many it will evaluate,
        # and its graph, if that is to be kept.
        self.first: Evaluation | None = None
        self.stages: list[Any] = []
        self.expected = 0
        self.graph: StepGraph | None = None

    def begin_step(self, evaluations: int, graph: StepGraph | None) -> None:
        """Forget what was noted of the evaluations before."""
        self.evaluated_after_jump = False
        self.draws = None
        self.stages = []
        self.expected, self.graph = evaluations, graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)  # the callbacks

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        if perturb is Perturb.NEXT:
            self.evaluated_after_jump = True
        in_step = len(self.stages) < self.expected
        # A copy of the time, for the graph: the caller's may be changed in place.
        t = t.detach().clone() if in_step and self.graph is not None else t
        slope = self._evaluate(t, y, {} if perturb is Perturb.NONE else {"perturb": perturb}, in_step)
        if in_step:
            self.stages.append(y)
        return slope

    def take_step(self, tableau: ButcherTableau, step: Step, times: Sequence[Tensor], keywords: Any, y: Tensor) -> Any:
        """What a step that has begun adds to the state y, and its first slope; its stages are computed here."""
        a, b = tableau.numbers
        slopes: list[Tensor] = []
        for t, row, of_stage in zip(times, a, keywords, strict=False):  # there may be one more time
            stage = combined(y, row, slopes, step.h) if self.graph is None or not slopes else None
            slopes.append(self._evaluate(t, stage, of_stage, True))
            self.stages.append(stage)
        moved = combined(None, b, slopes, step.h) if self.graph is None else self.graph.moved.detach()
        return moved, slopes[0]

    def _evaluate(self, t: Tensor, y: Tensor | None, keywords: Keywords, in_step: bool) -> Tensor:
        field = self.field
        field.report.evaluations += 1
        if self.on_discovery is not None:
            assert y is not None
            return self._discover(t, y, keywords, in_step)
        if field.draws:
            self.last_draw = field.generators.states()
            self.draws = self.draws or self.last_draw
        if in_step and self.graph is not None:
            return self.graph.evaluate(t, y, keywords)
        assert y is not None
        return field(t, y, keywords)

    def _discover(self, t: Tensor, y: Tensor, keywords: Keywords, in_step: bool) -> Tensor:
        assert self.on_discovery is not None
        begin, self.on_discovery = self.on_discovery, None
        before = self.field.generators.states()
        evaluation = self.field.discover(t, y, keywords, self.want_time)
        if self.field.draws:
            self.first_draw = self.last_draw = self.draws = before
        slope = evaluation.slope
        if torch.promote_types(slope.dtype, y.dtype) != y.dtype:
            raise ValueError(
                f"symplectic_adjoint: func returned {slope.dtype} for a state of {y.dtype}: return the state's dtype, "
                "or give y0 in the wider one"
            )
        wanted = begin(evaluation) and not self.field.stand_ins
        if in_step:
            self.graph = self.graph if wanted else None
            if self.graph is not None:
                self.graph.take(evaluation)
        elif wanted:
            self.first = evaluation
        return slope.detach()


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

    def __call__(self, steps: Sequence[Step]) -> list[Sequence[Tensor]]:
        numbers = [(step.t0, step.t1, step.h) for step in steps]
        t0, t1, h = torch.tensor(numbers, dtype=self.solver_dtype).to(self.dtype).T[:, :, None]
        # As torchdiffeq does, so that a stage at the step's end is at t1 to the last bit.
        times = torch.where(self.c == 1, t1, t0 + self.c.to(self.dtype) * h).to(self.device)
        return [of_step.unbind() for of_step in times.unbind()]


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

        def begin(evaluation: Evaluation) -> bool:
            solving = self.discovered(evaluation)
            slopes_kept = slope_kept or (handed_on and field.draws)
            checkpoints.measure(field, evaluation, self.y0, tableau.stages, slopes_kept, outputs, steps, solving)
            # Within a graph autograd sums in the parameters' precision: of half precision that is to be no long sum.
            self._links_graphs = all(tensor.element_size() >= 4 for tensor in field.dependencies)
            return self._wants_graph()

        self.func.on_discovery = begin

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

    def begin_step(self, start: Tensor, first_slope: Tensor | None, h: Any, before: StepGraph | None = None) -> None:
        """Begin a step, or another attempt at it.

        Args:
            start: the state at its start.
            first_slope: the slope there, if it is not evaluated in the step.
            h: its size, None if that is not known yet.
            before: a graph for the step's to go on from, if there is to be one.
        """
        if self.trajectory is not None:
            graph = None
            if h is not None and self._wants_graph():
                graph = StepGraph(self.func.field, self.trajectory.tableau, start, float(h), first_slope, before)
            self.func.begin_step(self._evaluations, graph)

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
        if graph is not None:
            graph.first = None if step.slope_handed_on else func.first
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

    def places(self, times: Tensor) -> list[tuple[int, float]]:
        """The step that each output after the first is made from, the first one to reach it, and its place there."""
        assert self.trajectory is not None
        self.read_times()
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
        self.begin_step(rk_state.y1, rk_state.f1, self._proposed_size(rk_state.dt) if uncut else None)
        new = self.host_step(rk_state)
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

    def begin(self, t: Tensor, recorded: bool) -> GridTimes | StartingTime:
        """Begin a solve over the times t, or from the only one up to an event; and to note its steps, if recorded."""
        stage_dtype = self.y0.abs().dtype
        self._grid: list[Step] | None = None
        self._stage_times: Iterator[Sequence[Tensor]] | None = None
        # Of torchdiffeq's own steps nothing but the tableau matters; a user's may do something besides.
        self._is_own = type(self).base.__module__.startswith("torchdiffeq.")
        no_callback = getattr(misc, "_null_callback", None)  # torchdiffeq 0.2.3 has no callbacks
        self._has_callback = getattr(self.func, "callback_step", no_callback) is not no_callback
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
        if self._is_own:
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

    def _graph_before(self) -> StepGraph | None:
        """The graph of the step before, if this step's is to go on from it: once the rest is known to fit."""
        trajectory = self.trajectory
        if trajectory is None or not self._is_own or self._grid is None:
            return None
        graph = trajectory.kept[-1].graph
        if graph is None or not self._links_graphs or graph.index + 1 == _CHUNK:
            return None
        return None if trajectory.dense.end_stage else graph  # outputs are made of slopes that are not in it

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        if (trajectory := self.trajectory) is None:
            return super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        if self._grid is None:
            step = Step(float(t0), float(t1), float(dt), False, trajectory.keywords[0])
        else:
            step = self._grid[len(trajectory.steps)]
        follows = bool(trajectory.kept) and self._follows(y0)
        self.begin_step(y0, None, step.h, self._graph_before() if follows else None)
        if self._is_own:
            times = trajectory.stage_times([step])[0] if self._stage_times is None else next(self._stage_times)
            result = self.func.take_step(trajectory.tableau, step, times, trajectory.keywords, y0)
        else:
            result = super()._step_func(func, t0, dt, t1, y0)  # type: ignore[misc]
        self.note(step if self.func.draws is None else replace(step, draws=self.func.draws), y0, None, follows)
        self._last = y0, result[0]
        return result

    def read_times(self) -> None:
        """Have the steps' times as numbers, as they are."""


class StartingTime:
    """Times that are the start and constant step sizes: all move with the start."""

    def __init__(self, t: Tensor) -> None:
        self.inputs = (t,)
        self.cut_steps: dict[int, int | None] = {}
        """Steps cut to end at the output time of an index, or at a step_t or jump_t, which does not move: the step's
        size takes up the moves of both its ends."""

    def __call__(self, trajectory: Trajectory, t: Tensor) -> Times:
        """The solve's times as functions of t: the output times, or the start alone of a solve up to an event."""
        given = t.reshape(-1).double()
        # What a time may move with: an entry of t, or at the end of these nothing.
        moved = torch.cat([given - given.detach(), given.new_zeros(1)])
        starts, sizes = (
            torch.tensor([getattr(step, name) for step in trajectory.steps], dtype=torch.float64, device=t.device)
            for name in ("t0", "h")
        )
        with_which, cuts = [0], list(self.cut_steps)
        for n in range(len(starts)):
            end = self.cut_steps.get(n, with_which[-1])
            with_which.append(len(given) if end is None else end)
        moves = moved[with_which]
        if cuts:
            cut = torch.tensor(cuts, device=t.device)
            sizes = sizes.index_add(0, cut, moves[cut + 1] - moves[cut])
        outputs = torch.tensor(
            [trajectory.steps[n].t0 + theta * trajectory.steps[n].h for n, theta in trajectory.outputs if n >= 0],
            dtype=torch.float64, device=t.device,
        )  # fmt: skip
        # An event's time is a constant, as in torchdiffeq.
        return Times(starts + moves[:-1], sizes, t[1:].double() if t.ndim else outputs)


class GridTimes:
    """Times that are a grid's points: each step's size moves with both its ends."""

    def __init__(self, t: Tensor, grid: Tensor) -> None:
        self.inputs = (t, grid)

    def __call__(self, trajectory: Trajectory, t: Tensor, grid: Tensor) -> Times:
        """The solve's times as functions of the output times and the grid."""
        return Times(grid[:-1].double(), grid.diff().double(), t[1:].double())
