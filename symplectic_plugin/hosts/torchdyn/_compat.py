"""Interface of torchdyn that the adapter uses beside the public functions, as in torchdyn 1.0.6."""

from __future__ import annotations

import sys
from types import ModuleType

from torchdyn.numerics.solvers.ode import MS_SOLVER_DICT, SOLVER_DICT, ImplicitEuler, ParallelImplicitEuler
from torchdyn.numerics.solvers.templates import DiffEqSolver

__all__ = [
    "MS_SOLVER_DICT", "SOLVER_DICT", "DiffEqSolver", "ImplicitEuler", "ParallelImplicitEuler", "odeint_module",
    "problems_module",
]  # fmt: skip


def odeint_module() -> ModuleType:
    """Return the module of `odeint`, `odeint_mshooting`, `init_step` and `str_to_ms_solver`, as loaded at present."""
    # As an attribute of its package, `odeint` is the function.
    return sys.modules["torchdyn.numerics.odeint"]


def problems_module() -> ModuleType:
    """Return the module of `ODEProblem` and `MultipleShootingProblem`, which is imported later than the solvers."""
    return sys.modules["torchdyn.core.problems"]
