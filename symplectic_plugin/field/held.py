"""What a vector field holds: tensors that it may depend on, and what has to be put back to have it as it was."""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

_MOST_OBJECTS = 10_000
"""How many objects are looked at: f may hold a data set."""

_NO_PART_OF_A_FIELD = ("torch.optim", "torch.utils.data", "lightning", "pytorch_lightning", "logging")
"""Where the classes are from of objects that are not looked into: a model may hold its trainer."""


class Held:
    """What a callable holds in closures, attributes, containers, and globals that its code names.

    Attributes:
        tensors: the tensors that require gradients.
        frozen: those that do not.
    """

    def __init__(self, root: object) -> None:
        self.tensors: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self._settled = False
        self._holders: list[_Holder] = []
        self._norms: list[torch.nn.Module] = []
        seen: set[int] = set()
        kept: list[object] = []  # so that no identity is used twice
        queue: collections.deque[object] = collections.deque([root])
        while queue and len(seen) < _MOST_OBJECTS:
            item = queue.popleft()  # what is near comes first
            if id(item) in seen:
                continue
            seen.add(id(item))
            kept.append(item)
            try:
                parts = self._look_into(item)
            except Exception:  # an object that does not let itself be looked into
                continue
            queue.extend([part for part in parts if not _is_hollow(part)])
        statistics = {id(buffer) for norm in self._norms for buffer in norm._buffers.values()}
        self._versions = [(x, x._version) for x in self.frozen if id(x) not in statistics]
        self._statistics = [(x, x._version) for x in self.frozen if id(x) in statistics]

    def _look_into(self, item: Any) -> list[object]:
        """Note an object, and return what it is made of."""
        if isinstance(item, Tensor):
            (self.tensors if item.requires_grad else self.frozen).append(item)
            return []
        if isinstance(item, _NormBase):
            self._norms.append(item)
        holders, parts = _parts(item)
        self._holders.extend(holders)
        for holder in holders:
            parts.extend(holder.contents.values())
        return parts

    def settle(self) -> None:
        """Once f has been at work: what has changed since is what it changes by itself, which is not put back.

        Until then all that it held is kept alive.
        """
        if self._settled:
            return
        self._settled = True
        self.tensors = []  # f's dependencies have been taken from them: a model may keep a solve's solution
        for holder in self._holders:
            holder.settle()

    def changed_in_place(self) -> list[Tensor]:
        """Tensors without gradients, other than batch norms' statistics, that were changed in place since."""
        return [tensor for tensor, version in self._versions if tensor._version != version]

    def statistics_changed(self) -> bool:
        """Whether batch norms' statistics were changed since: one that f holds need not be used by it."""
        return any(tensor._version != version for tensor, version in self._statistics)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put back, for as long, what was given up for something else since: a context set anew for each solve.

        Batch norms get copies of their running statistics, so that evaluating f again does not count twice in them.
        """
        # One backward pass at a time where there is something to swap.
        changed = any(holder.differences() for holder in self._holders)
        with _swapping if changed else contextlib.nullcontext(), contextlib.ExitStack() as undo:
            for holder in self._holders if changed else ():
                if differences := holder.differences():
                    undo.callback(holder.put(differences))
            for norm in self._norms:
                undo.callback(norm._buffers.update, dict(norm._buffers))
                norm._buffers.update({name: None if x is None else x.clone() for name, x in norm._buffers.items()})
            yield


_swapping = threading.RLock()
_MISSING: Any = object()


class _Holder:
    """A dictionary, a list or a closure's cell, and what it held, by key."""

    __slots__ = ("_strong", "_weak", "container", "contents")

    def __init__(self, container: Any, contents: dict[Any, Any]) -> None:
        self.container = container
        self.contents = contents
        self._strong: dict[Any, Any] = {}
        self._weak: dict[Any, weakref.ref[Any]] = {}

    def settle(self) -> None:
        """Keep of the contents what is still there, and can be kept without keeping graphs alive."""
        for key, value in self.contents.items():
            if self.get(key) is not value:
                continue
            if type(value) in _PLAIN:
                self._strong[key] = value
                continue
            with contextlib.suppress(Exception):  # as above
                if _is_graphless(value):
                    self._strong[key] = value
                elif not isinstance(value, tuple | list | dict):
                    self._weak[key] = weakref.ref(value)
        self.contents = {}

    def get(self, key: Any) -> Any:
        """What is there now, if anything."""
        if isinstance(self.container, types.CellType):
            try:
                return self.container.cell_contents
            except ValueError:
                return _MISSING
        if isinstance(self.container, list):
            return self.container[key] if key < len(self.container) else _MISSING
        return self.container.get(key, _MISSING)

    def put(self, values: Mapping[Any, Any]) -> Callable[[], None]:
        """Have these there instead; returns what undoes it."""
        container = self.container
        if isinstance(container, list):
            now = list(container)
            for key in sorted(values):
                container[key : key + 1] = [values[key]]
            return functools.partial(container.__setitem__, slice(None), now)
        if isinstance(container, types.CellType):
            cell = self.get(None)
            container.cell_contents = values[None]
            return (
                functools.partial(setattr, container, "cell_contents", cell) if cell is not _MISSING else lambda: None
            )
        there = {key: self.get(key) for key in values}
        container.update(values)
        return functools.partial(_put_back, container, there)

    def differences(self) -> dict[Any, Any]:
        """What was there and is not now."""
        get = self.container.get if type(self.container) is dict else self.get
        differences = {key: value for key, value in self._strong.items() if get(key) is not value}
        for key, kept in self._weak.items():
            if (value := kept()) is not None and get(key) is not value:
                differences[key] = value
        return differences


