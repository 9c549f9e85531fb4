"""Walks through autograd's graphs: where a graph ends, what is behind a tensor, how much memory a graph holds.

A walk makes Python see the nodes that it visits, and nodes that Python has seen are freed recursively. So no walk may
visit a number of nodes that grows with the number of steps: walks stay within one evaluation of f.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import AccumulateGrad, has_storage

Edge = tuple[Any, int]
"""A tensor's place in the autograd graph: the node that made the tensor, and which of the node's outputs it is."""

SOLVE_NODE = "SymplecticAdjointSolve"
"""Beginning of the names of the autograd nodes of solves."""

_IS_SOLVE = "symplectic_adjoint: end of a solve"
_marked_types: set[type] = set()


def edge_of(tensor: Tensor) -> Edge:
    """Return the edge of a tensor with a history."""
    return tensor.grad_fn, tensor.output_nr


def accumulator(leaf: Tensor) -> Any:
    """Return the node at which graphs end in a leaf: the same node as long as somebody holds it."""
    with torch.enable_grad():
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


@dataclass
class GraphInputs:
    """The inputs of a graph: what a walk through it ended in.

    Attributes:
        leaves: leaf tensors.
        edges: edges that the walk was told to stop at.
        older: nodes made before the evaluation, or by another thread.
    """

    leaves: list[Tensor] = field(default_factory=list)
    edges: set[Edge] = field(default_factory=set)
    older: list[Any] = field(default_factory=list)


def graph_inputs(value: Tensor, start: Any, stops: Set[Edge], known: Iterable[Any] = ()) -> GraphInputs:
    """Walk the graph that an evaluation of f made, back to its inputs.

    Args:
        value: the value that f returned, with a history.
        start: the node of f's argument, made just before: nodes with smaller numbers are not the evaluation's.
        stops: edges not to look behind.
        known: nodes to be passed over.
    """
    found = GraphInputs()
    first = start._sequence_nr()
    seen = {start, None, *known}
    level: list[Edge] = [edge_of(value)]
    # Level by level, and with no more work for a node than needed: each backward pass through f walks.
    while level:
        following: list[Edge] = []
        for edge in level:
            node = edge[0]
            if stops and edge in stops:
                found.edges.add(edge)
            elif node not in seen:
                seen.add(node)
                if type(node) is AccumulateGrad:
                    found.leaves.append(node.variable)
                elif node._sequence_nr() < first:
                    found.older.append(node)
                else:
                    following += node.next_functions
        level = following
    return found


def in_type_of(output: Tensor, cotangent: Tensor) -> Tensor:
    """Convert a cotangent to the dtype of its output; to the real part, if the output is real."""
    if cotangent.dtype is output.dtype:
        return cotangent
    if cotangent.is_complex() and not output.is_complex():
        cotangent = cotangent.real
    return cotangent.to(output.dtype)


def referenced(leaves: list[Tensor]) -> list[Tensor]:
    """Select the leaves that others refer to, not those that f made for itself (`x.detach().requires_grad_()`)."""
    # Three references are the list's, the loop variable's and the function argument's.
    return [leaf for leaf in leaves if sys.getrefcount(leaf) > 3]


def history(tensor: Tensor, stops: Iterable[Any] = ()) -> Iterator[tuple[Any, Tensor | None, tuple[Edge, ...]]]:
    """Walk the nodes behind a tensor.

    Args:
        tensor: the tensor.
        stops: nodes not to look at, nor behind.

    Yields:
        Each node, the leaf that the node accumulates into (or None), and the edges that lead on.
    """
    seen: set[Any] = set(stops)
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node.variable if type(node) is AccumulateGrad else None
        yield node, leaf, node.next_functions
        stack += [following for following, _ in node.next_functions]


def is_alive(tensor: Tensor) -> bool:
    """Return whether a tensor's history can be gone back through: not freed by a backward pass, and no solve's.

    A model that keeps its last solution must not have that become a dependency of the next solve.
    """
    for node, leaf, _ in history(tensor):
        if node.name().startswith(SOLVE_NODE) or (type(node) in _marked_types and _IS_SOLVE in node.metadata):
            return False
        if leaf is None:
            try:
                _saved(node)
            except RuntimeError:
                return False
    return True


def mark_as_solve(solution: Tensor) -> None:
    """Mark a tensor with a history as one that a solve returned, for `is_alive`."""
    node: Any = solution.grad_fn
    _marked_types.add(type(node))
    node.metadata[_IS_SOLVE] = True


def depends_on_another(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Return whether a tensor's history leads to one of the others."""
    leaves = {id(other) for other in others if other.is_leaf}
    edges = {edge_of(other) for other in others if not other.is_leaf and other is not tensor}
    return any(
        id(leaf) in leaves if leaf is not None else any(edge in edges for edge in following)
        for _, leaf, following in history(tensor)
    )


