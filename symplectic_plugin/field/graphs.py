"""Walks through autograd's graphs: where one ends, what is behind a tensor, how much memory one holds."""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Edge = tuple[Any, int]
"""A tensor's place in the autograd graph: the node that made it, and which of the node's outputs it is."""


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor with a history."""
    return tensor.grad_fn, tensor.output_nr


def accumulator(leaf: Tensor) -> Any:
    """The node at which graphs end in a leaf. It is the same one as long as somebody holds it."""
    with torch.enable_grad():
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


_Accumulator: Any = type(accumulator(torch.zeros((), requires_grad=True)))


@dataclass
class GraphInputs:
    """Where a value's graph ends.

    Attributes:
        leaves: leaf tensors.
        edges: edges that the walk was told to stop at.
        older: nodes that are older than the evaluation.
    """

    leaves: list[Tensor] = field(default_factory=list)
    edges: set[Edge] = field(default_factory=set)
    older: list[Any] = field(default_factory=list)


def graph_inputs(values: Sequence[Tensor], start: Any, stops: Set[Edge], known: Iterable[Any] = ()) -> GraphInputs:
    """Walk the graph that evaluations of f made, back to what it depends on.

    Args:
        values: what they returned, or what was made of that.
        start: a node made just before: nodes with smaller numbers are not f's, or another thread's.
        stops: edges not to look behind.
        known: nodes to be passed over.
    """
    found = GraphInputs()
    first = start._sequence_nr()
    seen = {start, None, *known}
    level: list[Edge] = [edge_of(value) for value in values]
    # Level by level, and with no more work for a node than needed: this is done for each backward pass through f.
    while level:
        following: list[Edge] = []
        for edge in level:
            node = edge[0]
            if stops and edge in stops:
                found.edges.add(edge)
            elif node not in seen:
                seen.add(node)
                if type(node) is _Accumulator:
                    found.leaves.append(node.variable)
                elif node._sequence_nr() < first:
                    found.older.append(node)
                else:
                    following += node.next_functions
        level = following
    return found


def vjp(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """The product of cotangents with a graph's Jacobians in its inputs, None for those that it does not lead to.

    As `torch.autograd.grad` gives it, less its checks of arguments, whose time shows where the network is small.
    """
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(
        tuple(outputs), tuple(cotangents), keep_graph, False, tuple(inputs),
        allow_unreachable=True, accumulate_grad=False,
    )  # fmt: skip


def in_type_of(output: Tensor, cotangent: Tensor) -> Tensor:
    """A cotangent in the dtype of what it is the cotangent of: of its real part, if that is real."""
    if cotangent.is_complex() and not output.is_complex():
        cotangent = cotangent.real
    return cotangent.to(output.dtype)


def referenced(leaves: list[Tensor]) -> list[Tensor]:
    """Those leaves that somebody else refers to: f may make leaves of its own, `x.detach().requires_grad_()`."""
    # The list, the loop's variable and the function's argument.
    return [leaf for leaf in leaves if sys.getrefcount(leaf) > 3]


def history(tensor: Tensor, stops: Iterable[Any] = ()) -> Iterator[tuple[Any, Tensor | None, tuple[Edge, ...]]]:
    """The nodes behind a tensor: each node, the leaf that it accumulates into, and the edges that it leads to.

    Args:
        tensor: the tensor.
        stops: nodes not to look at, nor behind.
    """
    seen: set[Any] = set(stops)
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node.variable if type(node) is _Accumulator else None
        yield node, leaf, node.next_functions
        stack.extend(following for following, _ in node.next_functions)


def nodes_between(start: Tensor, end: Tensor) -> int:
    """How many nodes were made in this thread from one that made a tensor to the one that made another."""
    first, last = start.grad_fn, end.grad_fn
    return 0 if first is None or last is None else last._sequence_nr() - first._sequence_nr()


def is_alive(tensor: Tensor) -> bool:
    """Whether a tensor's history can still be gone back through: it was not freed by a backward pass, and is no solve.

    (A model that keeps its last solution must not have it become a dependency of the next one.)
    """
    for node, leaf, _ in history(tensor):
        if node.name().startswith("_Recorded") or (type(node) in _solve_ends and _IS_SOLVE in node.metadata):
            return False
        if leaf is None:
            try:
                _saved(node)
            except RuntimeError:
                return False
    return True


def mark_as_solve(solution: Tensor) -> None:
    """Have the history of a solve's solution known for what it is."""
    node: Any = solution.grad_fn
    _solve_ends.add(type(node))
    node.metadata[_IS_SOLVE] = True


_IS_SOLVE = "symplectic_adjoint: end of a solve"
_solve_ends: set[type] = set()


def depends_on_another(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a tensor's history leads to one of the others."""
    leaves = {id(other) for other in others if other.is_leaf}
    edges = {edge_of(other) for other in others if not other.is_leaf and other is not tensor}
    return any(
        id(leaf) in leaves if leaf is not None else any(edge in edges for edge in following)
        for _, leaf, following in history(tensor)
    )


def saved_storages(value: Tensor, stops: Iterable[Any] = ()) -> dict[int, int]:
    """What a value's graph keeps for its backward pass: the size in bytes of each storage, by its address.

    Args:
        value: the tensor.
        stops: nodes not to look at, nor behind.
    """
    storages: dict[int, int] = {}
    if value.grad_fn is None:
        return storages
    for node, leaf, _ in history(value, stops):
        if leaf is not None:
            continue
        try:
            saved = _saved(node)
        except RuntimeError:  # changed in place, and so of no use: autograd will say so if it is gone back through
            continue
        for tensor in _tensors(saved):
            if has_storage(tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            elif tensor.layout is not torch.strided:
                storages[id(tensor)] = 2 * tensor.numel() * tensor.element_size()
    return storages


def has_storage(tensor: Tensor) -> bool:
    """Whether there is memory behind a tensor: not so for sparse ones, nor for the zeros that stand for tangents."""
    return tensor.layout is torch.strided and not tensor._is_zerotensor()


def cotangent_bytes(value: Tensor, stops: Iterable[Any] = ()) -> int:
    """The most bytes of cotangents that a backward pass through a value's graph holds at one time, but for the leaves'.

    As autograd goes through it: the latest node first, each with the sum of what has come to it so far.

    Args:
        value: the tensor.
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
        given = []
        for following, i in node.next_functions:
            if following is None or following in stops or type(following) is _Accumulator:
                continue
            metadata = following._input_metadata[i]
            # A nested tensor's shape is no tuple of numbers.
            numel = 0 if metadata.is_nested_tensor else math.prod(metadata.shape)
            given.append((following, i, numel * metadata.dtype.itemsize))
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


def _saved(node: Any) -> list[Any]:
    """What a node has saved.

    Raises:
        RuntimeError: if a backward pass has freed it.
    """
    names = _saved_names.get(type(node))
    if names is None:
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        names = [name for name in names if not isinstance(getattr(node, name), bool | int | float | str)]
        _saved_names[type(node)] = names
    return [getattr(node, name) for name in names]


_saved_names: dict[type, list[str]] = {}


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
