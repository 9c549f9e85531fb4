"""torchdiffeq's adaptive step where nothing is to be differentiated: the same to the last bit, in fewer calls."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau


class PreparedTableau(_ButcherTableau):
    """A solver's tableau, as it holds it, with what a step makes of it anew each time.

    Attributes:
        weights: the rows of beta, one after the other.
        lengths: theirs.
        at_end: whether each of those is at the step's end.
        last_is_end: whether the last one is the solution.
    """

    weights: Tensor
    lengths: list[int]
    at_end: list[bool]
    last_is_end: bool

    @classmethod
    def of(cls, tableau: Any) -> PreparedTableau:
        """The same tableau, prepared."""
        result = cls(*tableau)
        result.weights = torch.cat(list(tableau.beta))
        result.lengths = [len(row) for row in tableau.beta]
        result.at_end = (tableau.alpha == 1).tolist()
        result.last_is_end = bool(tableau.c_sol[-1] == 0 and (tableau.c_sol[:-1] == tableau.beta[-1]).all())
        return result


def runge_kutta_step(
    func: Callable[..., Tensor], y0: Tensor, f0: Tensor, t0: Tensor, dt: Tensor, t1: Tensor, tableau: PreparedTableau
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchdiffeq's `_runge_kutta_step`.

    The sums over slopes are its own, on slopes laid out as it lays them out: the error estimate is a small difference
    of them, so that with another order of summation other steps would be accepted.
    """
    dtype = y0.abs().dtype
    t0, dt, t1 = t0.to(dtype), dt.to(dtype), t1.to(dtype)
    k = torch.empty(*f0.shape, len(tableau.at_end) + 1, dtype=y0.dtype, device=y0.device)
    columns = k.unbind(-1)
    columns[0].copy_(f0)
    times, weights = (t0 + tableau.alpha * dt).unbind(), (tableau.weights * dt).split(tableau.lengths)
    yi = y0
    for i, is_at_end in enumerate(tableau.at_end):
        yi = y0 + torch.sum(k.narrow(-1, 0, i + 1) * weights[i], dim=-1)
        # At the end as seen from before it, in case of a discontinuity there.
        f = func(t1, yi, perturb=Perturb.PREV) if is_at_end else func(times[i], yi, perturb=Perturb.NONE)
        columns[i + 1].copy_(f)
    if not tableau.last_is_end:
        yi = y0 + torch.sum(k * (dt * tableau.c_sol), dim=-1)
    return yi, k[..., -1], torch.sum(k * (dt * tableau.c_error), dim=-1), k


@functools.cache
def adaptive_step() -> Callable[[Any, Any], Any]:
    """torchdiffeq's `_adaptive_step`, its step control, with that step in it, for solvers with a prepared tableau."""
    step: Any = RKAdaptiveStepsizeODESolver._adaptive_step
    names = {**step.__globals__, "_runge_kutta_step": runge_kutta_step}
    return types.FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
