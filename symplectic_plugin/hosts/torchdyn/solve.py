"""A solve by torchdyn while its loop takes steps, and the vector field as the steps call it."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...adjoint.live_solution import LiveWatch
from ...adjoint.times import SolveTimes
from ...field._torch_compat import saved_tensor_hooks_are_active
from ...field.compiled import CompiledFunction
from ...field.evaluation import Evaluation, require_slope
from ...field.report import new_report
from ...field.vector_field import VectorField
from ...methods.tableau import ButcherTableau
from ...record.budget import Demand
from ...record.checkpoint import Checkpoint
from ...record.implicit_solve import ImplicitSolve
from ...record.method import Method, NoOutputs, Reevaluation, Step, TakeStep
from ...record.recorder import Plan, Recorder
from ...record.storage import storage
from ...record.store import CheckpointStore
from ...record.trajectory import Trajectory
from .implicit import ImplicitSolver
from .methods import tableau_of

NAME = "symplectic_adjoint"


def require_size(t: float, h: float, dtype: torch.dtype) -> None:
    """Refuse a step with which a loop of torchdyn's with step control goes on for ever.

    Raises:
        ValueError: if its size h, of this dtype, is one.
    """
    if math.isnan(h) or not dtype.is_floating_point:
        raise ValueError(
            f"{NAME}: a step at t = {t} is to have the size {h}, of {dtype}, with which torchdyn goes on for "
            "ever: give floating-point times, and a vector field, initial state and tolerances that are finite"
        )


class Solve:
    """A solve that a solver is taking steps of.

    Attributes:
        function: the vector field, as torchdyn calls it.
        watch: watches the backward passes through the live graph, if there is one.
        tableau: coefficients of the method; None if it is not a Runge-Kutta method.
        recorder: the solve's.
        integral: the integral that is added to whatever is differentiated, if there is one.
        may_draw: whether a step that is recomputed as a whole may draw random numbers.
    """

    def __init__(self) -> None:
        self.function: Any = None
        self.tableau: ButcherTableau | None = None
        self.integral: Integral | None = None
        self.may_draw = True
        self.watch: LiveWatch | None = None
        self._recorder: Recorder | None = None
        self._stepper: Any = None
        self._slope_at_start: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        # By the state at a step's end: its checkpoint. By a step's last slope: the state at its end.
        self._checkpoints = WeakTensorKeyDictionary()
        self._ends = WeakTensorKeyDictionary()

    @property
    def recorder(self) -> Recorder:
        """The solve's recorder."""
        assert self._recorder is not None
        return self._recorder

    def enter(self, solver: Any, f: Any, x: Any, *, slope_is_given: bool) -> None:
        """Begin with a vector field, from the state x, with the slope there if it is given."""
        self.function = f
        self.tableau = tableau_of(solver)
        if self.tableau is None or not isinstance(x, Tensor):
            return
        compiled = CompiledFunction(_with_whole_counts(f), solver.compile) if solver.compile else None
        self.integral = None if solver.loss is None else Integral(compiled or f, solver.loss, x.shape)
        store = CheckpointStore(solver.checkpoint, solver.memory_budget, storage(solver.offload, x.device))
        if saved_tensor_hooks_are_active():
            store.keep_states_alone()
        implicit = _implicit_solve(solver, x)
        name = solver.name if isinstance(solver, ImplicitSolver) else solver.base.__name__
        report = new_report("torchdyn", name, store.policy)
        field = VectorField(self.integral or compiled or f, x.device, report, solver.params, compiled=compiled)
        self._stepper = copy.copy(solver)
        self._stepper.__class__ = solver.base
        self._stepper.__dict__.pop("solve")
        tableau = self.tableau

        def demand(evaluation: Evaluation) -> Demand:
            keeps_slope = field.draws if implicit is None else slope_is_given
            solving = 0 if implicit is None else implicit.require_equations(field, evaluation)
            evaluations = tableau.stages if implicit is None else 0
            return Demand(evaluation.argument, tableau.stages, keeps_slope, 2, None, solving, evaluations)

        live = implicit is None and self.integral is None
        plan = Plan(x, demand, may_be_live=live, live_share=0.5, live_by_host=True)
        self._recorder = Recorder(field, store, self.method(implicit=implicit), plan)

    def method(
        self,
        tableau: ButcherTableau | None = None,
        stage_times: Any = None,
        take_step: TakeStep | None = None,
        *,
        hands_on_slope: bool = False,
        implicit: ImplicitSolve | None = None,
    ) -> Method:
        """Return the method of one step: torchdyn's times have shapes and dtypes that differ from step to step."""
        tableau = tableau or self.tableau
        assert tableau is not None
        nothing: Sequence[dict[str, Any]] = [{}] * tableau.stages
        take_step = take_step or _no_step
        return Method(tableau, stage_times, take_step, NoOutputs(tableau.stages), nothing, hands_on_slope, implicit)

    def step_alone(self, t: Tensor, dt: Tensor, args: Any) -> TakeStep:
        """Return the step from t of size dt, taken by torchdyn's own solver."""
        stepper, integral = self._stepper, self.integral

        def take_step(f: Reevaluation, _: Step, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
            function = f if integral is None else integral.unpadded(f)
            unpad = (lambda x: x) if integral is None else integral.unpad
            slope = None if slope is None else unpad(slope)
            _, end, _, *more = stepper.step(function, unpad(state), t, dt, k1=slope, args=args)
            if integral is not None:
                return integral.pad(end), None
            return end, more[0][-1] if more else None

        return take_step

    def trajectory(self, step: Step, method: Method, x: Tensor, end: Tensor | None) -> Trajectory:
        """Return a trajectory of one step, from the state x, of which nothing is kept yet."""
        # With an integral, the state at a step's start lacks the integral that the step before ends in.
        previous = self._checkpoints.get(x, lambda: None)() if self.integral is None else None
        # Detached: the end becomes a value of the autograd function, which refers to the checkpoint.
        known = None if end is None else end.detach()
        checkpoint = Checkpoint(self.recorder.store.budget, step, method, previous, known)
        return Trajectory(method, self.recorder.store, [checkpoint])

    def ended(self, trajectory: Trajectory, end: Tensor, last_slope: Tensor | None) -> None:
        """Remember the state at a step's end, and its last slope if that is f there, for the step that follows."""
        self._checkpoints[end] = weakref.ref(trajectory.checkpoints[0])
        self.ended_with(end, last_slope)

    def ended_with(self, end: Tensor, last_slope: Tensor | None) -> None:
        """Remember a step's last slope, if it is f at the step's end."""
        if last_slope is not None:
            self._ends[last_slope] = weakref.ref(end)

    def is_last_slope(self, slope: Tensor | None, state: Tensor) -> bool:
        """Return whether the slope is the last one of the step that led to the state, and f there."""
        return slope is not None and self._ends.get(slope, lambda: None)() is state

    def note(self, seconds: float) -> None:
        """Note an accepted step in the report."""
        report, budget = self.recorder.field.report, self.recorder.store.budget
        report.accepted += 1
        report.forward_seconds += seconds
        report.checkpoint_bytes, report.graph_bytes = budget.most_states, budget.most_graphs
        report.budget_bytes = budget.total

    def note_slope_at_start(self, slope: Any, state: Tensor) -> None:
        """Note a slope that was evaluated at a state, and will be handed to the step from there."""
        if isinstance(slope, Tensor):  # else torchdyn, or the step, will say so
            self._slope_at_start = weakref.ref(slope), weakref.ref(state)

    def is_at_start(self, slope: Tensor | None, state: Tensor) -> bool:
        """Return whether the slope is the one that was noted, with this state."""
        if slope is None or self._slope_at_start is None:
            return False
        return self._slope_at_start[0]() is slope and self._slope_at_start[1]() is state

    def watch_live(self, origin: Tensor, slope: Tensor) -> None:
        """Watch the backward passes through the live graph, which begins in a state and the first slope from there."""
        self.watch = LiveWatch(self.recorder.field.report, self.recorder.field.used, origin)
        self.watch.check_before(slope)


def _implicit_solve(solver: Any, x: Tensor) -> ImplicitSolve | None:
    return solver.implicit_solve(x) if isinstance(solver, ImplicitSolver) else None


def _no_step(*_: Any) -> Any:
    raise AssertionError("a method without a step")


def _with_whole_counts(f: Any) -> Any:
    """Make a model's counts of evaluations integers: as floats, torch.compile compiles anew for each."""
    for module in f.modules() if isinstance(f, torch.nn.Module) else ():
        count: Any = getattr(module, "nfe", None)
        if type(module).__module__.startswith("torchdyn.core.") and type(count) is float:
            vars(module)["nfe"] = int(count)
    return f


class Integral:
    """The vector field and the integrand of a loss as one vector field, of the state, flattened, and the integral.

    Args:
        f: the vector field.
        loss: the integrand, `loss(t, x)`.
        shape: the state's.
    """

    def __init__(self, f: Any, loss: Any, shape: torch.Size) -> None:
        self.f = f
        self.loss = loss
        self.shape = shape

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        state = self.unpad(x)
        slope = require_slope(self.f(t, state), state)
        return torch.cat([slope.reshape(-1), self.loss(t, state).sum().reshape(1).to(slope)])

    def pad(self, x: Tensor) -> Tensor:
        """Return a state, or slope, with a zero integral."""
        return torch.cat([x.reshape(-1), x.new_zeros(1)])

    def unpad(self, x: Tensor) -> Tensor:
        """Return a state, or slope, without the integral."""
        return x[:-1].view(self.shape)

    def unpadded(self, f: Any) -> Any:
        """Return the vector field of the state alone, from the one with the integral."""
        return lambda t, x: self.unpad(f(t, self.pad(x)))

    def add_to(self, end: Tensor) -> Tensor:
        """Return the state at a step's end such that whatever is differentiated has the integral added."""
        return _AddIntegral.apply(end, self.shape)


class _AddIntegral(torch.autograd.Function):
    """The state without the integral, whose cotangent is one: the integral is added to whatever is differentiated.

    So also to a gradient that is differentiated again and depends on the solution: that is refused.
    """

    @staticmethod
    def forward(ctx: Any, end: Tensor, shape: torch.Size) -> Tensor:
        return end[:-1].view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        padded = torch.cat([gradient.reshape(-1), gradient.new_ones(1)])
        if padded.requires_grad:
            padded.register_hook(_refuse_second_derivative)
        return padded, None


def _refuse_second_derivative(_: Tensor) -> None:
    raise RuntimeError(
        f"{NAME}: a gradient was differentiated again (create_graph=True), which it can't be with an integral_loss: "
        "make the integral a part of the state for that"
    )


class StepFunction:
    """The vector field as one step of torchdyn's calls it.

    Args:
        solve: the solve.
        origin: state at the step's start.

    Attributes:
        time_dtypes: dtypes of the times that the step has handed to f.
    """

    def __init__(self, solve: Solve, origin: Tensor) -> None:
        self._solve = solve
        self._recorder = solve.recorder
        self._integral = solve.integral
        self._origin = origin
        self.time_dtypes: list[torch.dtype] = []

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.time_dtypes.append(t.dtype)
        if self._integral is None:
            slope = self._recorder.evaluate_stage(t, x, {})
            if self._solve.watch is None and self._recorder.step_is_live:
                self._solve.watch_live(self._origin, slope)
            return slope
        return self._integral.unpad(self._recorder.evaluate_stage(t, self._integral.pad(x), {}))


class StageTimes:
    """The times that torchdyn hands to f in a step.

    Args:
        c: times of the stages in units of the step.
        shape: of a time.
        dtypes: of the stages' times: double-precision coefficients make one of a single-precision time.
        device: of the times.
    """

    def __init__(self, c: list[float], shape: torch.Size, dtypes: list[torch.dtype], device: torch.device) -> None:
        self.c = c
        self.shape = shape
        self.dtypes = dtypes
        self.device = device

    def __call__(self, steps: Sequence[Step]) -> list[list[Tensor]]:
        return [
            [
                torch.full(self.shape, step.t0, dtype=dtype, device=self.device) + c * step.h
                for c, dtype in zip(self.c, self.dtypes, strict=True)
            ]
            for step in steps
        ]


def times_of_step(_: Trajectory, t: Tensor, dt: Tensor) -> SolveTimes:
    """Return the times of a trajectory of one step as functions of its start and size."""
    start = t.reshape(1).double()
    return SolveTimes(start, dt.reshape(1).double(), start[:0])
