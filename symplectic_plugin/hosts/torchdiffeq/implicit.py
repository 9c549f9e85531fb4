"""The implicit methods as torchdiffeq's solvers: fixed-grid ones, and adaptive ones that its own controller drives."""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchdiffeq._impl import rk_common
from torchdiffeq._impl.misc import (
    Perturb,
    _optimal_step_size,
    _PerturbFunc,
    _ReverseFunc,
    _TupleFunc,
)
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau
from torchdiffeq._impl.solvers import FixedGridODESolver

from ...methods.implicit_step import ImplicitSteps, StepFields, TakenStep
from ...methods.implicit_tableaux import METHODS, ImplicitMethod, lower_rows
from ...methods.newton import OPTIONS, NewtonOptions, tolerance_weights
from ...methods.no_gradient import without_gradient
from ...methods.stage_field import Layout, StageField, stage_field
from ...methods.tableau import ButcherTableau

_HAS_LIMITS = "min_step" in inspect.signature(RKAdaptiveStepsizeODESolver.__init__).parameters
"""Whether torchdiffeq has limits for step sizes, and callbacks: 0.2.3 has neither."""


class _Implicit:
    """What the solvers of both families share: taking one step.

    Args:
        func: the vector field, as torchdiffeq wraps it.
        y0: initial state, any shape, floating point or complex.
        rtol, atol: tolerances; see `NewtonOptions` for what they mean for the stages.
        independent_batch: whether the leading dimension of a state with several is a batch of independent states.
        **options: those of `NewtonOptions`, and of torchdiffeq's solver.
    """

    method: ClassVar[ImplicitMethod]
    order: int
    func: Any
    y0: Tensor
    weights: Callable[[Tensor], Tensor]
    """The error that the tolerances allow in each component in a step from a state, shape (B, n)."""

    def __init__(
        self, func: Any, y0: Tensor, rtol: Any, atol: Any, independent_batch: bool = True, **options: Any
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
        """The stiff and the nonstiff part of a vector field."""
        return _parts(func, self.method.name)

    @abstractmethod
    def stage_keywords(self) -> list[dict[str, Any]]:
        """What f is handed at each stage beside time and state."""

    def take(
        self, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor, keywords: Sequence[dict[str, Any]], f0: Tensor | None
    ) -> TakenStep:
        """Take a step from y0 at t0, with the slope there if it is known."""
        # As torchdiffeq has it, so that a stage at the step's end is at t1 to the last bit.
        times = [t1 if c == 1 else t0 + c * dt for c in self.method.tableau.c.tolist()]
        if self.parts is not None:
            self._compare_parts(t0, y0)
        slope = None if f0 is None or self.parts is not None else self.layout.flat(f0)
        fields = self.fields(times, keywords)
        with torch.no_grad():
            return self.steps.take(fields, self.layout.flat(y0), float(dt), self.weights(y0), slope)

    def fields(self, times: Sequence[Tensor], keywords: Sequence[dict[str, Any]]) -> StepFields:
        """f at the stages of a step."""
        functions = (self.func,) if self.parts is None else self.parts
        stages, *others = [
            [self._field(function, t, kwargs) for t, kwargs in zip(times, keywords, strict=True)]
            for function in functions
        ]
        return StepFields(stages, others[0] if others else None)

    def _field(self, func: Any, t: Tensor, keywords: dict[str, Any]) -> StageField:
        return stage_field(lambda x: func(t, x, **keywords), self.layout)

    def _compare_parts(self, t0: Tensor, y0: Tensor) -> None:
        """Check once that the parts add up to the whole.

        Raises:
            ValueError: if they do not.
        """
        if self._compared or self.parts is None:
            return
        self._compared = True
        with torch.no_grad():
            whole, parts = self.func(t0, y0), [part(t0, y0) for part in self.parts]
        off = torch.linalg.vector_norm(whole - sum(parts))
        if not bool(off <= 1e-3 * sum(torch.linalg.vector_norm(part) for part in parts)):
            raise ValueError(f"{self.method.name}: func is not the sum of func.stiff and func.nonstiff")

    def _refused(self, solution: Tensor, t: Tensor) -> Tensor:
        """The solution with a graph that only says that there is none, where one would be expected."""
        if not torch.is_grad_enabled():
            return solution
        slope = self.func(t.reshape(-1)[0], self.y0)
        name = self.method.name
        return without_gradient(solution, (slope, self.y0, t), name, f'method="symplectic_adjoint:{name}"')


class FixedGridImplicit(_Implicit, FixedGridODESolver):
    """An implicit method on a grid that is given."""

    def stage_keywords(self) -> list[dict[str, Any]]:
        at_end: dict[str, Any] = {"perturb": Perturb.PREV} if self.perturb else {}
        return [self.start_keywords() if c == 0 else at_end if c == 1 else {} for c in self.method.tableau.c.tolist()]

    def start_keywords(self) -> dict[str, Any]:
        """What f is handed at a step's start beside time and state."""
        return {"perturb": Perturb.NEXT} if self.perturb else {}

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        # The slope at the start is for the cubic interpolant, where it is not one of the method's own.
        f0 = func(t0, y0, **self.start_keywords()) if self.interp == "cubic" else None
        first = f0 if self.method.explicit_first_stage else None
        taken = self.take(t0, dt, t1, y0, self.stage_keywords(), first)
        if bool(taken.failed.any()):
            raise RuntimeError(
                f"{self.method.name}: Newton's method did not solve the step from t = {float(t0):g} of size "
                f"{float(dt):g} ({int(taken.failed.sum())} of {len(taken.failed)} batch elements): {taken.reason}. "
                "Take smaller steps, or an adaptive method (kencarp3, kencarp5)."
            )
        shaped = self.layout.shaped
        return shaped(taken.increment), shaped(taken.slopes[0]) if f0 is None else f0

    def integrate(self, t: Tensor) -> Tensor:
        """The solution at the times t, shape (len(t), *y0.shape)."""
        with torch.no_grad():
            solution = super().integrate(t)
        return self._refused(solution, t)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The time of the event, and the states at t0 and then."""
        with torch.no_grad():
            event_t, solution = super().integrate_until_event(t0, event_fn)
        return event_t, self._refused(solution, t0)


class AdaptiveImplicit(_Implicit, RKAdaptiveStepsizeODESolver):
    """A pair of diagonally implicit methods, with torchdiffeq's error norm, step sizes, interpolant and events."""

    step_t: Any
    jump_t: Any

    def stage_keywords(self) -> list[dict[str, Any]]:
        return [{"perturb": Perturb.PREV} if c == 1 else {} for c in self.method.tableau.c.tolist()]

    def _adaptive_step(self, rk_state: Any) -> Any:
        if self.method.nonstiff is not None:
            # torchdiffeq does not go on to the next one where a step ends there of itself.
            while self.next_step_index < len(self.step_t) - 1 and self.step_t[self.next_step_index] <= rk_state.t1:
                self.next_step_index += 1
        t0, t1, dt = self._ends(rk_state)
        y0, func = rk_state.y1, self.func
        if not bool(t1 > t0 and y0.isfinite().all()):
            return super()._adaptive_step(rk_state)  # which complains
        keywords = self.stage_keywords()
        if self.method.nonstiff is not None and bool((self.jump_t == t0).any()):
            keywords[0] = {"perturb": Perturb.NEXT}
        dtype = y0.abs().dtype
        taken = self.take(t0.to(dtype), dt.to(dtype), t1.to(dtype), y0, keywords, rk_state.f1)
        if bool(taken.failed.any()):
            return self._rejected(rk_state, t0, dt, taken.reason)
        slopes = [self.layout.shaped(slope) for slope in taken.slopes]
        if self.method.nonstiff is not None:
            rk_state = rk_state._replace(f1=slopes[0])  # it was evaluated again, in its parts
        # torchdiffeq's own step, for which the slopes are there already.
        self.func = _Slopes(func, slopes[1:])
        try:
            return super()._adaptive_step(rk_state)
        finally:
            self.func = func

    def _before_integrate(self, t: Tensor) -> None:
        if self.method.nonstiff is not None and len(t) > 1:
            # Slopes of an additive method's stages are far from the solution's where that is stiff, and so is an
            # interpolant made of them: outputs are ends of steps.
            given = t[:0] if self.step_t is None else self.step_t.to(t)
            jumps = t[:0] if self.jump_t is None else self.jump_t.to(t)
            times = torch.cat([given, t[1:]]).unique()
            self.step_t = times[~torch.isin(times, jumps)]
        super()._before_integrate(t)

    def _ends(self, rk_state: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Start, end and size of the step that torchdiffeq is about to take."""
        t0, dt = rk_state.t1, rk_state.dt
        if _HAS_LIMITS:
            dt = (dt if dt.isfinite() else self.min_step).clamp(self.min_step, self.max_step)
        t1 = t0 + dt
        for times, index in ((self.step_t, self.next_step_index), (self.jump_t, self.next_jump_index)):
            if len(times) and t0 < times[index] < t0 + dt:
                t1 = times[index]
                dt = t1 - t0
        return t0, t1, dt

    def _rejected(self, rk_state: Any, t0: Tensor, dt: Tensor, reason: str) -> Any:
        """What a step whose error is infinite is followed by: the same with a smaller one."""
        y0 = rk_state.y1
        if _HAS_LIMITS:
            self.func.callback_step(t0, y0, dt)
            self.func.callback_reject_step(t0, y0, dt)
        self.steps.newton.forget()
        error_ratio = torch.full_like(dt, float("inf"))
        smaller = _optimal_step_size(dt, error_ratio, self.safety, self.ifactor, self.dfactor, self.order)
        if _HAS_LIMITS:
            smaller = smaller.clamp(self.min_step, self.max_step)
        if smaller >= dt or t0 + smaller <= t0 or smaller < torch.finfo(dt.dtype).tiny:
            raise RuntimeError(
                f"{self.method.name}: Newton's method did not solve the step from t = {float(t0):g} of size "
                f"{float(dt):g}, which can't be made smaller: {reason}"
            )
        return rk_state._replace(t0=t0, dt=smaller)

    def integrate(self, t: Tensor) -> Tensor:
        """The solution at the times t, shape (len(t), *y0.shape)."""
        with torch.no_grad():
            solution = super().integrate(t)
        return self._refused(solution, t)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The time of the event, and the states at t0 and then.

        Raises:
            ValueError: if the method is an additive one.
        """
        if self.method.nonstiff is not None:
            raise ValueError(
                f"{self.method.name}: there are no events with it, since its interpolant is not accurate inside steps "
                f"where the system is stiff: use {self.method.name.removesuffix('_imex')}"
            )
        with torch.no_grad():
            event_t, solution = super().integrate_until_event(t0, event_fn)
        return event_t, self._refused(solution, t0)


class _Slopes:
    """Stands for f while torchdiffeq takes a step whose slopes are known: hands them out in their order."""

    def __init__(self, func: Any, slopes: Sequence[Tensor]) -> None:
        self._func = func
        self._slopes = iter(slopes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)  # the callbacks

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        if perturb is Perturb.NEXT:  # beyond a jump at the step's end
            return self._func(t, y, perturb=perturb)
        return next(self._slopes)


def _parts(func: Any, name: str) -> tuple[Any, Any]:
    """The stiff and the nonstiff part of a vector field, each in the wrappers that torchdiffeq put around it.

    Raises:
        ValueError: if it does not offer them.
    """
    wrappers, user = [], func
    while isinstance(user, (_PerturbFunc, _ReverseFunc, _TupleFunc)):
        wrappers.append(user)
        user = user.base_func
    parts = [getattr(user, part, None) for part in ("stiff", "nonstiff")]
    if not all(callable(part) for part in parts):
        raise ValueError(
            f"{name}: func must offer its two parts as func.stiff(t, y) and func.nonstiff(t, y), which add up to "
            f"func(t, y). For all of it to be implicit: {name.removesuffix('_imex')}."
        )
    for wrapper in reversed(wrappers):
        if isinstance(wrapper, _TupleFunc):
            parts = [_TupleFunc(part, wrapper.shapes) for part in parts]
        elif isinstance(wrapper, _ReverseFunc):
            parts = [_ReverseFunc(part, wrapper.mul) for part in parts]
        else:
            parts = [_PerturbFunc(part) for part in parts]
    return parts[0], parts[1]


def _solver(method: ImplicitMethod) -> type:
    """The class of a method's solver."""
    family: type = FixedGridImplicit if method.embedded is None else AdaptiveImplicit
    name = "".join(part.capitalize() if part.islower() else part for part in method.name.split("_"))
    members: dict[str, Any] = {"method": method, "order": method.order, "__doc__": family.__doc__}
    if method.embedded is not None:
        tableau = method.tableau
        # Its diagonal is not here: torchdiffeq's step only adds up the slopes that it is handed.
        beta = [tableau.a[i, :i].clone() for i in range(1, tableau.stages)]
        members["tableau"] = _ButcherTableau(tableau.c[1:], beta, tableau.b, tableau.b - method.embedded)
        members["mid"] = method.midpoint
    return type(name, (family,), {**members, "__module__": __name__})


SOLVERS: dict[str, type] = {name: _solver(method) for name, method in METHODS.items()}
"""The solver classes by name."""


def is_torchdiffeqs(solver: Any) -> bool:
    """Whether a class is an implicit method of torchdiffeq's own: its main branch has some, up to 0.2.5 it has none."""
    families = [getattr(rk_common, f"FixedGrid{kind}ODESolver", None) for kind in ("FIRK", "DIRK")]
    return hasattr(solver, "tableau") and any(
        family is not None and issubclass(solver, family) and solver._step_func is family._step_func
        for family in families
    )


@functools.cache
def counterpart(name: str, theirs: Any) -> type:
    """The solver with the coefficients of an implicit method of torchdiffeq's own, whose stages are solved for here.

    Args:
        name: the method's, in torchdiffeq's registry.
        theirs: its class there.

    Raises:
        ValueError: if its stages' times are not the row sums of its coefficients, and there is no such method here.
    """
    alpha, beta, b, _ = theirs.tableau
    try:
        tableau = ButcherTableau(lower_rows(beta), b, alpha)
    except ValueError as error:
        if name not in SOLVERS:
            raise ValueError(f"symplectic_adjoint: the coefficients of {name}: {error}") from None
        # Both stages of gl4 are at 1/2 - sqrt(3)/6 there, so that it is of order 1 where f depends on t.
        warnings.warn(
            f"symplectic_adjoint: the installed torchdiffeq's {name} has wrong coefficients, and is solved with the "
            f"right ones: {error}",
            stacklevel=5,
        )
        return SOLVERS[name]
    return _solver(ImplicitMethod(name, theirs.order, tableau))
