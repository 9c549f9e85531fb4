"""Weights for the solution at the middle of a step, derived from order conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tableau import ButcherTableau


def midpoint_weights(parts: Sequence[ButcherTableau], order: int, damped: int) -> Tensor:
    """Derive the smallest weights w with x_n + h sum_i w_i k_i = x(t_n + h/2) + O(h^(order + 1)).

    The weights satisfy the order conditions of all rooted trees with at most `order` nodes, with each branch in each of
    the parts (Kennedy, Carpenter 2003, section 2.1).

    Args:
        parts: tableaux of the method's parts. The last one is implicit with an explicit first stage.
        order: order of the solution at the midpoint, at most 4.
        damped: number of leading terms of the midpoint's stability function R(z) at infinity that vanish: with 1, R is
            bounded; with 2, R goes to 0.

    Returns:
        The weights, shape (s,), float64.

    Raises:
        ValueError: if there are no such weights.
    """
    phi, wanted = zip(*_conditions(parts, order), strict=True)
    # With A = [[0, 0], [a, M]] and q = M^{-1} a: R(z) = z (w_1 - w' q) + 1 - w' (M^{-1} 1 + M^{-1} q) + O(1 / z).
    m, first = parts[-1].a[1:, 1:], parts[-1].a[1:, 0]
    q = torch.linalg.solve(m, first)
    zero = torch.zeros(1, dtype=torch.float64)
    at_infinity = [torch.cat([1 + zero, -q]), torch.cat([zero, torch.linalg.solve(m, 1 + q)])]
    matrix = torch.stack([*phi, *at_infinity[:damped]])
    right = torch.tensor([*wanted, *[0.0, 1.0][:damped]], dtype=torch.float64)
    weights = torch.linalg.pinv(matrix, rtol=1e-10) @ right
    if (matrix @ weights - right).abs().max() > 1e-12:
        raise ValueError(f"no weights of order {order} for the midpoint")
    return weights


def _conditions(parts: Sequence[ButcherTableau], order: int) -> list[tuple[Tensor, float]]:
    """List phi_i and theta^q / gamma of the conditions sum_i w_i phi_i = theta^q / gamma, with theta = 1/2.

    q and gamma are the order and the density of a rooted tree (Hairer, Norsett, Wanner, Solving ODEs I, II.2).
    """
    c, one = parts[-1].c, torch.ones_like(parts[-1].c)
    second = [p.a @ c for p in parts]
    trees = [
        [(one, 1)],
        [(c, 2)],
        [(c * c, 3), *((ac, 6) for ac in second)],
        [(c**3, 4), *((c * ac, 8) for ac in second), *((p.a @ (c * c), 12) for p in parts)],
    ]
    trees[3] += [(p.a @ ac, 24) for p in parts for ac in second]
    return [(phi, 0.5**q / gamma) for q in range(1, order + 1) for phi, gamma in trees[q - 1]]
