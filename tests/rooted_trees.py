"""Rooted trees and the order conditions of Runge-Kutta methods (Hairer, Norsett, Wanner, Solving ODEs I, II.2)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from symplectic_plugin import ButcherTableau

Tree = tuple["Tree", ...]
"""Rooted tree, as the sorted tuple of the trees that hang from its root."""


@functools.cache
def trees(order: int) -> tuple[Tree, ...]:
    """List all rooted trees with this many nodes."""
    return tuple(sorted({tuple(sorted(branches)) for branches in _forests(order - 1, order - 1)}))


def _forests(nodes: int, largest: int) -> Iterator[tuple[Tree, ...]]:
    """Generate multisets of trees with this many nodes in all, and at most `largest` nodes in a tree."""
    if nodes == 0:
        yield ()
    for size in range(min(nodes, largest), 0, -1):
        for tree in trees(size):
            for rest in _forests(nodes - size, size):
                yield (tree, *rest)


def order(tree: Tree) -> int:
    """Count the nodes of a tree."""
    return 1 + sum(order(branch) for branch in tree)


def density(tree: Tree) -> int:
    """Compute gamma(t), the product of the orders of all subtrees."""
    result = order(tree)
    for branch in tree:
        result *= density(branch)
    return result


def elementary_weight(tree: Tree, tableau: ButcherTableau) -> float:
    """Compute sum_i b_i Phi_i(t), equal to 1 / gamma(t) for all trees up to the method's order."""
    return float(tableau.b @ _stage_weights(tree, tableau))


def _stage_weights(tree: Tree, tableau: ButcherTableau) -> torch.Tensor:
    result = torch.ones_like(tableau.b)
    for branch in tree:
        result = result * (tableau.a @ _stage_weights(branch, tableau))
    return result
