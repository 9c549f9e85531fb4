"""What a vector field depends on: what it holds, and what its graph runs into."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

Edge = tuple[Any, int]
"""A tensor's place in the autograd graph: the node that made it, and which of the node's outputs it is."""

_Access = tuple[Callable[[], Any], Callable[[Any], None]]
"""How something that a callable holds is read, and how it is replaced."""

_MOST_OBJECTS = 10_000
"""How many objects `held_by` looks at: f may hold a trainer, and with it a data set."""


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor with a history."""
    return tensor.grad_fn, tensor.output_nr


def has_hooks(tensor: Tensor) -> bool:
    """Whether differentiating with respect to a tensor runs somebody's code, or fills its `.grad`."""
    hooks = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return any(hooks) or (not tensor.is_leaf and tensor.retains_grad)


class Held:
    """What a callable holds: tensors in closures, attributes, containers, and globals that its code names.

    Attributes:
        tensors: those that require gradients.
        frozen: those that do not.
    """

    def __init__(self, root: object) -> None:
        self.tensors: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self._places: list[_Place] = []
        self._norms: list[torch.nn.Module] = []
        seen: set[int] = set()
        kept: list[object] = []  # so that no identity is used twice
        stack: list[object] = [root]
        while stack and len(seen) < _MOST_OBJECTS:
            item = stack.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            kept.append(item)
            if isinstance(item, _NormBase):
                self._norms.append(item)
            if not isinstance(item, Tensor):
                for part, place in _parts(item):
                    stack.append(part)
                    if place is not None and (isinstance(part, Tensor | bool)):
                        self._places.append(_Place(place, part))
            elif item.requires_grad:
                self.tensors.append(item)
            else:
                self.frozen.append(item)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put back, for as long, what was given up for something else since: a context set anew for each solve.

        Batch norms get copies of their running statistics, so that evaluating f again does not count twice in them.
        """
        changed = [(place, place.get()) for place in self._places if place.is_changed()]
        statistics = [(norm, dict(norm._buffers)) for norm in self._norms]
        try:
            for place, _ in changed:
                place.set(place.value())
            for norm, buffers in statistics:
                norm._buffers.update({name: None if x is None else x.clone() for name, x in buffers.items()})
            yield
        finally:
            for norm, buffers in statistics:
                norm._buffers.update(buffers)
            for place, now in changed:
                place.set(now)


class _Place:
    """Where something is held, and what was there."""

    def __init__(self, access: _Access, value: Any) -> None:
        self.get, self.set = access
        # A tensor with a history is held weakly: a model may keep the last solve's solution, and that its model's.
        weak = isinstance(value, Tensor) and value.grad_fn is not None
        self.value: Callable[[], Any] = weakref.ref(value) if weak else lambda: value

    def is_changed(self) -> bool:
        value = self.value()
        return value is not None and self.get() is not value


def _parts(item: object) -> Iterator[tuple[object, _Access | None]]:
    """What a callable or a container is made of, as far as it can hold tensors, and how to reach it there."""
    if item is None or isinstance(item, str | bytes | int | float | complex | type | types.ModuleType):
        return
    if isinstance(item, dict):
        yield from _entries(item, list(item))
    elif isinstance(item, list):
        for i, part in enumerate(item):
            yield part, (functools.partial(_get_index, item, i), functools.partial(item.__setitem__, i))
    elif isinstance(item, tuple | set | frozenset):
        yield from ((part, None) for part in item)
    elif isinstance(item, functools.partial):
        yield from ((part, None) for part in (item.func, item.args, item.keywords))
    elif isinstance(item, types.MethodType):
        yield from ((part, None) for part in (item.__self__, item.__func__))
    elif isinstance(item, types.FunctionType):
        yield from ((part, None) for part in (item.__defaults__, item.__kwdefaults__, item.__dict__))
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                access = (
                    functools.partial(getattr, cell, "cell_contents"),
                    functools.partial(setattr, cell, "cell_contents"),
                )
                yield cell.cell_contents, access
        yield from _entries(item.__globals__, _global_names(item.__code__))
    else:
        yield _own_code(item), None
        attributes = getattr(item, "__dict__", {})
        yield from _entries(attributes, list(attributes))
        for owner in type(item).__mro__:
            slots = owner.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                yield getattr(item, slot, None), None


def _entries(mapping: dict[Any, Any], keys: Iterable[Any]) -> Iterator[tuple[object, _Access | None]]:
    for key in keys:
        if key in mapping:
            part = mapping[key]
            if isinstance(part, bool) and key != "training":  # a module's mode; other flags are the field's own affair
                continue
            yield part, (functools.partial(mapping.get, key), functools.partial(mapping.__setitem__, key))


def _get_index(sequence: list[Any], i: int) -> Any:
    return sequence[i] if i < len(sequence) else None


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


def graph_inputs(value: Tensor, start: Any, stops: set[Edge]) -> GraphInputs:
    """Walk the graph that one evaluation of f made, back to what it depends on.

    Args:
        value: what f returned.
        start: a node made just before f was called: nodes with smaller numbers are not f's, or another thread's.
        stops: edges not to look behind.
    """
    found = GraphInputs()
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
            found.older.append(node)
        else:
            stack.extend(following for following in node.next_functions if following[0] is not None)
    return found


def referenced(leaves: list[Tensor]) -> list[Tensor]:
    """Those leaves that somebody else refers to: f may make leaves of its own, `x.detach().requires_grad_()`."""
    # The list, the loop's variable and the function's argument.
    return [leaf for leaf in leaves if sys.getrefcount(leaf) > 3]


def history(tensor: Tensor) -> Iterator[tuple[Any, Tensor | None, tuple[Edge, ...]]]:
    """The nodes behind a tensor: each node, the leaf that it accumulates into, and the edges that it leads to."""
    seen: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = node.variable if node.name() == "torch::autograd::AccumulateGrad" else None
        yield node, leaf, node.next_functions
        stack.extend(following for following, _ in node.next_functions)


def is_alive(tensor: Tensor) -> bool:
    """Whether a tensor's history can still be gone back through, not having been freed by a backward pass."""
    for node, leaf, _ in history(tensor):
        if leaf is None:
            try:
                for name in dir(node):
                    if name.startswith("_saved_") or name == "saved_tensors":
                        getattr(node, name)
            except RuntimeError:
                return False
    return True


def depends_on_another(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a tensor's history leads to one of the others."""
    leaves = {id(other) for other in others if other.is_leaf}
    edges = {edge_of(other) for other in others if not other.is_leaf and other is not tensor}
    return any(
        id(leaf) in leaves if leaf is not None else any(edge in edges for edge in following)
        for _, leaf, following in history(tensor)
    )
