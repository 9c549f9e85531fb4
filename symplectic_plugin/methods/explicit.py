"""The arithmetic of a Runge-Kutta step and of its partner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def combined(start: Tensor | None, weights: Sequence[float], slopes: Sequence[Any], h: float) -> Tensor:
    """x + h sum_j w_j k_j, over the slopes that are there, in any shape, with a graph if they have one.

    Args:
        start: x; None for zero.
        weights: w, one for each slope at least.
        slopes: k, None where the weight is zero; one at least if there is no x.
        h: the step's size.

    Returns:
        The sum; `start` itself if there is nothing to be added to it.
    """
    result = start
    for weight, slope in zip(weights, slopes, strict=False):
        if weight != 0:
            result = slope * (h * weight) if result is None else torch.add(result, slope, alpha=h * weight)
    return slopes[0] * 0 if result is None else result
