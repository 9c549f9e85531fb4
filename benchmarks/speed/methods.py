"""The rows of the table: every way to get a gradient, by the name that the table gives it.

What a row needs is imported when its pass is built, so that a package that is missing, or that fails, leaves out its
own rows only.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torchdiffeq
from torch import Tensor

import symplectic_plugin
from benchmarks.experiments.checkpointing import odeint_checkpoint_per_step
from benchmarks.experiments.methods import Solver
from benchmarks.speed.bare import BareCalls, Calls
from benchmarks.speed.passes import Pass, TorchPass, counted, reported
from benchmarks.speed.problems import FIRST_STEP, STEPS, TOLERANCE, Field

UNLIMITED = 10**15  # bytes
BACKPROPAGATION = "torchdiffeq, backpropagation"
TORCHDYN = "torchdyn, autograd"
DIFFRAX = "diffrax, RecursiveCheckpointAdjoint"
INDUCTOR = {"cpp_wrapper": True, "cpp.use_decompose_tanh": True}
"""Options of torch.compile's that help small networks on a CPU: less Python a call; tanh by way of exp."""
ITSELF = "itself"  # backpropagation through its own solve, with its own choice of steps


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        build: its pass, for a vector field, an initial state and a solver.
        reference: the row whose gradient belongs to the same discrete solution, by solver; "" if there is none to be
            compared with.
        exact: whether its gradient is that one's, to rounding.
        packages: to import; of PyPI, all by the same names.
    """

    build: Callable[[Field, Tensor, Solver], Pass]
    reference: dict[str, str]
    exact: bool = True
    packages: tuple[str, ...] = ()


def _times(y0: Tensor, count: int = 2) -> Tensor:
    return torch.linspace(0, 1, count, dtype=y0.dtype, device=y0.device)


# Bare calls


def evaluations(field: Field, y0: Tensor, solver: Solver) -> int:
    """Of torchdiffeq's forward pass."""
    with torch.no_grad(), counted(True) as calls:
        _solve(torchdiffeq.odeint, field, y0, solver)
        return calls()


def _kept(field: Field, y0: Tensor, solver: Solver) -> Pass:
    return BareCalls(field, y0, Calls(kept=evaluations(field, y0, solver)))


def _again(field: Field, y0: Tensor, solver: Solver) -> Pass:
    count = evaluations(field, y0, solver)
    return BareCalls(field, y0, Calls(plain=count, again=count))


def _again_for_each_step(field: Field, y0: Tensor, solver: Solver) -> Pass:
    """As many calls of each kind as the policy makes."""
    with symplectic_plugin.profile() as solves:
        _flag({"checkpoint": "steps"})(field, y0, solver).run()
    (solve,) = solves
    calls = Calls(plain=solve.evaluations, again_plain=solve.recomputed - solve.vjps, again=solve.vjps)
    return BareCalls(field, y0, calls)


# torchdiffeq


def _solve(odeint: Callable[..., Any], field: Field, y: Tensor, solver: Solver, **changes: Any) -> Tensor:
    given = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol, "options": solver.options, **changes}
    return odeint(field, y, _times(y), **given)[-1]


def _torchdiffeq(odeint: Callable[..., Any]) -> Callable[..., Pass]:
    return lambda field, y0, solver: TorchPass(field, y0, lambda y: _solve(odeint, field, y, solver))


def _flag(own: dict[str, Any]) -> Callable[..., Pass]:
    def build(field: Field, y0: Tensor, solver: Solver) -> Pass:
        method, options = f"symplectic_adjoint:{solver.method}", {**solver.options, **own}
        result = TorchPass(
            field, y0, lambda y: _solve(torchdiffeq.odeint, field, y, solver, method=method, options=options)
        )
        result.counter = reported if "compile" in own else counted
        return result

    return build


# torchdyn


def torchdyn(sensitivity: str, *, first_step_is_constant: bool = False) -> Callable[..., Pass]:
    """A NeuralODE's pass. With `first_step_is_constant`, the choice of the first step has no part in the gradient, as
    that of the others has none, and as torchdyn's has none with a sensitivity that is not backpropagation."""

    def build(field: Field, y0: Tensor, solver: Solver) -> Pass:
        from torchdyn.core import NeuralODE

        t_span = _times(y0, STEPS + 1 if solver.method == "rk4" else 2)
        names = () if solver.method == "rk4" else ("atol", "rtol", "atol_adjoint", "rtol_adjoint")
        tolerances = dict.fromkeys(names, TOLERANCE)
        model = NeuralODE(field, solver=solver.method, sensitivity=sensitivity, return_t_eval=False, **tolerances)
        module: Any = sys.modules["torchdyn.numerics.odeint"]

        def solve(y: Tensor) -> Tensor:
            constant = mock.patch.object(module, "init_step", torch.no_grad()(module.init_step))
            with constant if first_step_is_constant else contextlib.nullcontext():
                return model(y, t_span)[-1]

        return TorchPass(field, y0, solve)

    return build


