"""torchdyn's solvers with an exact gradient: entries of its tables, and a copy of any solver that has one."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...record.store import CheckpointStore
from . import step_sizes
from ._compat import MS_SOLVER_DICT, SOLVER_DICT, ImplicitEuler, ParallelImplicitEuler
from .implicit import METHODS, ImplicitSolver
from .implicit_steps import ImplicitAdjointSteps
from .solve import NAME, Solve
from .steps import AdjointSteps


class SymplecticAdjoint:
    """The entry "symplectic_adjoint" of torchdyn's SOLVER_DICT: tsit5, `NeuralODE`'s default, with an exact gradient.

    torchdyn calls the entry with a dtype, as its own solver classes, to make a solver: `str_to_solver(name, dtype)`. To
    give options, make the solver yourself: `SOLVER_DICT["symplectic_adjoint:dopri5"](checkpoint="steps")`.

    Args:
        dtype: of the state.
        checkpoint, memory_budget, offload, compile, adjoint_params: as for torchdiffeq.
        **options: the solver's own: for an implicit one, those of `ImplicitSolver`.
    """

    solver: ClassVar[str] = "tsit5"

    def __new__(
        cls,
        dtype: torch.dtype = torch.float32,
        *,
        checkpoint: str | None = None,
        memory_budget: int | None = None,
        offload: str | os.PathLike[str] | None = None,
        compile: bool | str | Mapping[str, Any] = False,
        adjoint_params: Iterable[Tensor] = (),
        **options: Any,
    ) -> Any:
        base: Any = SOLVER_DICT[cls.solver]
        solver = _implicit_euler(dtype, **options) if base is ImplicitEuler else base(dtype, **options)
        result = with_adjoint(solver, adjoint_params)
        CheckpointStore(checkpoint, memory_budget)  # refuses what is no policy or no budget
        result.checkpoint, result.memory_budget, result.offload = checkpoint, memory_budget, offload
        result.compile = compile
        return result

    @classmethod
    def variants(cls, name: str, registry: Mapping[str, Any]) -> dict[str, Any]:
        """The implicit methods that torchdyn does not have; and this class with its base solver in its name, for each
        that there is: "symplectic_adjoint:rk4" and so on."""
        added = {base: functools.partial(ImplicitSolver, base) for base in METHODS if base not in registry}
        return added | {
            f"{name}:{base}": type(f"{cls.__name__}_{base}", (cls,), {"solver": base, "__doc__": cls.__doc__})
            for base in (*registry, *added)
        }

    @classmethod
    def install(cls) -> None:
        """Keep torchdyn's choice of the first step size out of gradients; offer multiple shooting with our steps."""
        step_sizes.install()
        for name, solver in list(MS_SOLVER_DICT.items()):
            MS_SOLVER_DICT.setdefault(f"{NAME}:{name}", functools.partial(_shooting_with_adjoint, solver))

    @classmethod
    def uninstall(cls) -> None:
        """Undo `install`."""
        step_sizes.uninstall()
        for name in [name for name in MS_SOLVER_DICT if name.startswith(f"{NAME}:")]:
            del MS_SOLVER_DICT[name]


def _shooting_with_adjoint(solver: Callable[[], Any]) -> Any:
    return with_adjoint(solver())


_implicit_euler = functools.partial(ImplicitSolver, "implicit_euler")


def with_adjoint(solver: Any, params: Iterable[Tensor] = ()) -> Any:
    """A solver of torchdyn's, or one with its interface, that does the same and has an exact gradient.

    Args:
        solver: an instance; it is copied, its parameters (a hypersolver's network) are shared.
        params: tensors that the vector field depends on, in addition to those that are found.

    Raises:
        ValueError: if its step can't be differentiated.
    """
    if isinstance(solver, AdjointSteps):
        return solver
    if isinstance(solver, ImplicitEuler):
        # torchdyn's minimises a residual and returns the result as a new leaf: its step has no gradient.
        solver = _implicit_euler(solver.dtype)
    if isinstance(solver, ParallelImplicitEuler):
        raise ValueError(
            f"{NAME}: torchdyn's {type(solver).__name__} minimises a residual and returns the result as a new leaf, "
            "so its step has no gradient (sensitivity='autograd' silently gives none either). Use another solver."
        )
    result = copy.copy(solver)
    if hasattr(solver, "coarse_method"):  # multiple shooting: a solver made of two
        result._modules = dict(solver._modules)
        result.coarse_method = with_adjoint(solver.coarse_method, params)
        result.fine_method = with_adjoint(solver.fine_method, params)
        return result
    base: Any = type(solver)
    result.__class__ = _adjoint_class(base)
    result.params = tuple(params)
    result.begin()
    return result


@functools.cache
def _adjoint_class(base: Any) -> type:
    steps = ImplicitAdjointSteps if issubclass(base, ImplicitSolver) else AdjointSteps
    attributes = {"__module__": base.__module__, "base": base, "restored": staticmethod(_restored)}
    return type(base.__name__, (steps, base), attributes)


def _restored(base: Any) -> Any:
    result = base.__new__(_adjoint_class(base))
    result.__dict__["solve"] = Solve()
    return result
