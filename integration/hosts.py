"""Either host, with the flag and without: its methods, a call that serves both, and what is kept of a solve."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS as REGISTRY
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from symplectic_plugin.record import defaults

from .exactness import Outcome

FLAG = "symplectic_adjoint"

_OWN = {name: solver for name, solver in REGISTRY.items() if solver.__module__.startswith("torchdiffeq.")}
ADAPTIVE = tuple(name for name, solver in _OWN.items() if issubclass(solver, RKAdaptiveStepsizeODESolver))
"""torchdiffeq's explicit methods that choose their steps."""
FIXED = tuple(name for name, solver in _OWN.items() if solver.__module__ == "torchdiffeq._impl.fixed_grid")
"""torchdiffeq's explicit methods on a given grid."""
EXPLICIT = ADAPTIVE + FIXED
MULTISTEP = tuple(name for name, solver in _OWN.items() if solver.__module__.endswith(("fixed_adams", "scipy_wrapper")))
"""torchdiffeq's methods that are no one-step methods."""

IMPLICIT = tuple(name for name in REGISTRY if f"{FLAG}:{name}" in REGISTRY and name not in EXPLICIT)
"""Implicit methods that the flag takes with torchdiffeq; those in two parts are for torchdiffeq alone."""
IMPLICIT_FIXED = tuple(name for name in IMPLICIT if issubclass(REGISTRY[name], FixedGridODESolver))
IMPLICIT_ADAPTIVE = tuple(name for name in IMPLICIT if name not in IMPLICIT_FIXED)
ADDITIVE = tuple(name for name in IMPLICIT if name.endswith("_imex"))

TORCHDIFFEQ = ("torchdiffeq dopri5", "torchdiffeq rk4")
TORCHDYN = ("torchdyn tsit5", "torchdyn rk4")
SOLVERS = TORCHDIFFEQ + TORCHDYN
"""An adaptive and a fixed-step method of each host, as `solve` takes them."""
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def takes_complex_states() -> bool:
    """Tell whether this torchdiffeq does: 0.2.3 does not."""
    try:
        torchdiffeq.odeint(lambda t, y: y, torch.ones(1, dtype=torch.complex64), torch.tensor([0.0, 1.0]))
    except TypeError:
        return False
    return True


callbacks_and_limits = pytest.mark.skipif(
    not hasattr(torchdiffeq._impl.misc, "_null_callback"),
    reason="this torchdiffeq has neither callbacks nor limits of the step size",
)
"""For tests that need what torchdiffeq 0.2.3 does not have."""

complex_states = pytest.mark.skipif(not takes_complex_states(), reason="this torchdiffeq takes no complex states")


KEPT: dict[str, dict[str, Any]] = {
    "live graph": {},
    "graphs of single evaluations": {"live_graphs": False},
    "states": {"checkpoint": "steps"},
}
"""Defaults by the kind of checkpoint that they leave of the small solves in the tests."""


def keeping(what: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which solves keep one of `KEPT`."""
    return defaults.override(**KEPT[what])


def given_steps(method: str, size: float = 0.1, held: bool = False) -> dict[str, float]:
    """Return torchdiffeq's options for a first step, or for all steps, of a size.

    Args:
        method: one of `EXPLICIT` or `IMPLICIT`.
        size: of the first step of an adaptive method, of all of another.
        held: whether an adaptive method is to take no longer ones either.
    """
    if method in FIXED + IMPLICIT_FIXED:
        return {"step_size": size}
    return {"first_step": size, "max_step": size} if held else {"first_step": size}


def least_budget(solve: Callable[[int], Any]) -> int:
    """Return the least memory budget in bytes that `solve(budget)` takes, as its error says."""
    with pytest.raises(ValueError, match=r"is too small.*needs at least") as error:
        solve(1)
    return int(str(error.value).split("needs at least ")[1].split()[0])


_PATCHING = threading.RLock()


@contextlib.contextmanager
def constant_first_step() -> Iterator[None]:
    """Take from torchdyn's backpropagation the gradient that it carries through the choice of the first step size.

    One thread at a time, since what is patched is torchdyn's for all of them.
    """
    module: Any = sys.modules["torchdyn.numerics.odeint"]
    with _PATCHING, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(module, "init_step", torch.no_grad()(module.init_step))
        yield


def solve(solver: str, flag: bool, field: Any, y0: Tensor, t: Tensor, **options: Any) -> Tensor:
    """Solve with a host and a method.

    Args:
        solver: host and method, as in `SOLVERS`.
        flag: whether by the flag.
        field, y0, t: the initial value problem.
        **options: torchdiffeq's, or the flag's own.

    Returns:
        The solution, shape (times, *state).
    """
    host, method = solver.split()
    name = f"{FLAG}:{method}" if flag else method
    if host == "torchdiffeq":
        options = options if method in FIXED + IMPLICIT_FIXED else {"first_step": 0.1, **options}
        return torchdiffeq.odeint(field, y0, t, method=name, rtol=1e-4, atol=1e-4, options=options)
    from torchdyn.numerics import odeint
    from torchdyn.numerics.solvers.ode import SOLVER_DICT

    chosen = SOLVER_DICT[name](y0.dtype, **options) if options else name
    tolerances = {"atol": 1e-4, "rtol": 1e-4} if method in ("tsit5", *ADAPTIVE, *IMPLICIT_ADAPTIVE) else {}
    with contextlib.nullcontext() if flag else constant_first_step():
        return odeint(field, y0, t, solver=chosen, **tolerances)[1]


def solver_of(name: str, **options: Any) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Return the flag's `solve(f, y0, t)` with a host, a method and options."""
    return functools.partial(solve, name, True, **options)


def by_problem(sensitivity: str, problem: type | None = None, **keywords: Any) -> Callable[..., Tensor]:
    """Return `solve(f, x, t_span)` by one of torchdyn's problems, `ODEProblem` if none is given."""
    from torchdyn.core import ODEProblem

    given = {"save_at": keywords.pop("save_at")} if "save_at" in keywords else {}
    return lambda field, x, t_span: (problem or ODEProblem)(field, sensitivity=sensitivity, **keywords).odeint(
        x, t_span, **given
    )[1]


def by_function(**keywords: Any) -> Callable[..., Tensor]:
    """Return `solve(f, x, t_span)` by torchdyn's odeint."""
    from torchdyn.numerics import odeint

    return lambda field, x, t_span: odeint(field, x, t_span, **keywords)[1]


def outcomes(
    field: nn.Module, x: Tensor, t_span: Tensor, actual: Any, expected: Any, **keywords: Any
) -> tuple[Outcome, Outcome]:
    """Return the outcomes of two of torchdyn's solves, the second with a first step size that is a constant."""
    with constant_first_step():
        reference = Outcome(field, x, t_span, odeint=expected, **keywords)
    return Outcome(field, x, t_span, odeint=actual, **keywords), reference
