"""torchdiffeq's `odeint_adjoint` with "symplectic_adjoint" as its method or adjoint method.

`odeint_adjoint` normalises its arguments and hands them to `OdeintAdjointMethod.apply`, which it looks up in its module
when it is called. A subclass is put there that solves with the symplectic adjoint method when told to, and does as
before otherwise, so that it makes no difference when `odeint_adjoint` was imported.
"""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._compat import adjoint_module, is_wrapper, solver_table

_OWN_OPTIONS = ("adjoint_params",)


_replaced: dict[ModuleType, Any] = {}
"""torchdiffeq's own class, by the module that holds the subclass."""


def install(symplectic_adjoint: Any) -> None:
    """Put the subclass in place, once.

    Args:
        symplectic_adjoint: the solver class.
    """
    module: Any = adjoint_module()
    if module in _replaced:
        return
    original: Any = module.OdeintAdjointMethod
    parameters = inspect.signature(original.forward)

    def apply(*args: Any) -> Any:
        given = parameters.bind(None, *args).arguments
        method, adjoint_method = solver_table().get(given["method"]), solver_table().get(given["adjoint_method"])
        ours = [m for m in (method, adjoint_method) if isinstance(m, type) and issubclass(m, symplectic_adjoint)]
        return _solve(given, ours[0], method) if ours else original.apply(*args)

    _replaced[module] = original
    module.OdeintAdjointMethod = type(
        original.__name__, (original,), {"apply": staticmethod(apply), "__module__": original.__module__}
    )


def uninstall() -> None:
    """Put torchdiffeq's own class back."""
    while _replaced:
        module, original = _replaced.popitem()
        module.OdeintAdjointMethod = original  # type: ignore[attr-defined]


def _solve(given: dict[str, Any], symplectic_adjoint: Any, method: Any) -> Any:
    """Solve by the symplectic adjoint method, with the arguments that `odeint_adjoint` has normalised.

    Raises:
        ValueError: if the adjoint method names another base solver than the one that solves.
    """
    # torchdiffeq asks for adjoint_options beside options when the two methods differ; ours may be in either.
    options = {key: value for key, value in given["adjoint_options"].items() if key in _OWN_OPTIONS}
    options |= given["options"]
    if method is not symplectic_adjoint:  # then it is the adjoint method
        if symplectic_adjoint.solver not in (None, given["method"]):
            raise ValueError(
                f"symplectic_adjoint: adjoint_method={given['adjoint_method']!r} names another solver than "
                f"method={given['method']!r}, but an exact gradient needs the partner of the one that solves: "
                'use adjoint_method="symplectic_adjoint"'
            )
        options["solver"] = given["method"]
    elif given["adjoint_method"] != given["method"] and given["adjoint_method"] not in _names(symplectic_adjoint):
        warnings.warn(
            f"symplectic_adjoint: adjoint_method={given['adjoint_method']!r} is not used, since "
            f"method={given['method']!r} has its own, exact one. Leave adjoint_method out.",
            stacklevel=4,
        )
    params = tuple(given.get("adjoint_params", ()))
    options["adjoint_params"] = (*params, *options.get("adjoint_params", ()))
    # odeint_adjoint gives gradients to func's parameters or, if it is told, to adjoint_params and nothing else.
    options["only_adjoint_params"] = not _are_the_default(params, given["func"])
    solver = symplectic_adjoint(func=given["func"], y0=given["y0"], rtol=given["rtol"], atol=given["atol"], **options)
    t, silent = given["t"], [x for x in (given["t"], *params) if x.requires_grad]
    if given["event_fn"] is None:
        solution = solver.integrate(t)
        return _with_zeros(solution, [x for x in silent if id(x) not in solver.reached])
    event_t, solution = solver.integrate_until_event(t[0], given["event_fn"])
    y0 = [given["y0"]] if given["y0"].requires_grad else []
    return _with_zeros(event_t, [*y0, *silent]), _with_zeros(
        solution, [x for x in silent if id(x) not in solver.reached]
    )


def _with_zeros(value: Tensor, inputs: list[Tensor]) -> Tensor:
    """Return a value that has gradients of zeros in further inputs, as `odeint_adjoint` has for all its parameters.

    Programs rely on that: DistributedDataParallel waits for a gradient of each parameter.
    """
    return _WithZeros.apply(value, *inputs) if inputs and torch.is_grad_enabled() else value


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def _names(symplectic_adjoint: type) -> set[str]:
    """Return the names under which the solver class and its relatives are registered."""
    family = symplectic_adjoint.__mro__[-2]
    return {name for name, solver in solver_table().items() if isinstance(solver, type) and issubclass(solver, family)}


def _are_the_default(params: tuple[Tensor, ...], func: Any) -> bool:
    """Return whether tensors are those that `odeint_adjoint` takes by default: the parameters of the user's module."""
    func = _users(func)
    if not isinstance(func, torch.nn.Module):
        return False
    default = [p for p in adjoint_module().find_parameters(func) if p.requires_grad]
    return len(default) == len(params) and all(p is q for p, q in zip(default, params, strict=True))


def _users(func: Any) -> Any:
    """Return the user's vector field, without torchdiffeq's wrappers."""
    while is_wrapper(func):
        func = func.base_func
    return func


def refuse_continuous(func: Any) -> None:
    """Refuse to be the solver of torchdiffeq's continuous adjoint.

    Raises:
        RuntimeError: if func is its augmented system: somebody holds torchdiffeq's own `OdeintAdjointMethod`.
    """
    if getattr(_users(func), "__qualname__", "").startswith("OdeintAdjointMethod.backward."):
        raise RuntimeError(
            "symplectic_adjoint: called to integrate torchdiffeq's continuous adjoint, whose gradient is not exact. "
            "Use torchdiffeq.odeint, or odeint_adjoint after symplectic_plugin.register()."
        )
