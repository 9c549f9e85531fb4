"""Reading a Butcher tableau off a step function.

The stages of a Runge-Kutta method are linear in the slopes. One step of size 1 from x = 0 at t = 0, with an f that
answers its i-th call with the i-th unit vector, therefore shows row i of `a` as the argument of call i, c_i as its
time, and `b` as the step's result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tableau import ROUNDING, ButcherTableau

StepFunction = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]
"""`step(f, t, x, h)` returns the solution at t + h of dx/dt = f(t, x) from x at t."""

_TRIALS = 5
"""Further steps that check the tableau: a two-step method changes its coefficients from the second step on."""
_CALL_COUNT = "evaluates f a different number of times from call to call"


class _Call(NamedTuple):
    """Arguments of one call of f: time (float64 scalar), state, keyword arguments."""

    t: Tensor
    x: Tensor
    keywords: dict[str, Any]


def read_tableau(step: StepFunction, rounding: float = ROUNDING) -> ButcherTableau:
    """Read the tableau of an explicit Runge-Kutta method off its step function.

    Args:
        step: `step(f, t, x, h)` returns the solution at t + h of dx/dt = f(t, x) from x at t. `t` and `h` are float64
            scalars, `x` is a float64 vector. `f(t, x, **anything)` may be called any number of times.
        rounding: relative rounding error of the method's coefficients.

    Returns:
        An explicit tableau.

    Raises:
        ValueError: if the step is not an explicit Runge-Kutta step: it is not linear in the slopes, or its
            coefficients change from call to call (a multistep method), or with h or the slopes (an iteration).
    """
    return probe(step, rounding)[0]


def probe(step: StepFunction, rounding: float = ROUNDING) -> tuple[ButcherTableau, list[dict[str, Any]]]:
    """Read a tableau as `read_tableau` does, and the keyword arguments that the step hands to f at each stage.

    Args:
        step: step function, as for `read_tableau`.
        rounding: relative rounding error of the method's coefficients.

    Returns:
        The tableau, and the keyword arguments by stage.

    Raises:
        ValueError: if the step is not an explicit Runge-Kutta step.
    """
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    stages = len(_take(step, lambda i, x: torch.zeros_like(x), zero[0], zero, one)[1])
    _require(stages > 0, "does not evaluate f")
    unit = torch.eye(stages, dtype=torch.float64)
    b, calls = _take(step, _slopes_in_turn(unit), zero[0], torch.zeros_like(unit[0]), one)
    _require(len(calls) == stages, _CALL_COUNT)
    a, c = torch.stack([call.x for call in calls]), torch.stack([call.t for call in calls])
    _require(not a.triu().any(), "has a stage that moves without a slope to move it")
    try:
        tableau = ButcherTableau(a, b, c, rounding)
    except ValueError as error:
        raise ValueError(f"read_tableau: not an explicit Runge-Kutta step: {error}") from None
    _require_linear(step, tableau)
    return tableau, [call.keywords for call in calls]


def read_rounded_tableau(step: StepFunction, stages: int, t: Tensor, h: Tensor, dtype: torch.dtype) -> ButcherTableau:
    """Read the coefficients that one given step of a method uses after rounding, where the step mixes precisions.

    Args:
        step: step function, as for `read_tableau`.
        stages: number of the method's stages.
        t: time at the step's start.
        h: size of the step, in the dtype that the step is given.
        dtype: dtype of the state, real.

    Returns:
        An explicit tableau, whose row sums are not checked.
    """
    unit = torch.eye(stages, dtype=dtype)
    end, calls = _take(step, _slopes_in_turn(unit), t, torch.zeros(stages, dtype=dtype), h)
    size = h.double().reshape(())
    a = torch.stack([call.x.double() for call in calls]) / size
    c = (torch.stack([call.t for call in calls]) - t.double().reshape(())) / size
    return ButcherTableau(a, end.double() / size, c, rounding=float("inf"))


def _require_linear(step: StepFunction, tableau: ButcherTableau) -> None:
    """Check on consecutive steps with random slopes, states and sizes that the tableau describes each of them.

    A multistep method changes its coefficients once it has a history, an iteration to convergence depends on the
    slopes, a hypersolver on the state.

    Raises:
        ValueError: if a step differs from that of the tableau.
    """
    a, b, c, stages = tableau.a, tableau.b, tableau.c, tableau.stages
    generator = torch.Generator().manual_seed(0)
    for _ in range(_TRIALS):
        k = torch.randn(stages, 3, dtype=torch.float64, generator=generator)
        x = torch.randn(3, dtype=torch.float64, generator=generator)
        t, h = torch.rand(2, dtype=torch.float64, generator=generator).unbind()
        end, calls = _take(step, _slopes_in_turn(k), t, x, h)
        _require(len(calls) == stages, _CALL_COUNT)
        actual = [call.x for call in calls] + [end]
        wanted = [x + h * (row @ k) for row in (*a, b)]
        linear = all(torch.allclose(*pair, rtol=1e-10, atol=1e-10) for pair in zip(actual, wanted, strict=True))
        _require(linear, "is not one fixed linear map of the slopes")
        times = torch.stack([call.t for call in calls])
        _require(torch.allclose(times, t + c * h, rtol=1e-10, atol=1e-10), "has stage times that change")


def _slopes_in_turn(slopes: Tensor) -> Callable[[int, Tensor], Tensor]:
    """Return a function of a call's number and state that answers with that row of the slopes."""

    def slope(i: int, x: Tensor) -> Tensor:
        _require(i < len(slopes), _CALL_COUNT)
        return slopes[i].clone()

    return slope


def _take(
    step: StepFunction, slope: Callable[[int, Tensor], Tensor], t: Tensor, x: Tensor, h: Tensor
) -> tuple[Tensor, list[_Call]]:
    """Take a step of size h from x at t whose i-th slope is `slope(i, X_i)`; returns the end and the calls of f."""
    calls: list[_Call] = []

    def f(t: Tensor, x: Tensor, **keywords: Any) -> Tensor:
        calls.append(_Call(torch.as_tensor(t, dtype=torch.float64).detach().reshape(()), x.detach().clone(), keywords))
        return slope(len(calls) - 1, x)

    with torch.no_grad():
        end = step(f, t, x, h)
    return end.detach(), calls


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"read_tableau: not an explicit Runge-Kutta step: it {what}")
