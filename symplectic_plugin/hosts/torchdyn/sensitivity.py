"""torchdyn's ODE problems with `sensitivity="symplectic_adjoint"`.

torchdyn has no registry of sensitivities: a problem asks its `_autograd_func` for the one that its name means. Here is
one, which `_autograd_func` looks into first once `install` has run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._compat import odeint_module, problems_module
from .solver import with_adjoint

SENSITIVITIES: dict[str, Callable[[Any], Callable[..., Any]]] = {}
"""Functions by the name of the sensitivity. Called with a problem, each returns a function that solves it, which
torchdyn calls as an autograd function: with the flattened parameters and the arguments of the problem's `odeint`."""

_replaced: list[tuple[type, Any]] = []


def install() -> None:
    """Have torchdyn's problems look into `SENSITIVITIES`."""
    problems: Any = problems_module()
    if _replaced:
        return
    for problem in (problems.ODEProblem, problems.MultipleShootingProblem):
        original = problem._autograd_func

        def _autograd_func(self: Any, original: Any = original) -> Any:
            sensitivity = SENSITIVITIES.get(self.sensalg)
            if sensitivity is None and str(self.sensalg).startswith("symplectic_adjoint"):
                raise ValueError(
                    f"symplectic_adjoint: there is no sensitivity {self.sensalg!r}. Use "
                    'sensitivity="symplectic_adjoint", and choose the method by solver="rk4" and the like.'
                )
            return original(self) if sensitivity is None else sensitivity(self)

        problem._autograd_func = functools.wraps(original)(_autograd_func)
        _replaced.append((problem, original))


def uninstall() -> None:
    """Undo `install`."""
    while _replaced:
        problem, original = _replaced.pop()
        problem._autograd_func = original  # type: ignore[attr-defined]


def symplectic_adjoint(problem: Any) -> Callable[..., Any]:
    """Return a function that solves a problem of torchdyn's with exact gradients.

    Raises:
        ValueError: if its solver's step can't be differentiated.
    """
    module: Any = odeint_module()
    if hasattr(problem, "parallel_solver"):

        def shooting(_: Tensor, x: Tensor, t_span: Tensor, B0: Any = None) -> tuple[Tensor, Tensor]:  # noqa: N803
            solver = problem.parallel_solver
            solver = module.str_to_ms_solver(solver) if isinstance(solver, str) else solver
            solver = with_adjoint(solver)
            return module.odeint_mshooting(problem.vf, x, t_span, solver, B0, problem.fine_steps, problem.maxiter)

        return shooting

    def solve(_: Tensor, x: Any, t_span: Tensor, save_at: Any = (), args: Any = None) -> tuple[Tensor, Any]:
        solver = with_adjoint(problem.solver)
        solver.loss = _integrand(problem.integral_loss, t_span)
        return module.odeint(
            problem.vf, x, t_span, solver, problem.atol, problem.rtol,
            interpolator=problem.interpolator, save_at=save_at, args={} if args is None else args,
        )  # fmt: skip

    return solve


symplectic_adjoint.install = install  # type: ignore[attr-defined]
symplectic_adjoint.uninstall = uninstall  # type: ignore[attr-defined]


def _integrand(loss: Any, t_span: Tensor) -> Any:
    """Return the integrand in the time that torchdyn integrates over, which is reversed where time decreases."""
    if loss is None or t_span[1] >= t_span[0]:
        return loss
    return lambda t, x: -loss(-t, x)
