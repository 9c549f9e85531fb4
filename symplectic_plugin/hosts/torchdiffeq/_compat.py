"""Private interface of torchdiffeq that the adapter uses: all names from `torchdiffeq._impl`, and its versions.

Seen in torchdiffeq 0.2.3 and 0.2.5: every name without another note. Differences between versions:

- 0.2.3 has neither callbacks (`callback_step`, ...) nor the options `min_step` and `max_step` of adaptive methods.
- The main branch after 0.2.5 has implicit methods, with base classes `FixedGridFIRKODESolver` and
  `FixedGridDIRKODESolver` in `rk_common`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from torchdiffeq._impl import misc, rk_common
from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
from torchdiffeq._impl.misc import Perturb, _optimal_step_size, _PerturbFunc, _ReverseFunc, _TupleFunc
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau, _runge_kutta_step
from torchdiffeq._impl.solvers import FixedGridODESolver

__all__ = [
    "HAS_STEP_LIMITS", "NULL_CALLBACK", "AdamsBashforthMoulton", "FixedGridODESolver", "Perturb",
    "RKAdaptiveStepsizeODESolver", "_ButcherTableau", "_PerturbFunc", "_ReverseFunc", "_TupleFunc",
    "_optimal_step_size", "_runge_kutta_step", "adjoint_module", "implicit_families", "is_wrapper",
    "solver_table",
]  # fmt: skip

HAS_STEP_LIMITS = "min_step" in inspect.signature(RKAdaptiveStepsizeODESolver.__init__).parameters
"""True where adaptive methods have limits for step sizes, and callbacks."""

NULL_CALLBACK: Any = getattr(misc, "_null_callback", None)
"""Callback of a vector field that has none of its own; None where torchdiffeq has no callbacks."""


def solver_table() -> dict[str, type]:
    """Return `SOLVERS`, the solver classes by method name, of the module as loaded at present."""
    # As an attribute of its package, `odeint` is the function.
    return sys.modules["torchdiffeq._impl.odeint"].SOLVERS


def adjoint_module() -> ModuleType:
    """Return the module of `odeint_adjoint`, `OdeintAdjointMethod` and `find_parameters`, as loaded at present."""
    return sys.modules["torchdiffeq._impl.adjoint"]


def is_wrapper(func: Any) -> bool:
    """Tell whether a vector field is one of torchdiffeq's wrappers, which have the wrapped one as `base_func`."""
    return type(func).__module__ == misc.__name__ and hasattr(func, "base_func")


def implicit_families() -> list[Any]:
    """List the base classes of torchdiffeq's own implicit methods."""
    families = (getattr(rk_common, f"FixedGrid{kind}ODESolver", None) for kind in ("FIRK", "DIRK"))
    return [family for family in families if family is not None]
