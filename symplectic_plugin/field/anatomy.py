"""Anatomies of objects: taking objects of each kind apart into their parts, and making them anew of other parts."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import sys
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Parts = dict[Any, Any]

MISSING: Any = object()
"""Stands for a part that an object does not have."""

CODE = "()"
"""The key of the function that runs when an object of a user's class is called."""

ATTRIBUTES = ("__defaults__", "__kwdefaults__", "__dict__")
"""The keys of a function's parts that are neither cells nor globals."""

MOST_OBJECTS = 10_000
"""Number of objects that are looked at: a vector field may hold a data set."""

_NO_PART_OF_A_FIELD = ("torch.optim", "torch.utils.data", "lightning", "pytorch_lightning", "logging")
"""Modules with the classes of objects that are not looked into: a model may hold its trainer."""

_LIBRARIES = ("torch", "torchdiffeq", "torchdyn", "symplectic_plugin")
"""Packages whose classes' code is known to read no global that a user sets."""


class Anatomy(ABC):
    """One kind of object: how it is taken apart and made anew.

    Attributes:
        has_identity: whether two objects with the same parts are two; else one may stand for the other.
        has_length: whether an object with more parts is another one.
        is_mutable: whether an object can be made before its parts are there, so that it can hold itself.
    """

    has_identity = False
    has_length = False
    is_mutable = True

    @abstractmethod
    def parts(self, item: Any) -> Parts:
        """Return what an object holds, by key."""

    def view(self, item: Any) -> Mapping[Any, Any]:
        """Return the parts to be read at once, without a copy where the object is a mapping already."""
        return self.parts(item)

    def empty(self, kind: type, item: Any) -> Any:
        """Return an object to be filled: a copy of `item`, or one of class `kind` where `item` is gone (None)."""
        if kind in _EMPTY:
            return kind()
        if item is None:
            raise TypeError(f"{kind.__qualname__} can't be made anew")
        return copy.copy(item)

    def fill(self, new: Any, parts: Parts) -> None:
        """Have an empty object hold all its parts."""
        raise NotImplementedError

    def made(self, kind: type, parts: Parts) -> Any:
        """Return an immutable object with these parts."""
        raise NotImplementedError

    def frame(self, item: Any) -> Any:
        """Return what has to be kept of an object beside its parts and its class, so that it can be made again."""
        return None


_EMPTY = frozenset((dict, list, collections.OrderedDict, types.CellType))


class _Dict(Anatomy):
    def parts(self, item: Any) -> Parts:
        return dict(item)

    def view(self, item: Any) -> Mapping[Any, Any]:
        return item

    def fill(self, new: Any, parts: Parts) -> None:
        update: Any = collections.OrderedDict.update if isinstance(new, collections.OrderedDict) else dict.update
        update(new, parts)


class _List(Anatomy):
    has_length = True

    def parts(self, item: Any) -> Parts:
        return dict(enumerate(item))

    def fill(self, new: Any, parts: Parts) -> None:
        new[:] = [parts[key] for key in sorted(parts)]


class _Tuple(_List):
    is_mutable = False

    def made(self, kind: type, parts: Parts) -> Any:
        return tuple.__new__(kind, parts.values())  # a named one's own constructor takes its parts one by one


class _Set(Anatomy):
    is_mutable = False

    def parts(self, item: Any) -> Parts:
        return {id(part): part for part in item}

    def made(self, kind: type, parts: Parts) -> Any:
        return kind(parts.values())


class _Partial(Anatomy):
    is_mutable = False

    def parts(self, item: Any) -> Parts:
        return {None: item.func, **dict(enumerate(item.args)), **item.keywords}

    def made(self, kind: type, parts: Parts) -> Any:
        keywords = {key: value for key, value in parts.items() if isinstance(key, str)}
        return kind(parts[None], *(parts[i] for i in range(len(parts) - len(keywords) - 1)), **keywords)


class _Method(Anatomy):
    is_mutable = False

    def parts(self, item: Any) -> Parts:
        return {"self": item.__self__, "func": item.__func__}

    def made(self, kind: type, parts: Parts) -> Any:
        return kind(parts["func"], parts["self"])


class _Cell(Anatomy):
    def parts(self, item: Any) -> Parts:
        try:
            return {None: item.cell_contents}
        except ValueError:  # still empty
            return {}

    def fill(self, new: Any, parts: Parts) -> None:
        if parts:
            new.cell_contents = parts[None]


class Function(Anatomy):
    """Functions: cells by number, globals that the code names and attributes by name."""

    has_identity = True

    def parts(self, item: Any) -> Parts:
        parts: Parts = dict(enumerate(item.__closure__ or ()))
        variables = item.__globals__
        for name in global_names(item.__code__):
            if (value := variables.get(name, MISSING)) is not MISSING:
                parts[name] = value
        parts["__defaults__"], parts["__kwdefaults__"] = item.__defaults__, item.__kwdefaults__
        if item.__dict__:
            parts["__dict__"] = item.__dict__
        return parts

    def frame(self, item: Any) -> Any:
        """Return the function with nothing in it."""
        return self.of(item, tuple(types.CellType() for _ in item.__closure__ or ()), item.__globals__)

    @staticmethod
    def of(item: Any, cells: tuple[Any, ...], variables: dict[str, Any]) -> Any:
        """Return the function without attributes, with other cells and globals."""
        new = types.FunctionType(item.__code__, variables, item.__name__, None, cells)
        new.__qualname__, new.__module__, new.__doc__ = item.__qualname__, item.__module__, item.__doc__
        return new

    def fill(self, new: Any, parts: Parts) -> None:
        new.__defaults__, new.__kwdefaults__ = parts["__defaults__"], parts["__kwdefaults__"]
        new.__dict__ = parts.get("__dict__", {})


