"""torchdyn's methods as tableaux, read off its solvers' steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ...field.held import Held
from ...methods.read_tableau import read_tableau
from ...methods.tableau import ButcherTableau
from .implicit import ImplicitSolver


def is_torchdyns(solver: Any) -> bool:
    """Return whether a solver with an exact gradient is based on one of torchdyn's own."""
    return bool(solver.base.__module__.startswith("torchdyn."))


def tableau_of(solver: Any) -> ButcherTableau | None:
    """Return the tableau of a solver as it is now; None if it is neither an explicit Runge-Kutta method nor ours."""
    if isinstance(solver, ImplicitSolver):
        return solver.method.tableau
    own = {name: value for name, value in vars(solver).items() if name not in ("solve", "loss", "params")}
    if Held(own).tensors or any(True for _ in solver.children()):
        return None  # a hypersolver, even if its network happens to return zeros
    if not is_torchdyns(solver):
        return _read(solver)
    numbers = (
        ()
        if solver.tableau is None
        else tuple(
            tuple(part.tolist())
            for coefficients in solver.tableau
            for part in (coefficients if isinstance(coefficients, list) else [coefficients])
        )
    )
    key = (solver.base, numbers)
    if key not in _tableaux:
        _tableaux[key] = _read(solver)
    return _tableaux[key]


_tableaux: dict[Any, ButcherTableau | None] = {}
"""Tableaux of torchdyn's own solvers, which depend on nothing but their coefficients."""


def _read(solver: Any) -> ButcherTableau | None:
    try:
        # Taken as they are: coefficients rounded to single precision, and times that are not the sums of their rows.
        return read_tableau(step_function(solver, torch.float64), rounding=float("inf"))
    except Exception:  # whatever a step that is not of the kind makes of made-up slopes
        return None


def step_function(solver: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a solver's step, to be probed on the CPU, with its coefficients in at least this precision.

    In single precision `dt * a[0]` rounds a size in double precision: no longer a linear map of the slopes.
    """
    probed = copy.copy(solver)
    if solver.tableau is not None:

        def cast(part: Tensor) -> Tensor:
            return part.cpu().to(part.dtype if dtype is None else torch.promote_types(part.dtype, dtype))

        c, a, *weights = solver.tableau
        probed.tableau = (cast(c), [cast(row) for row in a], *(cast(weight) for weight in weights))
    return lambda f, t, x, h: solver.base.step(probed, f, x, t, h)[1]
