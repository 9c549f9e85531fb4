"""torchdyn's solvers with an exact gradient: each step is a node of the graph, and keeps the state at its start.

torchdyn's integration loops call `solver.step`, and so do those for events and for multiple shooting. A step of a
Runge-Kutta method is taken without a graph and gets its gradient from the adjoint sweep; a step of any other kind
(hypersolvers, asynchronous leapfrog, a user's own) is recomputed as a whole by `torch.utils.checkpoint`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchdyn.numerics.solvers.ode import MS_SOLVER_DICT, SOLVER_DICT, ImplicitEuler, ParallelImplicitEuler

from ...adjoint.step_gradient import attach_step
from ...adjoint.whole_graph import watch
from ...field.compiled import evaluated_as_it_is, not_compiled
from ...field.evaluation import require_slope
from ...field.random_numbers import Generators
from ...field.witness import Addresses, refuse_transforms
from ...methods.read_tableau import read_rounded_tableau
from ...record.checkpoints import Checkpoints
from ...record.kept import Graph, Kept
from ...record.stage_graphs import StageGraphs
from ...record.step_graph import StepGraph
from ...record.trajectory import NoOutputs, Step, Trajectory
from . import step_sizes
from .implicit import METHODS, ImplicitSolver
from .methods import is_torchdyns, step_function
from .solve import NAME, Evaluations, Solve, StageTimes, TakenAtOnce, require_size
from .step_sizes import SolverOrder


class SymplecticAdjoint:
    """What torchdyn's SOLVER_DICT holds as "symplectic_adjoint": tsit5, `NeuralODE`'s default, with an exact gradient.

    As torchdyn's own solver classes it is called with a dtype, and gives a solver: `str_to_solver(name, dtype)`. To be
    given options, it is called by oneself: `SOLVER_DICT["symplectic_adjoint:dopri5"](checkpoint="steps")`.

    Args:
        dtype: of the state.
        checkpoint, memory_budget, offload, compile, adjoint_params: as for torchdiffeq.
        **options: the solver's own: for an implicit one, those of `ImplicitSolver`.
    """

    solver: ClassVar[str] = "tsit5"

    def __new__(
        cls,
        dtype: torch.dtype = torch.float32,
        *,
        checkpoint: str | None = None,
        memory_budget: int | None = None,
        offload: str | os.PathLike[str] | None = None,
        compile: bool | str | Mapping[str, Any] = False,
        adjoint_params: Iterable[Tensor] = (),
        **options: Any,
    ) -> Any:
        base: Any = SOLVER_DICT[cls.solver]
        solver = _implicit_euler(dtype, **options) if base is ImplicitEuler else base(dtype, **options)
        result = with_adjoint(solver, adjoint_params)
        Checkpoints(checkpoint, memory_budget)  # refuses what is no policy or no budget
        result.checkpoint, result.memory_budget, result.offload = checkpoint, memory_budget, offload
        result.compile = compile
        return result

    @classmethod
    def variants(cls, name: str, registry: Mapping[str, Any]) -> dict[str, Any]:
        """The implicit methods that torchdyn does not have; and this class with its base solver in its name, for each
        that there is: "symplectic_adjoint:rk4" and so on."""
        added = {base: functools.partial(ImplicitSolver, base) for base in METHODS if base not in registry}
        return added | {
            f"{name}:{base}": type(f"{cls.__name__}_{base}", (cls,), {"solver": base, "__doc__": cls.__doc__})
            for base in (*registry, *added)
        }

    @classmethod
    def install(cls) -> None:
        """Keep torchdyn's choice of the first step size out of gradients; offer multiple shooting with our steps."""
        step_sizes.install()
        for name, solver in list(MS_SOLVER_DICT.items()):
            MS_SOLVER_DICT.setdefault(f"{NAME}:{name}", functools.partial(_shooting_with_adjoint, solver))

    @classmethod
    def uninstall(cls) -> None:
        """Undo `install`."""
        step_sizes.uninstall()
        for name in [name for name in MS_SOLVER_DICT if name.startswith(f"{NAME}:")]:
            del MS_SOLVER_DICT[name]


