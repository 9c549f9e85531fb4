"""The contents of a vector field: tensors that it may depend on, and a copy that holds what there was before."""

from __future__ import annotations

import collections
import contextlib
import threading
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import NormBase
from .contents import CONTAINERS, HOLLOW, PLAIN, Contents, contents_of, get
from .path_copy import PathCopy

_MOST_OBJECTS = 10_000
"""How many objects are looked at: f may hold a data set."""

_MISSING: Any = object()


class Held:
    """The contents of a callable: closures, attributes, containers, and globals that its code names.

    Contents are never changed. Where they differ from those of the forward pass, a copy of the callable is made (see
    `PathCopy`).

    Args:
        root: the callable, or a tuple of several.

    Attributes:
        tensors: the tensors that require gradients.
        frozen: those that do not.
    """

    def __init__(self, root: object) -> None:
        self.tensors: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self._settled = False
        self._found: list[Contents] = []
        self._holders: list[_Holder] = []
        self._norms: list[torch.nn.Module] = []
        self._copied: tuple[Any, Any] | None = None
        self._look_at(root)
        statistics = {id(buffer) for norm in self._norms for buffer in norm._buffers.values()}
        self._versions = [(x, x._version) for x in self.frozen if id(x) not in statistics]
        self._statistics = [(x, x._version) for x in self.frozen if id(x) in statistics]

    def _look_at(self, root: object) -> None:
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
                if isinstance(item, Tensor):
                    (self.tensors if item.requires_grad else self.frozen).append(item)
                    continue
                if isinstance(item, NormBase):
                    self._norms.append(item)
                found = contents_of(item)
            except Exception:  # an object that does not let itself be looked into
                continue
            self._found += found
            for _, contents in found:
                for part in contents.values():
                    kind = type(part)
                    if kind not in HOLLOW and (kind not in CONTAINERS or part):
                        queue.append(part)

    def settle(self) -> None:
        """End the forward pass: contents that have changed so far are changed by f itself, and are not put back.

        Until then all contents are kept alive.
        """
        if self._settled:
            return
        self._settled = True
        self.tensors = []  # f's dependencies have been taken from them: a model may keep a solve's solution
        holders = [_Holder(*found) for found in self._found if isinstance(found[0], dict | list | types.CellType)]
        self._holders = [holder for holder in holders if holder.is_of_use]
        self._found = []

    def changed_in_place(self) -> list[Tensor]:
        """Return tensors without gradients, other than batch norms' statistics, that were changed in place since."""
        return [tensor for tensor, version in self._versions if tensor._version != version]

    def statistics_changed(self) -> bool:
        """Return whether batch norms' statistics were changed since: a batch norm that f holds need not be used."""
        return any(tensor._version != version for tensor, version in self._statistics)

    def as_recorded(self, root: Any) -> Any:
        """Return the callable, or a copy of it that holds what it held in the forward pass.

        Where other threads run, the copy also holds apart whatever they may change during the backward pass. In the
        copy, batch norms in training mode have copies of their running statistics, so that evaluating f again
        counts in nobody's.

        Args:
            root: what the contents were looked for in.

        Raises:
            RuntimeError: if something on the way to what has changed can't be copied.
        """
        differences = {id(h.container): changes for h in self._holders if (changes := h.differences())}
        counting = [norm for norm in self._norms if norm.track_running_stats and (norm.training or differences)]
        # Another thread may change the contents while the backward pass is under way.
        shared = threading.active_count() > 1
        if not (differences or counting or shared):
            return root
        key = [(where, name, id(value)) for where, changes in differences.items() for name, value in changes.items()]
        if self._copied is None or self._copied[0] != (shared, key):
            contents = {id(holder.container): holder.contents() for holder in self._holders} if shared else {}
            statistics = {
                id(norm._buffers): {name: None if x is None else x.clone() for name, x in norm._buffers.items()}
                for norm in counting
            }
            required = {**differences, **statistics}
            copied = PathCopy(root, {**contents, **required}, required, _MOST_OBJECTS)(root)
            self._copied = (shared, key), copied
        return self._copied[1]


class _Holder:
    """A dictionary, a list or a closure's cell, and what it held in the forward pass, by key.

    Kept of the contents is what is still there, and can be kept without keeping graphs alive.

    Args:
        container: the container.
        contents: what it held when f was first evaluated.
    """

    __slots__ = ("_strong", "_weak", "container")

    def __init__(self, container: Any, contents: Mapping[Any, Any]) -> None:
        self.container = container
        self._strong: dict[Any, Any] = {}
        self._weak: dict[Any, weakref.ref[Any]] = {}
        for key, value in contents.items():
            if get(container, key, _MISSING) is not value:
                continue
            if type(value) in PLAIN:
                self._strong[key] = value
                continue
            with contextlib.suppress(Exception):  # an object that does not let itself be looked into, or referred to
                if _is_graphless(value):
                    self._strong[key] = value
                elif not isinstance(value, tuple | list | dict):
                    self._weak[key] = weakref.ref(value)

    @property
    def is_of_use(self) -> bool:
        """Whether the holder keeps anything."""
        return bool(self._strong or self._weak)

    def contents(self) -> dict[Any, Any]:
        """Return what was there, by key."""
        return {**self._strong, **{key: value for key, kept in self._weak.items() if (value := kept()) is not None}}

    def differences(self) -> dict[Any, Any]:
        """Return what was there and is not now, by key."""
        container = self.container
        if type(container) is dict:
            now = container.get
            differences = {key: value for key, value in self._strong.items() if now(key) is not value}
        else:
            differences = {k: v for k, v in self._strong.items() if get(container, k, _MISSING) is not v}
        for key, kept in self._weak.items():
            if (value := kept()) is not None and get(container, key, _MISSING) is not value:
                differences[key] = value
        return differences


def _is_graphless(value: Any) -> bool:
    """Return whether a value is a tensor, a number, a string or a container that can't keep a graph alive."""
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
