"""The solver class that torchdiffeq's SOLVERS holds: one of torchdiffeq's own solvers, with an exact gradient."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...adjoint.function import Inputs, attach
from ...adjoint.live_solution import live_solution
from ...field._torch_compat import saved_tensor_hooks_are_active
from ...field.compiled import CompiledFunction, not_compiled
from ...field.report import new_report
from ...field.vector_field import VectorField
from ...field.witness import refuse_transforms
from ...record.storage import storage
from ...record.store import CheckpointStore
from . import implicit, odeint_adjoint
from ._compat import is_wrapper, solver_table
from .methods import base_solver, callbacks_of, is_one_step
from .recorded_function import RecordedFunction
from .recorded_solver import recorded_solver
from .times import TimesFromGrid, TimesFromStart
from .unperturbed import Unperturbed


def _compile_user_function(func: Any, how: bool | str | Mapping[str, Any]) -> tuple[Any, CompiledFunction]:
    """Compile the user's function inside torchdiffeq's wrappers.

    The wrappers are created per solve, so compiling them would recompile each time.

    Returns:
        (func, compiled)
    """
    if not is_wrapper(func):
        compiled = CompiledFunction(func, how)
        return compiled, compiled
    wrapper = func
    while is_wrapper(wrapper.base_func):
        wrapper = wrapper.base_func
    compiled = CompiledFunction(wrapper.base_func, how)
    del wrapper.base_func  # a module's place takes no function
    wrapper.base_func = compiled
    return func, compiled


class SymplecticAdjoint:
    """A base solver of torchdiffeq's, its gradient computed by the symplectic adjoint method.

    Args:
        func: the vector field, as torchdiffeq wraps it.
        y0: initial state, any shape, floating point or complex.
        rtol, atol: tolerances, for the base solver.
        solver: name of the base solver in SOLVERS; dopri5 by default, as in torchdiffeq.
        checkpoint: what to keep for the backward pass: "auto", "stages", "steps" or "binomial".
        memory_budget: bytes, for the solve and its backward pass.
        offload: where to keep states: "cpu", or a directory.
        compile: whether to have torch.compile compile func: True, a mode, or a dictionary of its arguments.
        adjoint_params: tensors that func depends on, in addition to those that are found.
        only_adjoint_params: whether no other tensor is to have a gradient.
        **options: the base solver's.

    Raises:
        ValueError: if there is no such base solver, it is not a one-step Runge-Kutta method, or an option would lose
            a gradient.
    """

    solver: ClassVar[str | None] = None

    def __init__(
        self,
        func: Any,
        y0: Tensor,
        rtol: Any,
        atol: Any,
        solver: str | None = None,
        checkpoint: str | None = None,
        memory_budget: int | None = None,
        offload: str | os.PathLike[str] | None = None,
        compile: bool | str | Mapping[str, Any] = False,
        adjoint_params: Iterable[Tensor] = (),
        only_adjoint_params: bool = False,
        **options: Any,
    ) -> None:
        if self.solver is not None and solver not in (None, self.solver):
            raise ValueError(
                f'symplectic_adjoint: the method names the base solver "{self.solver}", the options {solver!r}: '
                "give one of them"
            )
        odeint_adjoint.refuse_continuous(func)
        refuse_transforms()
        name = self.solver or solver or "dopri5"
        base = base_solver(name)
        store = CheckpointStore(checkpoint, memory_budget, storage(offload, y0.device))
        adjoint_params = (adjoint_params,) if isinstance(adjoint_params, Tensor) else tuple(adjoint_params)
        if not all(isinstance(tensor, Tensor) for tensor in adjoint_params):
            raise TypeError("symplectic_adjoint: adjoint_params must be tensors")
        for option, value in options.items():
            if isinstance(value, Tensor) and value.requires_grad and option != "step_size":
                raise ValueError(f"symplectic_adjoint: option {option!r} requires a gradient and gets none: detach it")
        compiled: CompiledFunction | None = None
        if compile:
            func, compiled = _compile_user_function(func, compile)
        self.y0 = y0
        report = new_report("torchdiffeq", name, store.policy)
        function = Unperturbed(func)
        self.field = VectorField(function, y0.device, report, adjoint_params, compiled, only=only_adjoint_params)
        recorded = RecordedFunction(self.field, func)
        self.base = recorded_solver(base)(func=recorded, y0=y0.detach(), rtol=rtol, atol=atol, **options)
        self.base.prepare(y0, store)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """Return the names of the callbacks that the base solver calls."""
        table = solver_table()
        bases = table.values() if cls.solver is None else [table[cls.solver]]
        return set().union(*[callbacks_of(base) for base in bases if is_one_step(base)])

    @classmethod
    def variants(cls, name: str, registry: Mapping[str, type]) -> dict[str, type]:
        """Return the implicit methods that torchdiffeq does not have; and this class with its base solver in its name,
        for each that there is: "symplectic_adjoint:rk4" and so on."""
        added = {base: solver for base, solver in implicit.SOLVERS.items() if base not in registry}
        return added | {
            f"{name}:{base}": type(f"{cls.__name__}_{base}", (cls,), {"solver": base, "__doc__": cls.__doc__})
            for base, solver in (*registry.items(), *added.items())
            if is_one_step(solver)
        }

    @classmethod
    def install(cls) -> None:
        """Have torchdiffeq's `odeint_adjoint` come here when it is told to."""
        odeint_adjoint.install(cls)

    @classmethod
    def uninstall(cls) -> None:
        """Undo `install`."""
        odeint_adjoint.uninstall()

    @property
    def reached(self) -> set[int]:
        """Identities of tensors that the solution is certain to depend on, among those that f does."""
        recorder = self.base.func.recorder
        return self.field.seen if recorder is not None and recorder.trajectory.checkpoints else set()

    @not_compiled
    def integrate(self, t: Tensor) -> Tensor:
        """Return the solution at the times t, shape (len(t), *y0.shape)."""
        begin = time.perf_counter()
        recorded = torch.is_grad_enabled()
        times = self._begin(t)
        with torch.no_grad():
            solution = self.base.integrate(t.detach())
        if recorded:
            solution = self._attached(solution, times, self.base.places(self.base.output_times(t.detach())))
        self.field.report.forward_seconds += time.perf_counter() - begin
        return solution

    @not_compiled
    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the time of the event, a constant as in torchdiffeq, and the states at t0 and then, (2, *y0.shape)."""
        begin = time.perf_counter()
        recorded = torch.is_grad_enabled()
        step_size = getattr(self.base, "step_size", None)
        if recorded and isinstance(step_size, Tensor) and step_size.requires_grad:
            raise ValueError("symplectic_adjoint: with an event, option 'step_size' gets no gradient: detach it")
        times = self._begin(t0)
        with torch.no_grad():
            event_t, solution = self.base.integrate_until_event(t0.detach(), event_fn)
        if recorded:
            solution = self._attached(solution, times, self.base.place_of_event(event_t))
        self.field.report.forward_seconds += time.perf_counter() - begin
        return event_t, solution

    def _begin(self, t: Tensor) -> TimesFromStart | TimesFromGrid:
        if saved_tensor_hooks_are_active():
            self.base.store.keep_states_alone()
        times: TimesFromStart | TimesFromGrid = self.base.begin(t, recorded=torch.is_grad_enabled())
        return times

    def _attached(
        self, solution: Tensor, times: TimesFromStart | TimesFromGrid, places: list[tuple[int, float]]
    ) -> Tensor:
        if self.field.left_out:
            warnings.warn(
                f"symplectic_adjoint: func depends on {len(self.field.left_out)} tensors that require gradients and "
                "that adjoint_params leaves out: they get none. Leave adjoint_params away to have them all.",
                stacklevel=5,
            )
        trajectory, live_steps = self.base.finish(places), self.base.recorder.live_prefix()
        if not trajectory.checkpoints:  # one time, or an event that is met at once
            return torch.stack([self.y0] * len(solution))
        inputs = Inputs(self.y0, times.inputs, times)
        if live_steps:
            return live_solution(solution, trajectory, live_steps, self.field, inputs)
        return attach(solution, trajectory, self.field, inputs)
