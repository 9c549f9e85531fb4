"""The contents of a vector field: tensors that it may depend on, and a copy that holds what there was before."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._torch_compat import at_end_of_backward
from .anatomy import ATOMS, CONTAINERS, MOST_OBJECTS, anatomy_of
from .node import Node
from .path_copy import Copying
from .survey import Survey


class Held:
    """The contents of a callable: closures, attributes, containers, and globals that its code names.

    Contents are never changed: where they differ from those of the forward pass, a copy of the callable is made.

    Attributes:
        tensors: the tensors that require gradients.
        frozen: those that do not.
    """

    def __init__(self, root: object) -> None:
        self.tensors: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self._settled = False
        self._cached: weakref.ref[_Cached] | None = None
        self._nodes: list[Node] = []
        _threads.add(threading.get_ident())
        seen: dict[int, Node | None] = {}
        self._root = self._node_of(root, seen)
        for node in self._nodes:  # which grows: what is near comes first
            for key, value in node.contents.items():  # which are kept, so that no identity is used twice
                kind = type(value)
                if kind in ATOMS or (kind in CONTAINERS and not value):
                    continue
                child = seen[id(value)] if id(value) in seen else self._node_of(value, seen)
                if child is not None:
                    node.links[key] = child
        norms: list[Any] = [node.item for node in self._nodes if node.is_norm]
        statistics = {id(buffer) for norm in norms for buffer in norm._buffers.values()}
        counted = [x for x in self.frozen if not x.is_inference()]  # inference tensors don't count changes in place
        self._versions = [(x, x._version) for x in counted if id(x) not in statistics]
        self._statistics = [(x, x._version) for x in counted if id(x) in statistics]

    def _node_of(self, item: Any, seen: dict[int, Node | None]) -> Node | None:
        """Note an object that was not seen before; its node, if it is to be taken apart."""
        seen[id(item)] = None
        if issubclass(type(item), Tensor):  # whatever the object says that it is
            (self.tensors if item.requires_grad else self.frozen).append(item)
            return None
        try:
            anatomy = anatomy_of(item) if len(seen) < MOST_OBJECTS else None
            node = None if anatomy is None else Node(item, anatomy)
        except Exception:  # an object that does not let itself be looked into
            return None
        if node is not None:
            seen[id(item)] = node
            self._nodes.append(node)
        return node

    def settle(self) -> None:
        """End the forward pass: contents that have changed so far are changed by f itself, and are not put back.

        Until then all contents are kept alive.
        """
        if self._settled:
            return
        self._settled = True
        self.tensors = []  # f's dependencies have been taken from them: a model may keep a solve's solution
        for node in self._nodes:
            node.settle()
        self._nodes = []

    def changed_in_place(self) -> list[Tensor]:
        """Tensors without gradients, other than batch norms' statistics, that were changed in place since."""
        return [tensor for tensor, version in self._versions if tensor._version != version]

    def statistics_changed(self) -> bool:
        """Return whether batch norms' statistics were changed since: one that f holds need not be used by it."""
        return any(tensor._version != version for tensor, version in self._statistics)

    def as_recorded(self, root: Any, *, isolated: bool = False) -> Any:
        """Return the callable as it was when it was settled: itself, or a copy along the paths to what has changed.

        Nothing of the user's is changed for it, so that other threads may evaluate the same objects. In the copy batch
        norms that would count an evaluation have running statistics of their own.

        Args:
            root: the callable, or the tuple of callables, that this was made of.
            isolated: whether what has not changed is to be copied too, where another thread may change it meanwhile.

        Raises:
            RuntimeError: if an object on such a path can't be copied.
        """
        if self._root is None:
            return root
        survey = Survey(self._root, root, isolated=isolated and _is_one_of_several())
        if not survey.differs:
            return root
        cached = None if self._cached is None else self._cached()
        if cached is None or not cached.is_of(survey.differences):
            cached = _Cached(survey.differences, Copying(survey).copy(self._root))
            self._cached = weakref.ref(cached)
            with contextlib.suppress(RuntimeError):  # outside of a backward pass
                at_end_of_backward(cached.live_on)
        return cached.copy

    def is_as_recorded(self, root: Any) -> bool:
        """Return whether the callable, or the tuple of them, holds what it held when it was settled."""
        return self._root is None or not Survey(self._root, root, isolated=False).changed


_threads: set[int] = set()
"""The threads in which vector fields have been looked at."""


def _is_one_of_several() -> bool:
    """Return whether another thread may be solving now too."""
    return len(_threads) > 1 and threading.active_count() > 1


class _Cached:
    """A copy, kept for as long as a backward pass lasts, and what it was made for."""

    def __init__(self, differences: Sequence[Any], copy: Any) -> None:
        self._differences = differences
        self.copy = copy

    def is_of(self, differences: Sequence[Any]) -> bool:
        """Return whether the copy is one for these differences."""
        mine = self._differences
        return len(mine) == len(differences) and all(x is y for x, y in zip(mine, differences, strict=True))

    def live_on(self) -> None:
        """Called at the end of the backward pass, which holds this until then."""