# TorchDiffEqPack


def _aca(field: Field, y0: Tensor, solver: Solver) -> Pass:
    """The package's, or the reference implementation where it fails."""
    import TorchDiffEqPack

    def options() -> dict[str, Any]:  # anew for each solve, which changes them
        size = {"rk4": 1 / STEPS, "dopri5": FIRST_STEP}[solver.method]
        return {
            "method": {"rk4": "RK4", "dopri5": "Dopri5"}[solver.method], "h": size, "t0": 0.0, "t1": 1.0,
            "rtol": TOLERANCE, "atol": TOLERANCE, "print_neval": False, "neval_max": 10**9, "t_eval": None,
        }  # fmt: skip

    package = TorchPass(field, y0, lambda y: TorchDiffEqPack.odesolve_adjoint(field, y, options()))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            package.run()
    except Exception as error:
        reference = TorchPass(field, y0, lambda y: _solve(odeint_checkpoint_per_step, field, y, solver))
        reference.note = f"TorchDiffEqPack raises {type(error).__name__}: {error}; a reference implementation instead"
        return reference
    return package


# torchode


def _torchode(field: Field, y0: Tensor, solver: Solver) -> Pass:
    from benchmarks.speed.with_torchode import build

    return build(field, y0, solver)


# diffrax


def _diffrax(adjoint: str) -> Callable[..., Pass]:
    def build(field: Field, y0: Tensor, solver: Solver) -> Pass:
        from benchmarks.speed.with_diffrax import DiffraxPass

        return DiffraxPass(field, y0, solver, adjoint)

    return build


_SAME = dict.fromkeys(("rk4", "dopri5"), BACKPROPAGATION)
_OF_TORCHDYN = dict.fromkeys(("rk4", "dopri5"), TORCHDYN)
_NONE = dict.fromkeys(("rk4", "dopri5"), "")
_FIXED = {"rk4": BACKPROPAGATION, "dopri5": ITSELF}

METHODS = {
    "bare calls, graphs kept (2N)": Method(_kept, _NONE),
    "bare calls, graphs made again (3N)": Method(_again, _NONE),
    "bare calls, steps' stages again (4N)": Method(_again_for_each_step, _NONE),
    BACKPROPAGATION: Method(_torchdiffeq(torchdiffeq.odeint), _SAME),
    "torchdiffeq, odeint_adjoint": Method(_torchdiffeq(torchdiffeq.odeint_adjoint), _SAME, exact=False),
    TORCHDYN: Method(torchdyn("autograd"), _OF_TORCHDYN, exact=False, packages=("torchdyn",)),
    "torchdyn, adjoint": Method(torchdyn("adjoint"), _OF_TORCHDYN, exact=False, packages=("torchdyn",)),
    "torchdyn, interpolated_adjoint": Method(
        torchdyn("interpolated_adjoint"), _OF_TORCHDYN, exact=False, packages=("torchdyn",)
    ),
    "ours, default": Method(_flag({}), _SAME),
    "ours, unlimited memory_budget": Method(_flag({"memory_budget": UNLIMITED}), _SAME),
    'ours, "stages"': Method(_flag({"checkpoint": "stages"}), _SAME),
    'ours, "steps"': Method(_flag({"checkpoint": "steps"}), _SAME),
    'ours, "binomial"': Method(_flag({"checkpoint": "binomial"}), _SAME),
    "ours, compiled": Method(_flag({"compile": True}), _SAME),
    "ours, compiled with options": Method(_flag({"compile": {"options": INDUCTOR}}), _SAME),
    "ours in torchdyn, default": Method(torchdyn("symplectic_adjoint"), _OF_TORCHDYN, packages=("torchdyn",)),
    "ACA, TorchDiffEqPack": Method(_aca, _FIXED, packages=("TorchDiffEqPack",)),
    "torchode": Method(_torchode, _FIXED, packages=("torchode",)),
    DIFFRAX: Method(_diffrax("RecursiveCheckpointAdjoint"), _FIXED, packages=("diffrax", "jax")),
    "diffrax, BacksolveAdjoint": Method(
        _diffrax("BacksolveAdjoint"),
        {"rk4": BACKPROPAGATION, "dopri5": DIFFRAX},
        exact=False,
        packages=("diffrax", "jax"),
    ),
}


def reference_pass(method: Method, field: Field, y0: Tensor, solver: Solver) -> Pass | None:
    """Build the pass that a row's gradient is compared with: None for torchdiffeq's backpropagation or its own."""
    build = {TORCHDYN: torchdyn("autograd", first_step_is_constant=True), DIFFRAX: METHODS[DIFFRAX].build}.get(
        method.reference[solver.method]
    )
    return build(field, y0, solver) if build else None
