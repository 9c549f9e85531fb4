"""Implicit methods as torchdiffeq solvers: on given grids, and adaptive ones with torchdiffeq's step size control."""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods.implicit_step import ImplicitSteps, StepFields, TakenStep
from ...methods.implicit_tableaux import METHODS, ImplicitMethod, lower_rows
from ...methods.newton import OPTIONS, NewtonOptions, tolerance_weights
from ...methods.no_gradient import without_gradient
from ...methods.stage_field import Layout, StageField, stage_field
from ...methods.tableau import ButcherTableau
from ._compat import (
    HAS_STEP_LIMITS,
    FixedGridODESolver,
    Perturb,
    RKAdaptiveStepsizeODESolver,
    _ButcherTableau,
    _optimal_step_size,
    _PerturbFunc,
    _ReverseFunc,
    _TupleFunc,
    implicit_families,
)


class _Implicit:
    """Base class of both families of solvers, which takes one step.

    Args:
        func: vector field, in torchdiffeq's wrappers.
        y0: initial state, any shape, floating point or complex, in at least single precision.
        rtol: relative tolerance, for the step size control and for Newton's method, see `NewtonOptions`.
        atol: absolute tolerance, for the same.
        independent_batch: whether the leading dimension of a state with several dimensions is a batch of independent
            states.
        **options: options of `NewtonOptions` and of torchdiffeq's solver.

    Attributes:
        weights: function from a state to the error that the tolerances allow in each component in a step from the
            state, shape (B, n).

    Raises:
        ValueError: if the state is in less than single precision, or an option is out of range.
    """

    method: ClassVar[ImplicitMethod]
    order: int
    func: Any
    y0: Tensor
    weights: Callable[[Tensor], Tensor]

    def __init__(
        self, func: Any, y0: Tensor, rtol: Any, atol: Any, *, independent_batch: bool = True, **options: Any
    ) -> None:
        if not (y0.is_floating_point() or y0.is_complex()) or torch.finfo(y0.dtype).bits < 32:
            raise ValueError(f"{self.method.name}: give the state in single or double precision, not in {y0.dtype}")
        own = {name: options.pop(name) for name in list(options) if name in OPTIONS}
        super().__init__(func=func, y0=y0, rtol=rtol, atol=atol, **options)  # type: ignore[call-arg]
        self.layout = Layout(y0.shape, y0.dtype, independent_batch)
        self.steps = ImplicitSteps(self.method, NewtonOptions(**own))
        self.weights = functools.partial(tolerance_weights, self.layout, rtol, atol)
        self.parts = None if self.method.nonstiff is None else self.parts_of(func)
        self._compared = False

    def parts_of(self, func: Any) -> tuple[Any, Any]:
        """Return the stiff and the nonstiff part of a vector field."""
        return stiff_and_nonstiff(func, self.method.name)

    @abstractmethod
    def stage_keywords(self) -> list[dict[str, Any]]:
        """List the keyword arguments of f at each stage."""

    def take(
        self, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor, keywords: Sequence[dict[str, Any]], f0: Tensor | None
    ) -> TakenStep:
        """Take a step from t0 to t1.

        Args:
            t0: time at the step's start.
            dt: size of the step.
            t1: time at the step's end.
            y0: state at the step's start.
            keywords: keyword arguments of f at each stage.
            f0: slope at the step's start, if it is known.
        """
        # A stage at the step's end is at t1 to the last bit, as in torchdiffeq's step.
        times = [t1 if c == 1 else t0 + c * dt for c in self.method.tableau.c.tolist()]
        if self.parts is not None:
            self._compare_parts(t0, y0)
        slope = None if f0 is None or self.parts is not None else self.layout.flat(f0)
        fields = self.fields(times, keywords)
        with torch.no_grad():
            return self.steps.take(fields, self.layout.flat(y0), float(dt), self.weights(y0), slope)

    def fields(self, times: Sequence[Tensor], keywords: Sequence[dict[str, Any]]) -> StepFields:
        """Build f at the times of a step's stages, with the keyword arguments of each stage."""
        functions = (self.func,) if self.parts is None else self.parts
        stages, *others = [
            [self._field(function, t, kwargs) for t, kwargs in zip(times, keywords, strict=True)]
            for function in functions
        ]
        return StepFields(stages, others[0] if others else None)

    def _field(self, func: Any, t: Tensor, keywords: dict[str, Any]) -> StageField:
        return stage_field(lambda x: func(t, x, **keywords), self.layout)

    def _compare_parts(self, t0: Tensor, y0: Tensor) -> None:
        """Check at the first step that the stiff and the nonstiff part add up to the vector field.

        Raises:
            ValueError: if the sum differs.
        """
        if self._compared or self.parts is None:
            return
        self._compared = True
        with torch.no_grad():
            whole, parts = self.func(t0, y0), [part(t0, y0) for part in self.parts]
        off = torch.linalg.vector_norm(whole - sum(parts))
        if not bool(off <= 1e-3 * sum(torch.linalg.vector_norm(part) for part in parts)):
            raise ValueError(f"{self.method.name}: func is not the sum of func.stiff and func.nonstiff")

    def integrate(self, t: Tensor) -> Tensor:
        """Compute the solution at the times t, shape (len(t), *y0.shape)."""
        with torch.no_grad():
            solution = super().integrate(t)  # type: ignore[misc]
        return self._refused(solution, t)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the time of an event, and the states at t0 and at that time, as torchdiffeq does.

        Raises:
            ValueError: if the method is additive.
        """
        if self.method.nonstiff is not None:
            raise ValueError(
                f"{self.method.name}: there are no events with it, since its interpolant is not accurate inside steps "
                f"where the system is stiff: use {self.method.name.removesuffix('_imex')}"
            )
        with torch.no_grad():
            event_t, solution = super().integrate_until_event(t0, event_fn)  # type: ignore[misc]
        return event_t, self._refused(solution, t0)

    def _refused(self, solution: Tensor, t: Tensor) -> Tensor:
        """Give the solution a graph that raises in the backward pass, unless gradients are disabled."""
        if not torch.is_grad_enabled():
            return solution
        slope = self.func(t.reshape(-1)[0], self.y0)
        name = self.method.name
        return without_gradient(solution, (slope, self.y0, t), name, f'method="symplectic_adjoint:{name}"')


class FixedGridImplicit(_Implicit, FixedGridODESolver):
    """Solver by an implicit method on a given grid."""

    def stage_keywords(self) -> list[dict[str, Any]]:
        at_end: dict[str, Any] = {"perturb": Perturb.PREV} if self.perturb else {}
        return [self.start_keywords() if c == 0 else at_end if c == 1 else {} for c in self.method.tableau.c.tolist()]

    def start_keywords(self) -> dict[str, Any]:
        """Keyword arguments of f at a step's start."""
        return {"perturb": Perturb.NEXT} if self.perturb else {}

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        # The cubic interpolant takes the slope at the start, which need not be a slope of the method.
        f0 = func(t0, y0, **self.start_keywords()) if self.interp == "cubic" else None
        first = f0 if self.method.explicit_first_stage else None
        taken = self.take(t0, dt, t1, y0, self.stage_keywords(), first)
        if bool(taken.failed.any()):
            raise taken.failure(self.method.name, float(t0), float(dt))
        shaped = self.layout.shaped
        return shaped(taken.increment), shaped(taken.slopes[0]) if f0 is None else f0


