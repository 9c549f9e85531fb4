"""torchdyn's choice of the first step size, kept out of gradients.

torchdyn's loops call `init_step`, which evaluates f at the start and differentiates through what it makes of it. It is
handed the solver's `order` and the slope at the start, so a solver with an adjoint tells who it is by its order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ._compat import odeint_module

_replaced: dict[ModuleType, Any] = {}


class SolverOrder(int):
    """A solver's order, which knows whose it is."""

    solver: Any

    @classmethod
    def of(cls, order: int, solver: Any) -> SolverOrder:
        """The order of this solver."""
        result = cls(order)
        result.solver = solver
        return result


def install() -> None:
    """Have torchdyn's loops take the first step size as a constant where the solver is ours."""
    module: Any = odeint_module()
    if module in _replaced:
        return
    original = module.init_step

    def init_step(f: Any, f0: Any, x0: Any, t0: Any, order: int, *tolerances: Any) -> Any:
        if not isinstance(order, SolverOrder):
            return original(f, f0, x0, t0, order, *tolerances)
        order.solver.solve.note_slope_at_start(f0, x0)
        with torch.no_grad():
            return original(f, f0, x0, t0, int(order), *tolerances)

    _replaced[module] = original
    module.init_step = init_step


def uninstall() -> None:
    """Put torchdyn's own function back."""
    while _replaced:
        module, original = _replaced.popitem()
        module.init_step = original  # type: ignore[attr-defined]