def _shooting_with_adjoint(solver: Callable[[], Any]) -> Any:
    return with_adjoint(solver())


_implicit_euler = functools.partial(ImplicitSolver, "implicit_euler")


def with_adjoint(solver: Any, params: Iterable[Tensor] = ()) -> Any:
    """A solver of torchdyn's, or one with its interface, that does the same and has an exact gradient.

    Args:
        solver: an instance; it is copied, its parameters (a hypersolver's network) are shared.
        params: tensors that the vector field depends on, in addition to those that are found.

    Raises:
        ValueError: if its step can't be differentiated.
    """
    if isinstance(solver, AdjointSteps):
        return solver
    if isinstance(solver, ImplicitEuler):
        # torchdyn's minimises a residual and returns the result as a new leaf: its step has no gradient.
        solver = _implicit_euler(solver.dtype)
    if isinstance(solver, ParallelImplicitEuler):
        raise ValueError(
            f"{NAME}: torchdyn's {type(solver).__name__} minimises a residual and returns the result as a new leaf, "
            "so its step has no gradient (sensitivity='autograd' silently gives none either). Use another solver."
        )
    result = copy.copy(solver)
    if hasattr(solver, "coarse_method"):  # multiple shooting: a solver made of two
        result._modules = dict(solver._modules)
        result.coarse_method = with_adjoint(solver.coarse_method, params)
        result.fine_method = with_adjoint(solver.fine_method, params)
        return result
    base: Any = type(solver)
    result.__class__ = _adjoint_class(base)
    result.params = tuple(params)
    result.begin()
    return result


@functools.cache
def _adjoint_class(base: Any) -> type:
    if issubclass(base, ImplicitSolver):
        from .implicit_steps import ImplicitAdjointSteps  # which is made of what is here

        return type(base.__name__, (ImplicitAdjointSteps, base), {"__module__": base.__module__, "base": base})
    return type(base.__name__, (AdjointSteps, base), {"__module__": base.__module__, "base": base})


def _restored(base: Any) -> Any:
    result = base.__new__(_adjoint_class(base))
    result.__dict__["solve"] = Solve()
    return result