class Object(Anatomy):
    """Objects of other classes: attributes and slots by name, and the class's code that runs when it is called."""

    has_identity = True

    def parts(self, item: Any) -> Parts:
        attributes = getattr(item, "__dict__", None)
        parts = dict(attributes) if isinstance(attributes, dict) else {}
        known = _class_of(type(item))
        for name, slot in known.slots.items():
            with contextlib.suppress(AttributeError):  # nothing in it
                parts[name] = slot.__get__(item)
        if known.code is not None:
            parts[CODE] = getattr(type(item), known.code, None)
        return parts

    def view(self, item: Any) -> Mapping[Any, Any]:
        known = _class_of(type(item))
        return self.parts(item) if known.slots or known.code is not None else item.__dict__

    def empty(self, kind: Any, item: Any) -> Any:
        new: Any
        if hasattr(kind, "__del__"):  # a copy does not own what the object owns
            kind = _subclass(kind, __del__=lambda self: None)
        try:
            new = object.__new__(kind)
        except TypeError:  # of a class written in C
            new = copy.copy(item) if item is not None else kind.__new__(kind)
        if new is item or type(new) is not kind:
            raise TypeError(f"there is only one {kind.__qualname__}")
        return new

    def fill(self, new: Any, parts: Parts) -> None:
        known = _class_of(type(new))
        code = parts.pop(CODE, None)
        if code is not None and known.code is not None and getattr(type(new), known.code) is not code:
            new.__class__ = _subclass(type(new), **{known.code: code})
        for name, slot in known.slots.items():
            if name in parts:
                slot.__set__(new, parts.pop(name))
        if parts:
            new.__dict__.update(parts)


def _subclass(kind: Any, **members: Any) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
    return type(kind)(kind.__name__, (kind,), names | members)


class _Class(NamedTuple):
    """Facts about a class: its slots by name; the name of its code if that is a user's."""

    slots: dict[str, Any]
    code: str | None


_classes: weakref.WeakKeyDictionary[type, _Class] = weakref.WeakKeyDictionary()


def _class_of(kind: type) -> _Class:
    known = _classes.get(kind)
    if known is None:
        slots = {
            name: value
            for owner in reversed(kind.__mro__)
            for name, value in vars(owner).items()
            if isinstance(value, types.MemberDescriptorType) and owner.__flags__ & _HEAP_TYPE
        }
        code = "forward" if issubclass(kind, torch.nn.Module) else "__call__"
        # Not what the class's own class has: every class can be called.
        is_users = str(kind.__module__).partition(".")[0] not in _LIBRARIES and any(
            code in vars(x) for x in kind.__mro__
        )
        known = _classes[kind] = _Class(slots, code if is_users else None)
    return known


_HEAP_TYPE = 1 << 9

_DICT, _LIST, _TUPLE, _SET = _Dict(), _List(), _Tuple(), _Set()
_BY_TYPE: dict[type, Anatomy] = {
    dict: _DICT, list: _LIST, tuple: _TUPLE, set: _SET, frozenset: _SET, collections.OrderedDict: _DICT,
    functools.partial: _Partial(), types.MethodType: _Method(), types.FunctionType: Function(), types.CellType: _Cell(),
}  # fmt: skip
_OBJECT = Object()

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
ATOMS = frozenset((*_PLAIN, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size))
"""Types of objects in which there is nothing to be looked for."""

CONTAINERS = frozenset((dict, list, tuple, set, frozenset, collections.OrderedDict))
"""Types of objects in which there is nothing to be looked for when they are empty, as most of a module's are."""


def is_library(module: object) -> bool:
    """Return whether code of a module is known to read no global that a user sets."""
    package = str(module).partition(".")[0]
    return package in _LIBRARIES or (package in sys.stdlib_module_names and package != "__main__")


def is_infrastructure(kind: type) -> bool:
    """Return whether a class is one of Python's own, as of thread pools and locks: such objects are not copied."""
    package = str(kind.__module__).partition(".")[0]
    return package in sys.stdlib_module_names and package not in _MODULES_OF_CONTAINERS


_MODULES_OF_CONTAINERS = ("builtins", "collections", "functools", "types", "__main__")


def keeps_no_graph(item: object) -> bool:
    """Return whether an object that is not taken apart can be kept without keeping a graph alive."""
    if issubclass(type(item), Tensor):
        return item.grad_fn is None  # type: ignore[attr-defined]
    kind = type(item)
    if kind in ATOMS or (kind in CONTAINERS and not item):
        return True
    return issubclass(kind, _PLAIN) or kind.__module__ == "numpy"


def anatomy_of(item: Any) -> Anatomy | None:
    """Return the anatomy of an object; None for an object that is not taken apart."""
    kind = type(item)
    anatomy = _BY_TYPE.get(kind)
    if anatomy is None:
        anatomy = _anatomy_of_subclass(item)
    if kind in CONTAINERS and len(item) > MOST_OBJECTS:
        return None
    return anatomy


def _anatomy_of_subclass(item: Any) -> Anatomy | None:
    if isinstance(item, (Tensor, type, types.ModuleType, *_PLAIN)):
        return None
    for kind in (dict, list, tuple, set, frozenset, functools.partial):
        if isinstance(item, kind):
            return _BY_TYPE[kind]
    if str(type(item).__module__).startswith(_NO_PART_OF_A_FIELD) and not isinstance(item, torch.nn.Module):
        return None
    has_parts = hasattr(type(item), "__dict__") and (hasattr(item, "__dict__") or _class_of(type(item)).slots)
    return _OBJECT if has_parts else None


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Global names that a function and those defined inside it use."""
    names = _names.get(code)
    if names is None:
        names = _names[code] = tuple(dict.fromkeys(_names_in(code)))
    return names


_names: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