def _put_back(mapping: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    for key, value in values.items():
        if value is _MISSING:
            mapping.pop(key, None)
        else:
            mapping[key] = value


_PLAIN = frozenset((bool, int, float, complex, str))
_HOLLOW = frozenset((*_PLAIN, bytes, type(None), type, types.ModuleType))


def _is_hollow(item: object) -> bool:
    """Whether there is nothing in an object to be looked for: most of what a module is made of."""
    kind = type(item)
    return kind in _HOLLOW or (kind in _CONTAINERS and not item)


_CONTAINERS = frozenset((dict, list, tuple, set, frozenset, collections.OrderedDict))


def _is_graphless(value: Any) -> bool:
    """Whether a value is a tensor, a number, a string or a container that can't keep a graph alive."""
    if isinstance(value, Tensor):
        return value.grad_fn is None
    if isinstance(value, tuple | list | dict):
        if not value:
            return True
        parts = list(value.values()) if isinstance(value, dict) else list(value)
        return len(parts) <= 100 and all(
            isinstance(x, bool | int | float | str) or (isinstance(x, Tensor) and x.grad_fn is None) for x in parts
        )
    return isinstance(value, bool | int | float | complex | str)


def _parts(item: object) -> tuple[list[_Holder], list[object]]:
    """What can be replaced in a callable or a container, as far as it matters here, and what else it is made of."""
    holders: list[_Holder] = []
    if item is None or isinstance(item, str | bytes | int | float | complex | type | types.ModuleType):
        return holders, []
    if isinstance(item, dict | list | tuple | set | frozenset) and len(item) > _MOST_OBJECTS:
        return holders, []
    if str(type(item).__module__).startswith(_NO_PART_OF_A_FIELD) and not isinstance(item, torch.nn.Module):
        return holders, []
    if isinstance(item, dict):
        return [_Holder(item, dict(item))], []
    if isinstance(item, list):
        return [_Holder(item, dict(enumerate(item)))], []
    if isinstance(item, tuple | set | frozenset):
        return holders, list(item)
    if isinstance(item, functools.partial):
        return holders, [item.func, item.args, item.keywords]
    if isinstance(item, types.MethodType):
        return holders, [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                holders.append(_Holder(cell, {None: cell.cell_contents}))
        variables = item.__globals__
        names = [name for name in _global_names(item.__code__) if name in variables]
        holders.append(_Holder(variables, {name: variables[name] for name in names}))
        return holders, [item.__defaults__, item.__kwdefaults__, item.__dict__]
    attributes = getattr(item, "__dict__", None)
    if isinstance(attributes, dict):
        holders.append(_Holder(attributes, dict(attributes)))
    return holders, [_own_code(item), *(getattr(item, name, None) for name in _slots(type(item)))]


def _slots(kind: type) -> list[str]:
    """The names of a class's slots, looked up once."""
    if kind not in _slots_of:
        slots = [owner.__dict__.get("__slots__", ()) for owner in kind.__mro__]
        _slots_of[kind] = [name for group in slots for name in ((group,) if isinstance(group, str) else group)]
    return _slots_of[kind]


_slots_of: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


def _own_code(item: object) -> object:
    """The function that runs when an object of a user's class is called: it may use globals."""
    name = "forward" if isinstance(item, torch.nn.Module) else "__call__"
    if str(type(item).__module__).partition(".")[0] in ("torch", "torchdiffeq", "torchdyn", "symplectic_plugin"):
        return None
    return getattr(type(item), name, None)


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Global names that a function and those defined inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
