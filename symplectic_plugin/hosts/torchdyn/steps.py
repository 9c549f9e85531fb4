"""Steps of torchdyn's solvers with an exact gradient.

torchdyn's integration loops call `solver.step`, and so do those for events and for multiple shooting. A step of a
Runge-Kutta method is a part of autograd's graph as long as that fits; later ones are taken without a graph, and each
gets its gradient from the adjoint sweep. A step of any other kind (hypersolvers, asynchronous leapfrog, a user's own)
is recomputed as a whole by `torch.utils.checkpoint`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...adjoint.function import Inputs, attach_step
from ...field.compiled import not_compiled
from ...field.evaluation import require_slope
from ...field.graphs import mark_as_solve
from ...field.random_numbers import Generators
from ...field.witness import refuse_transforms
from ...methods.read_tableau import read_rounded_tableau
from ...record.method import Method, Step
from .methods import is_torchdyns, step_function
from .solve import NAME, Solve, StageTimes, StepFunction, require_size, times_of_step
from .step_sizes import SolverOrder


class _Taken(NamedTuple):
    """A step of torchdyn's as it was taken.

    Args:
        t, dt: start and size, as torchdyn has them.
        k1: first slope, if it was handed on.
        args: further arguments of the step.
        function: the vector field that the step has called.
        t0, h: start and size as numbers.
    """

    t: Tensor
    dt: Tensor
    k1: Tensor | None
    args: Any
    function: StepFunction
    t0: float
    h: float


_MARKED = 32
"""One of so many steps of a live graph is marked as a solve's: `is_alive` then looks at no more steps than that. Not
each, since marking makes Python see a node."""


def _live_step(solve: Solve, end: Tensor, more: list[Any]) -> tuple[Any, ...]:
    """End a step of the live graph, around which nothing has to be put: return its end and slopes."""
    recorder, watch = solve.recorder, solve.watch
    evaluations = recorder.end_live_step()
    if watch is not None and end.requires_grad:
        watch.add(evaluations)
        end = watch.begin_at(end)
        if recorder.field.report.accepted % _MARKED == 0:
            mark_as_solve(end)
    if not more:
        return (end,)
    (slopes,) = more
    if solve.tableau is not None and solve.tableau.first_same_as_last:
        slopes = (*slopes[:-1], slopes[-1].view_as(slopes[-1]))  # it may be a tensor of the user's that f returned
        solve.ended_with(end, slopes[-1])
    return end, slopes


class AdjointSteps:
    """Mixed into a solver class of torchdyn's: steps with an exact gradient.

    Attributes:
        base: the solver class.
        restored: makes a solver without attributes from the solver class, for pickle.
    """

    base: ClassVar[Any]
    restored: ClassVar[Callable[[Any], Any]]
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
        """Begin a solve: torchdyn's loops call this first."""
        self.begin()
        return super().sync_device_dtype(x, t_span)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, and a solve is nothing to keep.
        state = {name: value for name, value in self.__dict__.items() if name != "solve"}
        return type(self).restored, (self.base,), state

    @not_compiled
    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None) -> Any:
        """Take torchdyn's step, with a gradient for the state, the time and size, the slope handed on, and f.

        Raises:
            ValueError: if the step can't be differentiated.
        """
        if not torch.is_grad_enabled():
            return super().step(f, x, t, dt, k1=k1, args=args)  # type: ignore[misc]
        solve: Solve = self.__dict__["solve"]
        if solve.function is not f:
            solve.enter(self, f, x, slope_is_given=k1 is not None)
        # What a user's own step does with `args` is not known, so the tableau that was read without them says nothing.
        unknown = solve.tableau is None or (args and not is_torchdyns(self))
        if unknown or not isinstance(x, Tensor) or t.numel() != 1 or dt.numel() != 1:
            return self._recomputed_step(f, x, t, dt, k1, args)
        return self._runge_kutta_step(solve, x, t, dt, k1, args)

    def _runge_kutta_step(self, solve: Solve, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None, args: Any) -> Any:
        """Take a step as a part of the live graph, where memory allows; or without a graph, for the adjoint sweep."""
        refuse_transforms()
        begin = time.perf_counter()
        t0, h, recorder, integral = t.item(), dt.item(), solve.recorder, solve.integral
        if k1 is not None:
            require_size(t0, h, dt.dtype)
        if t.requires_grad or dt.requires_grad:
            recorder.want_time()
        given = None if k1 is None else require_slope(k1, x).detach()
        state = x if integral is None else integral.pad(x)
        recorder.begin_step(state, given if given is None or integral is None else integral.pad(given), h)
        live = recorder.is_live
        arguments = (x, k1) if live else (x.detach(), given)
        if live and recorder.field.report.is_seen and x.requires_grad:
            arguments = x.view_as(x), k1  # a node of its own, for the backward pass to be timed
        function = StepFunction(solve, arguments[0])
        with torch.set_grad_enabled(live):
            _, end, error, *more = super().step(  # type: ignore[misc]
                function, arguments[0], t.detach(), dt.detach(), k1=arguments[1], args=args
            )
        error = error.detach() if isinstance(error, Tensor) else error  # the control of step sizes has no gradient
        if recorder.step_is_live:
            end, *more = _live_step(solve, end, more)
        else:
            more = [tuple(slope.detach() for slope in slopes) for slopes in more]
            step = _Taken(t, dt, k1, args, function, t0, h)
            end, *more = self._swept_step(solve, step, (x, state), end.detach(), more)
        solve.note(time.perf_counter() - begin)
        return (None, end, error) if not more else (more[0][-1], end, error, *more)

    def _swept_step(
        self, solve: Solve, taken: _Taken, start: tuple[Tensor, Tensor], end: Tensor, more: list[Any]
    ) -> tuple[Any, ...]:
        """Give a step that was taken without a graph its gradient.

        Args:
            solve: the solve.
            taken: the step.
            start: state at the step's start, and the same with the integral.
            end: state at its end.
            more: its slopes, if torchdyn returned them.

        Returns:
            The state at its end, and the slopes if torchdyn returned them.
        """
        recorder, integral, (x, state), k1 = solve.recorder, solve.integral, start, taken.k1
        step, method, slope_is_kept = self._method(solve, taken, x, end)
        padded = (lambda y: y) if integral is None else integral.pad
        trajectory = solve.trajectory(step, method, x, end if integral is None else None)
        recorder.keep(trajectory.checkpoints[0], state, k1 if slope_is_kept else None, None)
        slopes = more[0] if more else ()
        evaluated = {i: padded(slope) for i, slope in enumerate(slopes) if i > 0 or k1 is None}
        inputs = Inputs(state, (taken.t, taken.dt), times_of_step, k1 if step.slope_handed_on else None)
        end, evaluated = attach_step(padded(end), evaluated, trajectory, recorder.field, inputs)
        if integral is not None:
            end, evaluated = integral.add_to(end), {i: integral.unpad(slope) for i, slope in evaluated.items()}
        if not more:
            solve.ended(trajectory, end, None)
            return (end,)
        slopes = tuple(evaluated.get(i, k1) for i in range(len(slopes)))
        solve.ended(trajectory, end, slopes[-1] if method.tableau.first_same_as_last else None)
        return end, slopes

    def _method(self, solve: Solve, taken: _Taken, x: Tensor, end: Tensor) -> tuple[Step, Method, bool]:
        """Return a step as it was taken, from x to its end, its method, and whether its first slope must be kept."""
        t, dt, k1, recorder, tableau = taken.t, taken.dt, taken.k1, solve.recorder, solve.tableau
        assert tableau is not None
        # Where the first slope was evaluated just before, or is the last one of the step that led here, it can be
        # evaluated again, unless f draws random numbers for it. The integrand is evaluated nowhere else.
        at_start = solve.is_at_start(k1, x)
        can_be_recomputed = (at_start or solve.is_last_slope(k1, x)) and not recorder.field.draws
        fresh = k1 is None or solve.integral is not None or (can_be_recomputed and at_start)
        step = Step(taken.t0, taken.t0 + taken.h, taken.h, slope_handed_on=not fresh, draws=recorder.draws)
        if taken.h != 0 and not t.dtype == dt.dtype == x.abs().dtype:
            rounded = step_function(self)
            tableau = read_rounded_tableau(rounded, tableau.stages, t.cpu(), dt.cpu(), end.abs().dtype)
        dtypes = [*([] if k1 is None else [t.dtype]), *taken.function.time_dtypes]
        stage_times = StageTimes(tableau.c.tolist(), t.shape, dtypes, t.device)
        take_step = solve.step_alone(t.detach(), dt.detach(), taken.args)
        method = solve.method(tableau, stage_times, take_step, hands_on_slope=not fresh)
        return step, method, not fresh and not can_be_recomputed

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