def saved_storages(value: Tensor, stops: Iterable[Any] = ()) -> dict[int, int]:
    """Find the memory that a value's graph keeps for its backward pass.

    Args:
        value: the tensor.
        stops: nodes not to look at, nor behind.

    Returns:
        The size in bytes of each storage, by its address.
    """
    storages: dict[int, int] = {}
    if not value.requires_grad or value.is_leaf:
        return storages
    for node, leaf, _ in history(value, stops):
        if leaf is not None:
            continue
        try:
            saved = _saved(node)
        except RuntimeError:  # changed in place: autograd will say so if the node is gone back through
            continue
        for tensor in saved:
            if has_storage(tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif tensor.layout is not torch.strided:
                storages[id(tensor)] = 2 * tensor.numel() * tensor.element_size()
    return storages


def cotangent_bytes(value: Tensor, stops: Iterable[Any] = ()) -> int:
    """Compute the most bytes of cotangents that a backward pass through a graph holds at one time, leaves' excluded.

    The order is autograd's: the latest node first, each with the sum of the cotangents that have come to it so far.

    Args:
        value: the tensor that the backward pass starts from.
        stops: nodes not to look at, nor behind.
    """
    if value.grad_fn is None:
        return 0
    stops = set(stops)
    pending: dict[Any, dict[int, int]] = {value.grad_fn: {value.output_nr: value.numel() * value.element_size()}}
    held = most = sum(pending[value.grad_fn].values())
    order = [(-value.grad_fn._sequence_nr(), 0, value.grad_fn)]
    while order:
        _, _, node = heapq.heappop(order)
        own = pending.pop(node)
        given = [
            (following, i, _metadata_bytes(following._input_metadata[i]))
            for following, i in node.next_functions
            if following is not None and following not in stops and type(following) is not AccumulateGrad
        ]
        most = max(most, held + sum(size for *_, size in given))
        held -= sum(own.values())
        for following, i, size in given:
            if following not in pending:
                pending[following] = {}
                heapq.heappush(order, (-following._sequence_nr(), id(following), following))
            if i not in pending[following]:
                pending[following][i] = size
                held += size
    return most


def _metadata_bytes(metadata: Any) -> int:
    # A nested tensor's shape is no tuple of numbers.
    return 0 if metadata.is_nested_tensor else math.prod(metadata.shape) * metadata.dtype.itemsize


def _saved(node: Any) -> list[Tensor]:
    """Return the tensors that a node has saved.

    Raises:
        RuntimeError: if a backward pass has freed the node.
    """
    names = _saved_names.get(type(node))
    if names is None:
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        names = _saved_names[type(node)] = [name for name in names if not _is_number(getattr(node, name))]
    return _tensors([getattr(node, name) for name in names])


_saved_names: dict[type, list[str]] = {}


def _is_number(value: Any) -> bool:
    """Return whether a node has saved a number or text, or as for sizes and strides a tuple of numbers."""
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(part, int | float | torch.SymInt) for part in value)
    return isinstance(value, int | float | str | torch.SymInt)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found
