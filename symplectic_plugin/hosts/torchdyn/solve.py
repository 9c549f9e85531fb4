"""What is known of a solve by torchdyn while its steps are taken, and the vector field as they call it."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...field.compiled import Compiled
from ...field.cotangents import NO_STAND_INS, wide
from ...field.evaluation import Evaluation, require_slope
from ...field.random_numbers import GeneratorStates
from ...field.report import new_report
from ...field.vector_field import VectorField
from ...methods.tableau import ButcherTableau
from ...record.checkpoints import Checkpoints
from ...record.kept import Graph
from ...record.saved import hooks_are_active
from ...record.stage_graphs import StageGraphs
from ...record.storage import storage
from ...record.trajectory import Step, TakeStep
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
    """What is known of the solve that a solver is taking steps of.

    Attributes:
        goes_on: whether a step's graph may go on behind the state at its start, so that nothing is put around it.
    """

    def __init__(self) -> None:
        self.reported: Any = None
        self.function: Any = None
        self.field: VectorField | None = None
        self.tableau: ButcherTableau | None = None
        self.discovered = False
        self.goes_on = True
        self.may_draw = True
        self.checkpoints = Checkpoints()
        self.compiled: Compiled | None = None
        self._stepper: Any = None
        self._slope_at_start: tuple[Any, Any] | None = None

    def enter(self, solver: Any, f: Any, x: Any) -> None:
        """Begin with a vector field."""
        self.function = f
        self.tableau = tableau_of(solver)
        self.discovered = False
        if self.tableau is not None and isinstance(x, Tensor):
            self.compiled = Compiled(_with_whole_counts(f), solver.compile) if solver.compile else None
            function = self.compiled or f
            function = function if solver.loss is None else WithLoss(function, solver.loss, x.shape)
            self.checkpoints = Checkpoints(solver.checkpoint, solver.memory_budget, storage(solver.offload, x.device))
            if hooks_are_active():
                self.checkpoints.only_states()
            name = solver.name if isinstance(solver, ImplicitSolver) else solver.base.__name__
            self.reported = new_report("torchdyn", name, self.checkpoints.policy)
            self.field = VectorField(function, x.device, self.reported, solver.params, compiled=self.compiled)
            self._stepper = copy.copy(solver)
            self._stepper.__class__ = solver.base
            self._stepper.__dict__.pop("solve")

    def step_alone(self, t: Tensor, dt: Tensor, args: Any) -> TakeStep:
        """The step from t of size dt, taken by torchdyn's own solver."""
        stepper = self._stepper

        def take_step(
            f: Callable[..., Tensor], _: Step, state: Tensor, slope: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            _, end, _, *more = stepper.step(f, state, t, dt, k1=slope, args=args)
            return end, more[0][-1] if more else None

        return take_step

    def taken_at_once(self, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None, args: Any) -> TakenAtOnce | None:
        """A step with its graph by one program, as torchdyn takes it; None if there is none.

        Args:
            x: the state at its start, where grad is enabled with a node of its own.
            t, dt, k1, args: as torchdyn's step takes them.
        """
        compiled, field, tableau, stepper = self.compiled, self.field, self.tableau, self._stepper
        # Numbers that a program draws are others than those that f does.
        if compiled is None or field is None or tableau is None or not (self.discovered and compiled.is_compiled):
            return None
        if field.draws or field.stand_ins:
            return None
        key = f"step of torchdyn's {type(stepper).__name__}"
        with field.autocast.again():
            results = compiled.run(key, lambda: _step, stepper, compiled, x, t, dt, k1, args)
        end, slopes = results[1], results[3] if len(results) > 3 else ()
        if end.shape != x.shape or end.dtype != x.dtype:
            self.compiled = None
            return None  # f will say so
        count = tableau.stages - (0 if k1 is None else 1)
        field.report.evaluations += count
        latest = Evaluation(x, t, x, {}, end, [slope for slope in slopes if slope is not k1], count)
        return TakenAtOnce(results, self.checkpoints.bytes_of(field, latest), count)

    def note(self, seconds: float) -> None:
        """Take note of a step in the report."""
        report, checkpoints = self.reported, self.checkpoints
        report.accepted += 1
        report.forward_seconds += seconds
        report.checkpoint_bytes, report.graph_bytes = checkpoints.most_states, checkpoints.most_graphs
        report.budget_bytes = checkpoints.budget

    def note_slope_at_start(self, slope: Any, state: Tensor) -> None:
        """Take note of a slope that was evaluated at a state, and will be handed to the step from there."""
        if not isinstance(slope, Tensor):
            return  # torchdyn, or the step, will say so
        self._slope_at_start = weakref.ref(slope), weakref.ref(state)

    def is_at_start(self, slope: Tensor | None, state: Tensor) -> bool:
        """Whether the slope is the one that was noted, with this state."""
        if slope is None or self._slope_at_start is None:
            return False
        return self._slope_at_start[0]() is slope and self._slope_at_start[1]() is state


@dataclass(frozen=True)
class TakenAtOnce:
    """What a program returns of a step.

    Args:
        results: as torchdyn's step does.
        size: the bytes that its graph keeps.
        count: how many evaluations of f it made.
    """

    results: Any
    size: int
    count: int


def _with_whole_counts(f: Any) -> Any:
    """The same, its counts of evaluations integers: as floats, torch.compile compiles anew for each."""
    for module in f.modules() if isinstance(f, torch.nn.Module) else ():
        count: Any = getattr(module, "nfe", None)
        if type(module).__module__.startswith("torchdyn.core.") and type(count) is float:
            vars(module)["nfe"] = int(count)
    return f


def _step(stepper: Any, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None, args: Any) -> Any:
    def checked(t: Tensor, x: Tensor) -> Tensor:
        return require_slope(f(t, x), x)

    return stepper.step(checked, x, t, dt, k1=k1, args=args)


class WithLoss:
    """f and the integrand of a loss, as one vector field of the state, flattened, and the integral."""

    def __init__(self, f: Any, loss: Any, shape: torch.Size) -> None:
        self.f = f
        self.loss = loss
        self.shape = shape

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        state = x[:-1].view(self.shape)
        slope = self.f(t, state)
        return torch.cat([slope.reshape(-1), self.loss(t, state).sum().reshape(1).to(slope)])


class Evaluations:
    """The vector field as a step calls it: without graphs, but for those that are kept or show what it depends on."""

    def __init__(
        self, solve: Solve, with_loss: bool, graph: Graph | None, want_time: bool, whole: bool = False
    ) -> None:
        self.solve = solve
        self.with_loss = with_loss
        self.want_time = want_time
        self.draws: GeneratorStates | None = None
        self.time_dtypes: list[torch.dtype] = []
        self.stages: list[Tensor] = []
        self.graph = graph
        # Whether the step's graph goes on behind the state at its start; what its evaluations keep, and how many.
        self.whole = whole
        self.size = self.count = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.time_dtypes.append(t.dtype)
        field = self.solve.field
        assert field is not None
        field.report.evaluations += 1
        argument = torch.cat([x.reshape(-1), x.new_zeros(1)]) if self.with_loss else x
        if not self.solve.discovered:
            slope = self._discover(field, t, x, argument)
        else:
            if field.draws and self.draws is None:
                self.draws = field.generators.states()
            if self.whole:
                start = x.view_as(x)  # with a node, from which those of f are counted
                return self._counted(field, Evaluation(x, t, start, {}, field.evaluate(t, start, {}, NO_STAND_INS)))
            if self.graph is None:
                slope = field(t, argument, {})
            else:
                slope = self.graph.evaluate(t.detach().clone(), argument, {})  # a copy: t may be changed in place
                if not self.solve.checkpoints.has_room_for(self.graph):
                    self.graph = None
        self.stages.append(x.detach())  # it has a history if the step's graph was given up
        return slope[:-1].view(x.shape) if self.with_loss else slope

    def _discover(self, field: VectorField, t: Tensor, x: Tensor, argument: Tensor) -> Tensor:
        """Evaluate f for the first time in a solve."""
        solve = self.solve
        assert solve.tableau is not None
        before = field.generators.states()
        evaluation = field.discover(t, argument, {}, self.want_time, with_history=self.whole)
        self.draws = before if field.draws else None
        solve.discovered = True
        checkpoints, stages = solve.checkpoints, solve.tableau.stages
        checkpoints.measure(field, evaluation, argument, stages, field.draws, outputs=2, evaluations=stages)
        # Autograd sums in the tensors' precision: of half precision that is to be no long sum.
        needed = argument.requires_grad or any(tensor.requires_grad for tensor in field.dependencies)
        solve.goes_on = needed and all(wide(x.dtype) == x.dtype for x in (argument, *field.dependencies))
        self.whole = self.whole and solve.goes_on and checkpoints.may_lend(stages)
        if self.whole:
            return self._counted(field, evaluation)
        wanted = not field.stand_ins and checkpoints.wants_graphs(stages)
        if wanted and isinstance(self.graph, StageGraphs):
            self.graph.stand_ins = field.stand_ins
            self.graph.add(evaluation)
        elif wanted and self.graph is not None and not self.graph.slopes:
            self.graph.take(evaluation, field.stand_ins)
        else:
            self.graph = None
        return evaluation.slope.detach()

    def _counted(self, field: VectorField, evaluation: Evaluation) -> Tensor:
        """The slope that was evaluated in a step with its graph."""
        self.size += self.solve.checkpoints.bytes_of(field, evaluation)
        self.count += 1
        return evaluation.slope


class StageTimes:
    """The times that torchdyn hands to f in a step."""

    def __init__(self, c: list[float], shape: torch.Size, dtypes: list[torch.dtype], device: torch.device) -> None:
        self.c = c
        self.shape = shape
        self.dtypes = dtypes  # coefficients in double precision make a time of it of one in single precision
        self.device = device

    def __call__(self, steps: Sequence[Step]) -> list[list[Tensor]]:
        return [
            [
                torch.full(self.shape, step.t0, dtype=dtype, device=self.device) + c * step.h
                for c, dtype in zip(self.c, self.dtypes, strict=True)
            ]
            for step in steps
        ]
