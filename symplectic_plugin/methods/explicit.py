"""The explicit Runge-Kutta step: its stages, its slopes and what it adds to the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .tableau import ButcherTableau

Slope = TypeVar("Slope", Tensor, Tensor | None)


def weighted_sum(
    start: Tensor | None, weights: Sequence[float], slopes: Sequence[Tensor | None], h: float | Tensor
) -> Tensor:
    """Compute x + h sum_j w_j k_j, with a graph where the operands have one.

    Args:
        start: x, any shape; None for zero.
        weights: w, at least one for each slope.
        slopes: k, in the shape of x; None is allowed where the weight is zero. At least one if `start` is None.
        h: step size, a number or, where it has a history, a scalar tensor.

    Returns:
        The sum; `start` itself if every weight is zero.
    """
    result = start
    for weight, slope in zip(weights, slopes, strict=False):
        if weight == 0:
            continue
        assert slope is not None
        if isinstance(h, Tensor):
            term = slope * (h * weight).to(slope.dtype)
            result = term if result is None else result + term
        else:
            result = slope * (h * weight) if result is None else torch.add(result, slope, alpha=h * weight)
    if result is None:
        assert slopes[0] is not None
        return slopes[0] * 0
    return result


def explicit_step(
    tableau: ButcherTableau,
    slope_at: Callable[[int, Tensor], Slope],
    start: Tensor,
    h: float | Tensor,
    first_slope: Slope | None = None,
) -> list[Slope]:
    """Evaluate the slopes of an explicit Runge-Kutta step (Hairer, Norsett, Wanner, Solving ODEs I, II.1.8).

    Args:
        tableau: the method's coefficients, explicit.
        slope_at: `slope_at(i, X_i)` returns k_i = f(t_n + c_i h, X_i); None is allowed where no later stage uses k_i.
        start: x_n, any shape.
        h: step size.
        first_slope: k_1, if it is known; otherwise it is evaluated.

    Returns:
        k_1, ..., k_s. The step ends in `weighted_sum(start, b, slopes, h)`.
    """
    slopes: list[Slope] = [] if first_slope is None else [first_slope]
    for i, row in enumerate(tableau.numbers[0]):
        if i >= len(slopes):
            slopes.append(slope_at(i, weighted_sum(start, row, slopes, h)))
    return slopes