class AdaptiveImplicit(_Implicit, RKAdaptiveStepsizeODESolver):
    """Solver by a pair of diagonally implicit methods, with torchdiffeq's step size control and interpolant."""

    step_t: Any
    jump_t: Any

    def stage_keywords(self) -> list[dict[str, Any]]:
        return [{"perturb": Perturb.PREV} if c == 1 else {} for c in self.method.tableau.c.tolist()]

    def _adaptive_step(self, rk_state: Any) -> Any:
        if self.method.nonstiff is not None:
            # torchdiffeq does not advance the index where a step ends at a given time by its own size.
            while self.next_step_index < len(self.step_t) - 1 and self.step_t[self.next_step_index] <= rk_state.t1:
                self.next_step_index += 1
        t0, t1, dt = self._ends(rk_state)
        y0, func = rk_state.y1, self.func
        if not bool(t1 > t0 and y0.isfinite().all()):
            return super()._adaptive_step(rk_state)  # raises torchdiffeq's error
        keywords = self.stage_keywords()
        if self.method.nonstiff is not None and bool((self.jump_t == t0).any()):
            keywords[0] = {"perturb": Perturb.NEXT}
        dtype = y0.abs().dtype
        taken = self.take(t0.to(dtype), dt.to(dtype), t1.to(dtype), y0, keywords, rk_state.f1)
        if bool(taken.failed.any()):
            return self._rejected(rk_state, t0, dt, taken.reason)
        slopes = [self.layout.shaped(slope) for slope in taken.slopes]
        if self.method.nonstiff is not None:
            rk_state = rk_state._replace(f1=slopes[0])  # the sum of both parts' slopes
        # torchdiffeq's own step, with an f that answers with the slopes.
        self.func = _Slopes(func, slopes[1:])
        try:
            return super()._adaptive_step(rk_state)
        finally:
            self.func = func

    def _before_integrate(self, t: Tensor) -> None:
        if self.method.nonstiff is not None and len(t) > 1:
            # Slopes at the stages of an additive method are far from the solution's slope where f is stiff, and so is
            # their interpolant: every output must be the end of a step.
            given = t[:0] if self.step_t is None else self.step_t.to(t)
            jumps = t[:0] if self.jump_t is None else self.jump_t.to(t)
            times = torch.cat([given, t[1:]]).unique()
            self.step_t = times[~torch.isin(times, jumps)]
        super()._before_integrate(t)

    def _ends(self, rk_state: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Compute start, end and size of the step that torchdiffeq is about to take."""
        t0, dt = rk_state.t1, rk_state.dt
        if HAS_STEP_LIMITS:
            dt = (dt if dt.isfinite() else self.min_step).clamp(self.min_step, self.max_step)
        t1 = t0 + dt
        for times, index in ((self.step_t, self.next_step_index), (self.jump_t, self.next_jump_index)):
            if len(times) and t0 < times[index] < t0 + dt:
                t1 = times[index]
                dt = t1 - t0
        return t0, t1, dt

    def _rejected(self, rk_state: Any, t0: Tensor, dt: Tensor, reason: str) -> Any:
        """Return the state after a rejected step of infinite error, with a smaller step size.

        Raises:
            RuntimeError: if the step can't be made smaller.
        """
        y0 = rk_state.y1
        if HAS_STEP_LIMITS:
            self.func.callback_step(t0, y0, dt)
            self.func.callback_reject_step(t0, y0, dt)
        self.steps.newton.forget()
        error_ratio = torch.full_like(dt, float("inf"))
        smaller = _optimal_step_size(dt, error_ratio, self.safety, self.ifactor, self.dfactor, self.order)
        if HAS_STEP_LIMITS:
            smaller = smaller.clamp(self.min_step, self.max_step)
        if smaller >= dt or t0 + smaller <= t0 or smaller < torch.finfo(dt.dtype).tiny:
            raise RuntimeError(
                f"{self.method.name}: Newton's method did not solve the step from t = {float(t0):g} of size "
                f"{float(dt):g}, which can't be made smaller: {reason}"
            )
        return rk_state._replace(t0=t0, dt=smaller)


class _Slopes:
    """Stand-in for f in a step of torchdiffeq: answers its calls with known slopes, in order.

    Args:
        func: f, in torchdiffeq's wrappers, for its attributes and calls beyond the step's end.
        slopes: slopes in the order of the calls.
    """

    def __init__(self, func: Any, slopes: Sequence[Tensor]) -> None:
        self._func = func
        self._slopes = iter(slopes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)  # torchdiffeq's callbacks

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        if perturb is Perturb.NEXT:  # the slope after a jump at the step's end
            return self._func(t, y, perturb=perturb)
        return next(self._slopes)


def stiff_and_nonstiff(func: Any, method: str) -> tuple[Any, Any]:
    """Return the stiff and the nonstiff part of a vector field for an additive method, in wrappers like the field's.

    Args:
        func: vector field in torchdiffeq's wrappers.
        method: name of the method, for the error.

    Raises:
        ValueError: if the user's function has no such parts.
    """
    return _part(func, "stiff", method), _part(func, "nonstiff", method)


def _part(func: Any, part: str, method: str) -> Any:
    if isinstance(func, _TupleFunc):
        return _TupleFunc(_part(func.base_func, part, method), func.shapes)
    if isinstance(func, _ReverseFunc):
        return _ReverseFunc(_part(func.base_func, part, method), func.mul)
    if isinstance(func, _PerturbFunc):
        return _PerturbFunc(_part(func.base_func, part, method))
    function = getattr(func, part, None)
    if not callable(function):
        raise ValueError(
            f"{method}: func must offer its two parts as func.stiff(t, y) and func.nonstiff(t, y), which add up to "
            f"func(t, y). For all of it to be implicit: {method.removesuffix('_imex')}."
        )
    return function


def _solver(method: ImplicitMethod) -> type:
    """Build the solver class of a method."""
    family: type = FixedGridImplicit if method.embedded is None else AdaptiveImplicit
    name = "".join(part.capitalize() if part.islower() else part for part in method.name.split("_"))
    members: dict[str, Any] = {"method": method, "order": method.order, "__doc__": family.__doc__}
    if method.embedded is not None:
        tableau = method.tableau
        # Without the diagonal: torchdiffeq's step only adds up the slopes.
        beta = [tableau.a[i, :i].clone() for i in range(1, tableau.stages)]
        members["tableau"] = _ButcherTableau(tableau.c[1:], beta, tableau.b, tableau.b - method.embedded)
        members["mid"] = method.midpoint
    return type(name, (family,), {**members, "__module__": __name__})


SOLVERS: dict[str, type] = {name: _solver(method) for name, method in METHODS.items()}
"""Solver classes by name of the method."""


def is_torchdiffeqs(solver: Any) -> bool:
    """Tell whether a solver class is one of torchdiffeq's own implicit methods."""
    return hasattr(solver, "tableau") and any(
        issubclass(solver, family) and solver._step_func is family._step_func for family in implicit_families()
    )


@functools.cache
def counterpart(name: str, theirs: Any) -> type:
    """Build the solver class that has the coefficients of one of torchdiffeq's own implicit methods.

    Args:
        name: name of the method in torchdiffeq's table.
        theirs: solver class of torchdiffeq.

    Raises:
        ValueError: if the stage times are not the row sums of the coefficients, and the plugin has no method `name`.
    """
    alpha, beta, b, _ = theirs.tableau
    try:
        tableau = ButcherTableau(lower_rows(beta), b, alpha)
    except ValueError as error:
        if name not in SOLVERS:
            raise ValueError(f"symplectic_adjoint: the coefficients of {name}: {error}") from None
        # Both stages of torchdiffeq's gl4 are at 1/2 - sqrt(3)/6, which makes its order 1 where f depends on t.
        warnings.warn(
            f"symplectic_adjoint: the installed torchdiffeq's {name} has wrong coefficients, and is solved with the "
            f"right ones: {error}",
            stacklevel=5,
        )
        return SOLVERS[name]
    return _solver(ImplicitMethod(name, theirs.order, tableau))
