"""Implicit methods as torchdyn solvers, for torchdyn's loops over given steps and with step size control."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods import implicit_tableaux
from ...methods.implicit_step import ImplicitSteps, StepFields, TakenStep
from ...methods.implicit_tableaux import ImplicitMethod
from ...methods.newton import OPTIONS, NewtonOptions, tolerance_weights
from ...methods.no_gradient import without_gradient
from ...methods.stage_field import Layout, stage_field
from ...methods.tableau import ButcherTableau
from ...record.implicit_solve import ImplicitSolve, require_exact
from ._compat import DiffEqSolver

_ONE = torch.ones(1, dtype=torch.float64)

METHODS: Mapping[str, ImplicitMethod] = {
    **{name: method for name, method in implicit_tableaux.METHODS.items() if method.nonstiff is None},
    # The tableau of torchdyn's own implicit_euler, which evaluates f at the time of the step's start.
    "implicit_euler": ImplicitMethod(
        "implicit_euler", 1, ButcherTableau(_ONE[None], _ONE, 0 * _ONE, rounding=float("inf"))
    ),
}
"""Implicit methods for torchdyn, by name."""


class ImplicitSolver(DiffEqSolver):
    """Implicit Runge-Kutta method with torchdyn's interface for solvers.

    Args:
        name: name of the method in `METHODS`. There are no additive methods, as torchdyn's wrappers hide their parts.
        dtype: ignored; steps are computed in the state's dtype.
        independent_batch: whether the leading dimension of a state with several dimensions is a batch of independent
            states.
        rtol: relative tolerance for Newton's method, see `NewtonOptions`: torchdyn does not give its solvers the
            tolerances of the solve.
        atol: absolute tolerance for Newton's method.
        **options: options of `NewtonOptions`.

    Raises:
        ValueError: if there is no such method, or an option is out of range.
        TypeError: if there is no such option.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        *,
        independent_batch: bool = True,
        rtol: float = 1e-6,
        atol: float = 1e-8,
        **options: Any,
    ) -> None:
        if name not in METHODS:
            raise ValueError(f"there is no implicit method {name!r}: use one of {', '.join(METHODS)}")
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f"{name}: unknown options {', '.join(sorted(unknown))}: there are {', '.join(OPTIONS)}")
        method = METHODS[name]
        super().__init__(order=method.order, stepping_class="fixed" if method.embedded is None else "adaptive")
        self.name = name
        self.dtype = dtype
        self.options = NewtonOptions(**options)
        self.independent_batch = independent_batch
        self.rtol, self.atol = rtol, atol
        self.steps = ImplicitSteps(method, self.options)

    @property
    def method(self) -> ImplicitMethod:
        """Coefficients of the method."""
        return METHODS[self.name]

    def sync_device_dtype(self, x: Any, t_span: Tensor) -> tuple[Any, Tensor]:
        """Prepare a solve, as torchdyn's loops do before its first step.

        Raises:
            ValueError: if the state is no tensor, or in less than single precision.
        """
        if not isinstance(x, Tensor):
            raise ValueError(f"{self.name}: the state must be a tensor, got {type(x).__name__}")
        if not (x.is_floating_point() or x.is_complex()) or torch.finfo(x.dtype).bits < 32:
            raise ValueError(f"{self.name}: give the state in single or double precision, not in {x.dtype}")
        self.steps = ImplicitSteps(self.method, self.options)
        result: tuple[Any, Tensor] = super().sync_device_dtype(x, t_span)
        return result

    def layout(self, x: Tensor) -> Layout:
        """Return the layout of states of the shape and dtype of x."""
        return Layout(x.shape, x.dtype, self.independent_batch)

    def weights(self, layout: Layout) -> Callable[[Tensor], Tensor]:
        """Return the function `weights` of `ImplicitSolve`, for states of this layout."""
        return functools.partial(tolerance_weights, layout, self.rtol, self.atol)

    def implicit_solve(self, x: Tensor) -> ImplicitSolve:
        """Return how the stages of a solve with an exact gradient are solved for, from a state x.

        Raises:
            ValueError: if not to rounding.
        """
        layout = self.layout(x)
        return ImplicitSolve(self.method, require_exact(self.options), layout, self.weights(layout))

    def stage_times(self, t: Tensor, dt: Tensor) -> list[Tensor]:
        """List the times of a step's stages."""
        return [t + c * dt for c in self.method.tableau.c.tolist()]

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None) -> Any:
        """Take a step of size dt from x at t.

        Args:
            f: vector field, f(t, x).
            x: state at the step's start.
            t: time at the step's start, one element.
            dt: size of the step, one element.
            k1: slope at the step's start, if it is known.
            args: ignored.

        Returns:
            As torchdyn's steps: (last slope, state, error, slopes) by an adaptive method, else (None, state, None).

        Raises:
            ValueError: if there are several sizes.
            RuntimeError: if the stages can't be solved for, where the step is given or can't be made smaller.
        """
        if t.numel() != 1 or dt.numel() != 1:
            raise ValueError(f"{self.name}: steps of several sizes at once are not supported")
        layout = self.layout(x)
        fields = StepFields(
            [stage_field(functools.partial(f, time.detach()), layout) for time in self.stage_times(t, dt)]
        )
        first = None if k1 is None else layout.flat(k1.detach().to(x.dtype))
        with torch.no_grad():
            taken = self.steps.take(fields, layout.flat(x), dt.item(), self.weights(layout)(x), first)
        end, more = self.result(taken, x.detach(), t, dt)
        if torch.is_grad_enabled():
            inputs = (f(t, x), x, t, dt)
            end = without_gradient(end, inputs, self.name, 'sensitivity="symplectic_adjoint"')
        return (None, end, None) if more is None else (more[0], end, *more[1:])

    def result(self, taken: TakenStep, x: Tensor, t: Tensor, dt: Tensor) -> tuple[Tensor, tuple[Any, ...] | None]:
        """Return the state at the end of a taken step, and (last slope, error, slopes) if the method is adaptive.

        Args:
            taken: the taken step.
            x: state at the step's start.
            t: time at the step's start.
            dt: size of the step.

        Raises:
            RuntimeError: if the stages were not solved for, where the step is given or can't be made smaller.
        """
        layout, h, embedded = self.layout(x), dt.item(), self.method.embedded
        end = x + layout.shaped(taken.increment)
        if bool(taken.failed.any()):
            # torchdyn shrinks a step of infinite error by the factor min_factor.
            smaller = dt * self.min_factor.to(dt)
            if embedded is None or not bool((t + smaller > t) & (smaller > torch.finfo(dt.dtype).tiny)):
                raise taken.failure(self.name, t.item(), h)
            self.steps.newton.forget()
            return x.clone(), (layout.shaped(taken.slopes[0]), torch.full_like(x, float("inf")), Slopes())
        if embedded is None:
            return end, None
        weights = (self.method.tableau.b - embedded).to(taken.slopes)
        error = layout.shaped(h * torch.einsum("i,i...->...", weights, taken.slopes))
        return end, (layout.shaped(taken.slopes[-1]), error, Slopes())


class Slopes(Sequence[Tensor]):
    """Stand-in for a step's slopes, which torchdyn's interpolator would combine with the weights of dopri5."""

    def __len__(self) -> int:
        raise ValueError("torchdyn's interpolator is dopri5's: leave interpolator away for the implicit methods")

    def __getitem__(self, index: Any) -> Any:
        return len(self)
