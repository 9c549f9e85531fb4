"""What a Python object is made of, as far as a vector field can depend on it."""

from __future__ import annotations

import collections
import contextlib
import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_MOST_ENTRIES = 10_000
"""Containers with more entries are not looked into: f may hold a data set."""

_NO_PART_OF_A_FIELD = ("torch.optim", "torch.utils.data", "lightning", "pytorch_lightning", "logging")
"""Modules with the classes of objects that are not looked into: a model may hold its trainer."""

_LIBRARIES = ("torch", "torchdiffeq", "torchdyn", "symplectic_plugin")
"""Packages with classes whose code reads no globals of the user's."""

PLAIN = frozenset((bool, int, float, complex, str))
"""Types of values without parts."""

_HOLLOW = frozenset((*PLAIN, bytes, type(None), type, types.ModuleType))
_WITHOUT_PARTS = (torch.Tensor, str, bytes, int, float, complex, type, types.ModuleType)
_CONTAINERS = frozenset((dict, list, tuple, set, frozenset, collections.OrderedDict))

Contents = tuple[Any, Mapping[Any, Any]]
"""A container (a dictionary, a list, a closure's cell, or an object that can't be changed), and its contents by key."""


def is_hollow(item: object) -> bool:
    """Return whether there is nothing in an object to be looked for: so in most of what a module is made of."""
    kind = type(item)
    return kind in _HOLLOW or (kind in _CONTAINERS and not item)


def contents_of(item: Any) -> list[Contents]:
    """Return the containers that an object is made of, each with what it holds."""
    kind = type(item)
    if kind in _HOLLOW or isinstance(
        item, torch.Tensor | str | bytes | int | float | complex | type | types.ModuleType
    ):
        return []
    if isinstance(item, dict | list | tuple | set | frozenset):
        if len(item) > _MOST_ENTRIES:
            return []
        return [(item, dict(item) if isinstance(item, dict) else dict(enumerate(item)))]
    if isinstance(item, functools.partial):
        return [(item, {"func": item.func, "args": item.args, "keywords": item.keywords})]
    if isinstance(item, types.MethodType):
        return [(item, {"self": item.__self__, "func": item.__func__})]
    if isinstance(item, types.FunctionType):
        return _contents_of_function(item)
    if str(kind.__module__).startswith(_NO_PART_OF_A_FIELD) and not isinstance(item, torch.nn.Module):
        return []
    found: list[Contents] = []
    attributes = getattr(item, "__dict__", None)
    if isinstance(attributes, dict):
        found.append((attributes, dict(attributes)))
    rest = {name: getattr(item, name, None) for name in slots_of(kind)}
    if (code := class_code(item)) is not None:
        rest[code_name(item)] = code
    if rest:
        found.append((item, rest))
    return found


def _contents_of_function(function: types.FunctionType) -> list[Contents]:
    found: list[Contents] = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a cell that is still empty
            found.append((cell, {None: cell.cell_contents}))
    variables = function.__globals__
    names = {name: variables[name] for name in _global_names(function.__code__) if name in variables}
    rest = {"defaults": function.__defaults__, "kwdefaults": function.__kwdefaults__}
    return [*found, (variables, names), (function, rest), (function.__dict__, dict(function.__dict__))]


def get(container: Any, key: Any, default: Any) -> Any:
    """Return what is in a container that can be changed, or the default."""
    if isinstance(container, types.CellType):
        try:
            return container.cell_contents
        except ValueError:
            return default
    if isinstance(container, list):
        return container[key] if key < len(container) else default
    return container.get(key, default)


def slots_of(kind: type) -> list[str]:
    """Return the names of a class's slots, looked up once."""
    if kind not in _slots_of:
        slots = [owner.__dict__.get("__slots__", ()) for owner in kind.__mro__]
        _slots_of[kind] = [name for group in slots for name in ((group,) if isinstance(group, str) else group)]
    return _slots_of[kind]


_slots_of: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


def code_name(item: object) -> str:
    """Return the name of the method that runs when an object is called."""
    return "forward" if isinstance(item, torch.nn.Module) else "__call__"


def class_code(item: object) -> Any:
    """Return the function that runs when an object of a user's class is called: it may read globals."""
    if str(type(item).__module__).partition(".")[0] in _LIBRARIES:
        return None
    code = getattr(type(item), code_name(item), None)
    return code if isinstance(code, types.FunctionType) else None


def _global_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function, and functions defined inside it, may look up in its globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
