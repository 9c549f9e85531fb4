"""torchdiffeq's methods as tableaux and interpolants, read off its solvers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from ...methods.read_tableau import probe
from ...methods.tableau import ButcherTableau
from ...record.method import DenseOutput
from ._compat import (
    AdamsBashforthMoulton,
    FixedGridODESolver,
    RKAdaptiveStepsizeODESolver,
    _runge_kutta_step,
    solver_table,
)
from .implicit import AdaptiveImplicit, FixedGridImplicit, counterpart, is_torchdiffeqs

IMPLICIT = (AdaptiveImplicit, FixedGridImplicit)

_MUST_BE_THE_FAMILYS = {
    RKAdaptiveStepsizeODESolver: ("integrate", "_before_integrate", "_advance", "_adaptive_step"),
    FixedGridODESolver: ("integrate", "_linear_interp", "_cubic_hermite_interp"),
    AdaptiveImplicit: ("integrate", "_before_integrate", "_advance", "_adaptive_step", "take"),
    FixedGridImplicit: ("integrate", "_linear_interp", "_cubic_hermite_interp", "_step_func", "take"),
}
"""Attributes that a solver of a family may not redefine: the recording would not follow."""


@functools.lru_cache(256)
def is_one_step(solver: Any) -> bool:
    """Return whether a class is a one-step method of torchdiffeq's two families or of their implicit counterparts.

    As far as a class can show: the steps of a user's own class may still be no Runge-Kutta steps.
    """
    if not isinstance(solver, type) or issubclass(solver, AdamsBashforthMoulton):
        return False
    return any(
        issubclass(solver, family) and all(getattr(solver, name, None) is getattr(family, name, None) for name in names)
        for family, names in _MUST_BE_THE_FAMILYS.items()
    )


@functools.lru_cache(256)
def callbacks_of(solver: type) -> frozenset[str]:
    """Return the names of the callbacks that a solver calls. torchdiffeq 0.2.3 has no callbacks."""
    return frozenset(getattr(solver, "valid_callbacks", set)())


def base_solver(name: str) -> Any:
    """The class of a base solver by its name in SOLVERS.

    Raises:
        ValueError: if there is none of that name, or it is not a one-step method.
    """
    solver = solver_table().get(name) if isinstance(name, str) else None
    if not is_one_step(solver):
        usable = ", ".join(f'"{key}"' for key, value in solver_table().items() if is_one_step(value))
        what = "is not a one-step Runge-Kutta method" if solver is not None else "is not a method of torchdiffeq's"
        raise ValueError(f"symplectic_adjoint: solver {name!r} {what}. Use one of {usable}.")
    return counterpart(name, solver) if is_torchdiffeqs(solver) else solver


def read_method(solver: Any) -> tuple[ButcherTableau, list[dict[str, Any]]]:
    """A solver's tableau, and the keyword arguments with which it evaluates each stage.

    Raises:
        ValueError: if its step is neither an explicit Runge-Kutta step nor one of an implicit method that is known.
    """
    if isinstance(solver, IMPLICIT):
        return solver.method.tableau, solver.stage_keywords()
    base = type(solver).base
    if base.__module__.startswith("torchdiffeq."):  # those depend on nothing else
        return _read_own(base, perturb=bool(getattr(solver, "perturb", False)))
    return _read(solver)


@functools.cache
def _read_own(base: Any, *, perturb: bool = False) -> tuple[ButcherTableau, list[dict[str, Any]]]:
    solver = base.__new__(base)
    solver.perturb = perturb
    return _read(solver)


def _read(solver: Any) -> tuple[ButcherTableau, list[dict[str, Any]]]:
    solver = copy.copy(solver)  # probing must leave no trace in the one that solves
    if isinstance(solver, FixedGridODESolver):
        return probe(lambda f, t, x, h: x + solver._step_func(f, t, h, t + h, x)[0])
    tableau = type(solver).tableau
    return probe(lambda f, t, x, h: _runge_kutta_step(f, x, f(t, x), t, h, t + h, tableau)[0])


def hands_on_slope(solver: Any) -> bool:
    """Return whether a step takes its first slope from the step before."""
    if isinstance(solver, AdaptiveImplicit) and solver.method.nonstiff is not None:
        return False  # its two parts are evaluated anew
    return isinstance(solver, RKAdaptiveStepsizeODESolver)


def read_dense_output(solver: Any, tableau: ButcherTableau) -> DenseOutput:
    """The interpolant that a solver makes its outputs with."""
    if isinstance(solver, RKAdaptiveStepsizeODESolver):
        base = type(solver).base
        if base.__module__.startswith("torchdiffeq."):  # as above
            return _own_polynomial(base, solver.mid.dtype)
        return _Polynomial(solver, tableau)
    return _CubicHermite(solver, tableau) if solver.interp == "cubic" else _Linear(tableau)


class _Polynomial(DenseOutput):
    """The adaptive methods' quartic, through both ends and the midpoint, with both end slopes."""

    def __init__(self, solver: Any, tableau: ButcherTableau) -> None:
        solver = copy.copy(solver)
        solver.mid = solver.mid.cpu()
        s = tableau.stages
        zero, one = torch.zeros(s, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        # Element i of this state is the weight of slope i.
        powers = solver._interp_fit(zero, tableau.b, torch.eye(s, dtype=torch.float64), one)
        self.powers = torch.stack([power.real if power.is_complex() else power for power in powers])

    def weights(self, theta: Tensor) -> Tensor:
        result = torch.zeros(len(theta), self.powers.shape[1], dtype=torch.float64)
        for power in self.powers.flip(0):
            result = result * theta[:, None] + power
        return result


@functools.cache
def _own_polynomial(base: Any, dtype: torch.dtype) -> DenseOutput:
    solver = base.__new__(base)
    solver.mid = base.mid.to(dtype)
    return _Polynomial(solver, _read_own(base)[0])


class _Linear(DenseOutput):
    """The fixed-grid methods' default: between x_n and x_{n+1}; at these, they themselves, whatever t does."""

    linear = True
    _is_end = True

    def __init__(self, tableau: ButcherTableau) -> None:
        self.b = tableau.b

    def weights(self, theta: Tensor) -> Tensor:
        inside = (theta != 0) & (theta != 1)
        return torch.where(inside, theta, theta.detach())[:, None] * self.b


class _CubicHermite(DenseOutput):
    """Through both ends, with the slopes there; that at the end is evaluated for it."""

    end_stage = True

    def __init__(self, solver: Any, tableau: ButcherTableau) -> None:
        self.interpolate = type(solver)._cubic_hermite_interp
        self.start_stage = bool(tableau.a[0].any())  # so it is in none of the explicit methods
        added = 1 + self.start_stage
        self.b = torch.cat([tableau.b, tableau.b.new_zeros(added)])
        self.unit = torch.eye(tableau.stages + added, dtype=torch.float64)
        self.first = self.unit[tableau.stages if self.start_stage else 0]

    def weights(self, theta: Tensor) -> Tensor:
        nothing = torch.zeros_like(self.b)
        return self.interpolate(None, 0.0, nothing, self.first, 1.0, self.b, self.unit[-1], theta[:, None])