class AdjointSteps:
    """Mixed into a solver class of torchdyn's: steps with an exact gradient."""

    base: ClassVar[Any]
    params: tuple[Tensor, ...] = ()
    checkpoint: str | None = None
    memory_budget: int | None = None
    offload: str | os.PathLike[str] | None = None
    compile: bool | str | Mapping[str, Any] = False
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def order(self) -> SolverOrder:
        """The method's order, by which torchdyn's `init_step` finds this solver."""
        return SolverOrder.of(self.__dict__["order"], self)

    @order.setter
    def order(self, value: int) -> None:
        self.__dict__["order"] = value

    def begin(self) -> None:
        """Begin a solve: forget the one before."""
        self.__dict__["solve"] = Solve()

    def sync_device_dtype(self, x: Any, t_span: Any) -> Any:
        """As in torchdyn, whose loops call it first."""
        self.begin()
        return super().sync_device_dtype(x, t_span)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, and a solve is nothing to keep.
        state = {name: value for name, value in self.__dict__.items() if name != "solve"}
        return _restored, (self.base,), state

    @not_compiled
    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None) -> Any:
        """torchdyn's step, with a gradient for the state, the time and size, the slope handed on, and all f depends on.

        Raises:
            ValueError: if the step can't be differentiated.
        """
        if not torch.is_grad_enabled():
            return super().step(f, x, t, dt, k1=k1, args=args)  # type: ignore[misc]
        solve: Solve = self.__dict__["solve"]
        if solve.function is not f:
            solve.enter(self, f, x)
        # What a user's own step does with `args` is not known, so the tableau that was read without them says nothing.
        unknown = solve.tableau is None or (args and not is_torchdyns(self))
        if unknown or not isinstance(x, Tensor) or t.numel() != 1 or dt.numel() != 1:
            return self._recomputed_step(f, x, t, dt, k1, args)
        return self._runge_kutta_step(solve, f, x, t, dt, k1, args)

    def _runge_kutta_step(
        self, solve: Solve, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None, args: Any
    ) -> Any:
        """A step with its graph, where memory allows; or taken without one, the adjoint sweep its backward pass."""
        assert solve.field is not None
        assert solve.tableau is not None
        refuse_transforms()
        t0, h = t.item(), dt.item()
        if k1 is not None:
            require_size(t0, h, dt.dtype)
        field, with_loss = solve.field, self.loss is not None
        given = None if k1 is None else require_slope(k1, x).detach()
        graph: Graph | None = None
        want_time, wanted = t.requires_grad or dt.requires_grad, solve.checkpoints.wants_graphs(solve.tableau.stages)
        whole = not (with_loss or want_time) and solve.goes_on and solve.checkpoints.may_lend(solve.tableau.stages)
        # There are no times in a step's graph of ours, nor coefficients as one step rounds them.
        if whole or with_loss or not wanted:
            pass
        elif not want_time and t.dtype == dt.dtype == x.abs().dtype:
            graph = StepGraph(field, solve.tableau, x, h, given)
        else:
            graph = StageGraphs(field, x.detach(), given, want_time)
        evaluate = Evaluations(solve, with_loss, graph, want_time, whole)
        begin = time.perf_counter()
        state, slope = (x, k1) if whole else (x.detach(), given)
        if whole and field.report.is_seen and x.requires_grad:
            state = x.view_as(x)  # where the step's graph ends, for its backward pass to be timed
        if whole and solve.compiled is not None:
            start = x.view_as(x)  # with a node, from which those of the step are counted
            if (taken := solve.taken_at_once(start, t.detach(), dt.detach(), slope, args)) is not None:
                _, end, error, *more = taken.results
                error = error.detach() if isinstance(error, Tensor) else error
                return self._whole_step(solve, taken, start, end, error, more, begin)
        # The first of a solve's steps shows what f depends on; those after it are programs of their own.
        as_it_is = evaluated_as_it_is() if whole and not solve.discovered else contextlib.nullcontext()
        with torch.set_grad_enabled(whole), as_it_is:
            _, end, error, *more = super().step(  # type: ignore[misc]
                evaluate, state, t.detach(), dt.detach(), k1=slope, args=args
            )
        error = error.detach() if isinstance(error, Tensor) else error  # the control of step sizes has no gradient
        if evaluate.whole:
            return self._whole_step(solve, evaluate, state, end, error, more, begin)
        end, more = end.detach(), [tuple(stage.detach() for stage in stages) for stages in more]
        # Where the first slope was evaluated just before, or is the last one of the step that led here, it can be
        # evaluated again, unless f draws random numbers for it.
        at_start = solve.is_at_start(k1, x)
        of_step_before = k1 is not None and getattr(k1, "symplectic_adjoint_state", lambda: None)() is x
        recomputed = (at_start or of_step_before) and not field.draws
        fresh = k1 is None or (recomputed and at_start)
        step = Step(t0, t0 + h, h, not fresh, {}, None, evaluate.draws)
        tableau = solve.tableau
        if h != 0 and not t.dtype == dt.dtype == x.abs().dtype:
            tableau = read_rounded_tableau(step_function(self), tableau.stages, t.cpu(), dt.cpu(), end.abs().dtype)
        dtypes = [*([] if k1 is None else [t.dtype]), *evaluate.time_dtypes]
        stage_times = StageTimes(tableau.c.tolist(), t.shape, dtypes, t.device)
        trajectory = Trajectory(
            tableau, not fresh, [{}] * tableau.stages, NoOutputs(tableau.stages), stage_times,
            solve.step_alone(t.detach(), dt.detach(), args), solve.checkpoints, steps=[step],
        )  # fmt: skip
        kept = self._kept(solve, evaluate, trajectory, x, None if recomputed else k1, k1 is not None, end.detach())
        trajectory = replace(trajectory, kept=[kept])
        stages = more[0] if more else ()
        evaluated = {i: stage for i, stage in enumerate(stages) if i > 0 or k1 is None}
        end, slopes = attach_step(end, evaluated, trajectory, field, x, (t, dt), None if fresh else k1, with_loss)
        end.symplectic_adjoint_step = weakref.ref(kept)  # type: ignore[attr-defined]
        solve.note(time.perf_counter() - begin)
        if not more:
            return None, end, error
        stages = tuple(slopes.get(i, k1) for i in range(len(stages)))
        if tableau.first_same_as_last:
            stages[-1].symplectic_adjoint_state = weakref.ref(end)
        return stages[-1], end, error, stages

    def _whole_step(
        self,
        solve: Solve,
        made: Evaluations | TakenAtOnce,
        x: Tensor,
        end: Tensor,
        error: Any,
        more: list[Any],
        begin: float,
    ) -> Any:
        """A step with its graph, which nothing has to be put around: as torchdyn returned it, but for the error.

        Args:
            made: what is known of its evaluations.
            x, end: the states at its start and end.
            error: its error estimate, without a graph.
            more: its slopes, if torchdyn returned them.
            begin: when it began.
        """
        assert solve.field is not None
        if end.requires_grad:
            lent = solve.checkpoints.lend(made.size)
            watch(end, x, solve.field.report, made.count, Addresses(solve.field.used), lent)
        solve.note(time.perf_counter() - begin)
        if not more:
            return None, end, error
        (stages,) = more
        if solve.tableau is not None and solve.tableau.first_same_as_last:
            stages = (*stages[:-1], stages[-1].view_as(stages[-1]))  # it may be a tensor of the user's that f returned
            stages[-1].symplectic_adjoint_state = weakref.ref(end)
        return stages[-1], end, error, stages

    def _kept(
        self,
        solve: Solve,
        evaluate: Evaluations,
        trajectory: Trajectory,
        x: Tensor,
        slope: Tensor | None,
        given: bool,
        end: Tensor,
    ) -> Kept:
        """What is kept of a step.

        Args:
            x: the state at its start.
            slope: the slope there, if it has to be kept.
            given: whether that was not evaluated in the step.
            end: the state at its end, without a graph.
        """
        checkpoints, field = solve.checkpoints, solve.field
        assert field is not None
        previous = None if self.loss is not None else getattr(x, "symplectic_adjoint_step", lambda: None)()
        stages: list[Tensor] | None = None
        graph, size = evaluate.graph, 0
        if graph is not None:
            size = checkpoints.size_of(graph)
        elif self.loss is None and evaluate.draws is None and checkpoints.wants_stages():
            stages = evaluate.stages[0 if given else 1 :]
        kept = Kept(previous, x, slope, stages, graph, trajectory, end)
        checkpoints.add(kept, size, trajectory.steps[0].draws_size)
        return kept

    def _recomputed_step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Tensor | None, args: Any) -> Any:
        """A step that is not a Runge-Kutta step: its graph is made again when its turn comes."""
        if self.loss is not None:
            raise ValueError(
                f"{NAME}: integral_loss needs a Runge-Kutta method, whose weights are its quadrature's; "
                f"{type(self).__name__} is none. Use sensitivity='autograd'."
            )
        solve: Solve = self.__dict__["solve"]
        state = x if isinstance(x, Tensor) else next(iter(x.values()))
        generators = Generators(state.device)
        before = generators.states()
        step = functools.partial(super().step, args=args)  # type: ignore[misc]
        # Their states are larger than many a state of a model, so they are kept only if need be.
        result = checkpoint(step, f, x, t, dt, k1=k1, use_reentrant=False, preserve_rng_state=solve.may_draw)
        solve.may_draw = not generators.are_at(before)
        state = result[1]
        if isinstance(state, Tensor) and state.is_leaf and state.requires_grad:
            raise ValueError(
                f"{NAME}: the step of {type(self).__name__} returns a new leaf, so it has no gradient "
                "(sensitivity='autograd' silently gives none either). Use another solver."
            )
        return result
