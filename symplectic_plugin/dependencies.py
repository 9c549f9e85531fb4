"""What a vector field depends on: the tensors it is made of, and the tensors that its graph runs into."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Edge = tuple[Any, int]
"""A tensor's place in the autograd graph: the node that made it, and which of the node's outputs it is."""

_MOST_OBJECTS = 10_000
"""How many objects `captured_tensors` looks at: f may hold a trainer, and with it a data set."""


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor with a history."""
    return tensor.grad_fn, tensor.output_nr


def captured_tensors(root: object) -> list[Tensor]:
    """Tensors that a callable holds and that require gradients: parameters, closures, attributes, globals it names."""
    found: list[Tensor] = []
    seen: set[int] = set()
    kept: list[object] = []  # so that no identity is used twice
    stack: list[object] = [root]
    while stack and len(seen) < _MOST_OBJECTS:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        kept.append(item)
        if not isinstance(item, Tensor):
            stack.extend(_parts(item))
        elif item.requires_grad:
            found.append(item)
    return found


def _parts(item: object) -> Iterable[object]:
    """What a callable or a container is made of, as far as it can hold tensors."""
    if item is None or isinstance(item, str | bytes | int | float | complex | type | types.ModuleType):
        return
    if isinstance(item, dict):
        yield from list(item.values())
    elif isinstance(item, list | tuple | set | frozenset):
        yield from list(item)
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, types.FunctionType):
        yield from (item.__defaults__, item.__kwdefaults__, item.__dict__)
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                yield cell.cell_contents
        yield from (item.__globals__[name] for name in _global_names(item.__code__) if name in item.__globals__)
    else:
        yield _own_code(item)
        yield from list(getattr(item, "__dict__", {}).values())
        for owner in type(item).__mro__:
            slots = owner.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                yield getattr(item, slot, None)


def _own_code(item: object) -> object:
    """The function that runs when an object of a user's class is called: it may use globals."""
    name = "forward" if isinstance(item, torch.nn.Module) else "__call__"
    if type(item).__module__.partition(".")[0] in ("torch", "torchdiffeq", "torchdyn"):
        return None
    return getattr(type(item), name, None)


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Global names that a function and those defined inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


class GraphInputs(NamedTuple):
    """Where a value's graph ends: leaves, edges that it was told to stop at, and a node older than the evaluation."""

    leaves: list[Tensor]
    edges: set[Edge]
    older: Any | None


def graph_inputs(value: Tensor, start: Any, stops: Iterable[Edge]) -> GraphInputs:
    """Walk the graph that one evaluation of f made, back to what it depends on.

    Args:
        value: what f returned.
        start: a node made just before f was called: nodes with smaller numbers are not f's.
        stops: edges not to look behind.
    """
    stops = stops if isinstance(stops, set) else set(stops)
    found = GraphInputs([], set(), None)
    if value.grad_fn is None:
        return found
    first = start._sequence_nr()
    seen = {start}
    stack: list[Edge] = [edge_of(value)]
    while stack:
        edge = stack.pop()
        node = edge[0]
        if edge in stops:
            found.edges.add(edge)
            continue
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.leaves.append(node.variable)
        elif node._sequence_nr() < first:
            found = found._replace(older=node)
        else:
            stack.extend(following for following in node.next_functions if following[0] is not None)
    return found
