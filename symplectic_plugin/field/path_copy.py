"""A copy of a callable with other contents in some of its containers, which shares everything else with the original.

The user's objects are never changed: other threads may be evaluating them. As in a persistent data structure, the
objects on the paths that lead to a replaced container are copied, and no others.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .contents import HOLLOW, class_code, contents_of, slots_of

Changes = Mapping[int, Mapping[Any, Any]]
"""New contents, by the identity of the container, then by key: a name, an index, or None for a closure's cell."""


class PathCopy:
    """Copies of objects that lead to replaced containers.

    Args:
        root: the object whose parts are looked at.
        changes: the new contents.
        required: containers, by their identities, without whose new contents the copy is of no use.
        most: number of objects to look at.
    """

    def __init__(self, root: object, changes: Changes, required: Collection[int], most: int) -> None:
        self._changes = changes
        self._memo: dict[int, Any] = {}
        self._kept_alive: list[object] = []
        parents = self._parents(root, most)
        self._affected = _leading_to(changes, parents)
        self._required = _leading_to(required, parents)

    def __call__(self, item: Any) -> Any:
        """Return the copy of an object, or the object itself if it leads to no replaced container.

        Raises:
            RuntimeError: if the object can't be copied, and leads to a container with required contents.
        """
        key = id(item)
        if key not in self._affected:
            return item
        if key not in self._memo:
            self._memo[key] = item  # for a cycle through an object that is made all at once
            try:
                self._copy(item)
            except Exception as error:
                self._memo[key] = item
                if key not in self._required:
                    return item
                raise RuntimeError(
                    f"symplectic_adjoint: the vector field holds something else than in the forward pass, by way of a "
                    f"{type(item).__module__}.{type(item).__qualname__} that can't be copied to have it as it was "
                    f"({type(error).__name__}: {error}). Call backward() before changing what the vector field holds."
                ) from error
        return self._memo[key]

    def _parents(self, root: object, most: int) -> dict[int, list[int]]:
        """Return the identities of the objects and containers that hold others, by the identities of those."""
        parents: dict[int, list[int]] = {}
        seen, queue = {id(root)}, [root]
        for item in queue:
            self._kept_alive.append(item)
            if len(seen) > most:
                break
            for container, contents in contents_of(item):
                if container is not item:
                    parents.setdefault(id(container), []).append(id(item))
                for part in {**contents, **self._changes.get(id(container), {})}.values():
                    parents.setdefault(id(part), []).append(id(container))
                    if id(part) not in seen and type(part) not in HOLLOW:
                        seen.add(id(part))
                        queue.append(part)
        return parents

    def _contents(self, container: object, contents: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self(value) for key, value in {**contents, **self._changes.get(id(container), {})}.items()}

    def _copy(self, item: Any) -> None:
        memo, key = self._memo, id(item)
        if isinstance(item, dict):
            memo[key] = copy.copy(item)
            memo[key].update(self._contents(item, item))
        elif isinstance(item, list):
            memo[key] = copy.copy(item)
            memo[key][:] = list(self._contents(item, dict(enumerate(item))).values())
        elif isinstance(item, tuple):
            parts = [self(part) for part in item]
            memo[key] = type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
        elif isinstance(item, set | frozenset):
            memo[key] = type(item)(self(part) for part in item)
        elif isinstance(item, functools.partial):
            arguments = {name: self(value) for name, value in item.keywords.items()}
            memo[key] = type(item)(self(item.func), *(self(x) for x in item.args), **arguments)
        elif isinstance(item, types.MethodType):
            memo[key] = types.MethodType(self(item.__func__), self(item.__self__))
        elif isinstance(item, types.FunctionType):
            self._copy_function(item)
        else:
            self._copy_object(item)

    def _copy_function(self, function: types.FunctionType) -> None:
        cells = [self._cell(cell) for cell in function.__closure__ or ()]
        variables, known = function.__globals__, self._memo
        names: dict[str, Any] = {}
        for container, contents in contents_of(function):
            if container is variables:
                names = dict(contents)
        if id(variables) in self._changes or any(id(value) in self._affected for value in names.values()):
            variables = known.setdefault(id(variables), dict(variables))
        result = types.FunctionType(
            function.__code__, variables, function.__name__, self(function.__defaults__), tuple(cells) or None
        )
        known[id(function)] = result
        result.__module__, result.__qualname__, result.__doc__ = (
            function.__module__, function.__qualname__, function.__doc__,
        )  # fmt: skip
        result.__dict__.update(self._contents(function.__dict__, function.__dict__))
        result.__kwdefaults__ = self(function.__kwdefaults__)
        if variables is not function.__globals__:
            variables.update(self._contents(function.__globals__, names))

    def _cell(self, cell: types.CellType) -> types.CellType:
        if id(cell) not in self._affected:
            return cell
        if id(cell) not in self._memo:
            copied = self._memo[id(cell)] = types.CellType()
            now = self._changes.get(id(cell), {})
            copied.cell_contents = self(now.get(None, cell.cell_contents))
        return self._memo[id(cell)]

    def _copy_object(self, item: Any) -> None:
        kind: Any = type(item)
        name, code = class_code(item)
        if code is not None and id(code) in self._affected:
            code_copy: Callable[..., Any] = self(code)
            kind = type(kind.__name__, (kind,), {name: code_copy, "__module__": kind.__module__})
        result = self._memo[id(item)] = object.__new__(kind)
        attributes = getattr(item, "__dict__", None)
        if attributes is not None:
            result.__dict__.update(self._contents(attributes, attributes))
        for slot in slots_of(type(item)):
            if hasattr(item, slot) and slot not in ("__dict__", "__weakref__"):
                object.__setattr__(result, slot, self(getattr(item, slot)))


def _leading_to(containers: Iterable[int], parents: Mapping[int, list[int]]) -> set[int]:
    """Return the identities of containers, and of all that leads to them."""
    found, stack = set[int](), list(containers)
    while stack:
        key = stack.pop()
        if key not in found:
            found.add(key)
            stack += parents.get(key, [])
    return found
