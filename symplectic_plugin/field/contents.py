"""The parts of a Python object, as far as a vector field can depend on them."""

from __future__ import annotations

import collections
import contextlib
import functools
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_MOST_ENTRIES = 10_000
"""Containers with more entries are not looked into: f may hold a data set."""

_NO_PART_OF_A_FIELD = (
    "torch.optim", "torch.utils.data", "lightning", "pytorch_lightning", "logging",
    "concurrent", "threading", "_thread", "multiprocessing", "queue", "_queue", "asyncio", "socket", "subprocess",
)  # fmt: skip
"""Modules with the classes of objects that are not looked into: a model may hold its trainer, or a pool of threads."""

_LIBRARIES = ("torch", "torchdiffeq", "torchdyn", "symplectic_plugin")
"""Packages with classes whose code reads no globals of the user's."""

PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
"""Types of values without parts."""

HOLLOW = frozenset((*PLAIN, type, types.ModuleType))
"""Types of objects in which there is nothing to be looked for: most of what a module is made of."""

CONTAINERS = frozenset((dict, list, tuple, set, frozenset, collections.OrderedDict))
"""Types of containers: if empty, there is nothing in them to be looked for either."""

# Tuples rather than unions, which would be made anew in each call.
_COLLECTIONS = (dict, list, tuple, set, frozenset)
_WITHOUT_PARTS = (torch.Tensor, str, bytes, int, float, complex, type, types.ModuleType)

Contents = tuple[Any, Mapping[Any, Any]]
"""A container (a dictionary, a list, a closure's cell, or an object that can't be changed), and its contents by key."""


def contents_of(item: Any) -> list[Contents]:
    """Return the containers that an object is made of, each with what it holds."""
    kind = type(item)
    if kind in HOLLOW or isinstance(item, _WITHOUT_PARTS):
        return []
    if isinstance(item, _COLLECTIONS):
        if len(item) > _MOST_ENTRIES:
            return []
        return [(item, dict(item) if isinstance(item, dict) else dict(enumerate(item)))]
    if isinstance(item, functools.partial):
        return [(item, {"func": item.func, "args": item.args, "keywords": item.keywords})]
    if isinstance(item, types.MethodType):
        return [(item, {"self": item.__self__, "func": item.__func__})]
    if isinstance(item, types.FunctionType):
        return _contents_of_function(item)
    plan = _plans.get(kind) or _plan(kind)
    if plan.is_closed:
        return []
    found: list[Contents] = []
    attributes = getattr(item, "__dict__", None)
    if isinstance(attributes, dict):
        found.append((attributes, dict(attributes)))
    if plan.slots or plan.code is not None:
        rest = {name: getattr(item, name, None) for name in plan.slots}
        found.append((item, rest if plan.code is None else {**rest, plan.code_name: plan.code}))
    return found


class _Plan(NamedTuple):
    """Facts about the objects of a class.

    Args:
        slots: names of the slots.
        code_name: name of the method that runs when an object is called.
        code: that method, if it is a user's: it may read globals.
        is_closed: whether the objects are not looked into.
    """

    slots: tuple[str, ...]
    code_name: str
    code: types.FunctionType | None
    is_closed: bool


def _plan(kind: type) -> _Plan:
    slots = [owner.__dict__.get("__slots__", ()) for owner in kind.__mro__]
    names = [name for group in slots for name in ((group,) if isinstance(group, str) else group)]
    is_module = issubclass(kind, torch.nn.Module)
    code_name = "forward" if is_module else "__call__"
    code = getattr(kind, code_name, None)
    if str(kind.__module__).partition(".")[0] in _LIBRARIES or not isinstance(code, types.FunctionType):
        code = None
    is_closed = str(kind.__module__).startswith(_NO_PART_OF_A_FIELD) and not is_module
    plan = _plans[kind] = _Plan(tuple(names), code_name, code, is_closed)
    return plan


_plans: weakref.WeakKeyDictionary[type, _Plan] = weakref.WeakKeyDictionary()


def slots_of(kind: type) -> tuple[str, ...]:
    """Return the names of a class's slots."""
    return (_plans.get(kind) or _plan(kind)).slots


def class_code(item: object) -> tuple[str, Any]:
    """Return the name of the method that runs when an object is called, and the method if it is a user's."""
    plan = _plans.get(type(item)) or _plan(type(item))
    return plan.code_name, plan.code


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


def _global_names(code: types.CodeType) -> list[str]:
    """Return the names that a function, and functions defined inside it, may look up in its globals."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return names
