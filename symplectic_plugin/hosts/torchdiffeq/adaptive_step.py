"""torchdiffeq's adaptive step where nothing is differentiated: the same values to the last bit, in fewer calls."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._compat import Perturb, RKAdaptiveStepsizeODESolver, _ButcherTableau
from .recorded_function import RecordedFunction


class PreparedTableau(_ButcherTableau):
    """A solver's tableau in torchdiffeq's layout, with everything that a step would compute from it each time.

    Attributes:
        weights: rows of beta, one after the other.
        lengths: lengths of the rows.
        perturbs: for each stage, how its time is moved: at the step's end to before it, in case of a jump there.
        last_is_end: whether the last stage is the solution.
    """

    weights: Tensor
    lengths: list[int]
    perturbs: list[Perturb]
    last_is_end: bool

    @classmethod
    def of(cls, tableau: Any) -> PreparedTableau:
        """Prepare a tableau."""
        result = cls(*tableau)
        result.weights = torch.cat(list(tableau.beta))
        result.lengths = [len(row) for row in tableau.beta]
        result.perturbs = [Perturb.PREV if alpha == 1 else Perturb.NONE for alpha in tableau.alpha]
        result.last_is_end = bool(tableau.c_sol[-1] == 0 and (tableau.c_sol[:-1] == tableau.beta[-1]).all())
        return result


def runge_kutta_step(
    func: Callable[..., Tensor], y0: Tensor, f0: Tensor, t0: Tensor, dt: Tensor, t1: Tensor, tableau: PreparedTableau
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take an explicit step as torchdiffeq's `_runge_kutta_step` does, with its arguments and results.

    The sums over slopes are its own, on slopes laid out as it lays them out: the error estimate is a small difference
    of them, so that with another order of summation other steps would be accepted.
    """
    dtype = y0.abs().dtype
    t0, dt, t1 = t0.to(dtype), dt.to(dtype), t1.to(dtype)
    k = torch.empty(*f0.shape, len(tableau.perturbs) + 1, dtype=y0.dtype, device=y0.device)
    columns = k.unbind(-1)
    columns[0].copy_(f0)
    times, weights = (t0 + tableau.alpha * dt).unbind(), (tableau.weights * dt).split(tableau.lengths)
    perturbs = tableau.perturbs
    times = [t1 if of is Perturb.PREV else t for t, of in zip(times, perturbs, strict=True)]
    if isinstance(func, RecordedFunction):
        func.begin_step(y0, f0, dt)
    yi = y0
    for i, (t, perturb) in enumerate(zip(times, perturbs, strict=True)):
        yi = y0 + torch.sum(k.narrow(-1, 0, i + 1) * weights[i], dim=-1)
        columns[i + 1].copy_(func(t, yi, perturb=perturb))
    if not tableau.last_is_end:
        yi = y0 + torch.sum(k * (dt * tableau.c_sol), dim=-1)
    return yi, k[..., -1], torch.sum(k * (dt * tableau.c_error), dim=-1), k


@functools.cache
def adaptive_step() -> Callable[[Any, Any], Any]:
    """Return torchdiffeq's `_adaptive_step`, its step control, around `runge_kutta_step`, for prepared tableaus."""
    step: Any = RKAdaptiveStepsizeODESolver._adaptive_step
    names = {**step.__globals__, "_runge_kutta_step": runge_kutta_step}
    return types.FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
