"""The arithmetic of a Runge-Kutta step and of its partner: sums of slopes, and products of a matrix of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tableau import ButcherTableau


def combined(start: Tensor | None, weights: Sequence[float], slopes: Sequence[Tensor], h: float) -> Tensor:
    """x + h sum_j w_j k_j, over the slopes that are there, in any shape, with a graph if they have one.

    Args:
        start: x; None for zero.
        weights: w, one for each slope at least.
        slopes: k, one at least if there is no x.
        h: the step's size.

    Returns:
        The sum; `start` itself if there is nothing to be added to it.
    """
    result = start
    for weight, slope in zip(weights, slopes, strict=False):
        if weight != 0:
            result = slope * (h * weight) if result is None else torch.add(result, slope, alpha=h * weight)
    return slopes[0] * 0 if result is None else result


class Workspace:
    """The slopes of one step, in one buffer of s states, and what a tableau makes of them.

    Args:
        tableau: the method's, explicit, with s stages.
        like: a flat state, shape (n,).

    Attributes:
        a, b, c: the tableau's coefficients, as numbers.
        rows: a slope a stage, shape (s, n).
        row: the same, as a list.
        later: by stage, the later ones that are made of its slope.
    """

    def __init__(self, tableau: ButcherTableau, like: Tensor) -> None:
        s = self.stages = tableau.stages
        self.a, self.b, self.c = tableau.a.tolist(), tableau.b.tolist(), tableau.c.tolist()
        self.rows = like.new_empty(s, like.numel())
        self.row = list(self.rows.unbind())
        self._matrix = torch.cat([tableau.a, tableau.b[None]]).to(like)
        self._scaled = torch.empty_like(self._matrix)
        self._size: float | None = None
        # Views, made once: making them costs as much as the products.
        self._before = [self.rows[:i].T for i in range(s + 1)]
        self._after = [self.rows[i + 1 :].T for i in range(s)]
        self._stage_weights = [self._scaled[i, :i] for i in range(s)]
        self.later = [[j for j in range(i + 1, s) if self.a[j][i] != 0] for i in range(s)]
        self._end_weights = [self._scaled[s, :i] for i in range(s + 1)]
        self._partner_weights = [self._matrix[i + 1 : s, i].clone() for i in range(s)]

    def set_size(self, h: float) -> None:
        """Take the step's size."""
        if h != self._size:
            self._size = h
            torch.mul(self._matrix, h, out=self._scaled)

    def put(self, i: int, slope: Tensor | None) -> None:
        """Put a slope, of any shape, into its row; None for zero."""
        if slope is None:
            self.row[i].zero_()
        else:
            self.row[i].copy_(slope.reshape(-1))

    def stage(self, start: Tensor, i: int) -> Tensor:
        """X_i = x_n + h sum_j a_ij k_j, flat, the slopes before it being there; x_n itself for the first."""
        return torch.addmv(start, self._before[i], self._stage_weights[i]) if i else start

    def combined(self, stages: int) -> Tensor:
        """h sum_i b_i k_i over the first stages, flat: what a step adds to the state."""
        return torch.mv(self._before[stages], self._end_weights[stages])

    def partner(self, i: int) -> Tensor:
        """sum_{j > i} a_ji xi_j, flat, where the rows after i hold the xi instead of the slopes."""
        return torch.mv(self._after[i], self._partner_weights[i])
