"""The contents of a vector field: tensors that it may depend on, and a copy that holds what there was before."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ._torch_compat import NormBase, at_end_of_backward
from .anatomy import (
    ATOMS,
    CONTAINERS,
    MISSING,
    MOST_OBJECTS,
    Anatomy,
    Parts,
    anatomy_of,
    is_infrastructure,
    keeps_no_graph,
)
from .path_copy import Copying


class Node:
    """The record of one object that a vector field is made of. Once settled, it keeps neither object nor graphs alive.

    Args:
        item: the object.
        anatomy: how it is taken apart.

    Attributes:
        kind: its class.
        links: by key, the nodes of the parts that are taken apart themselves.
        strong, weak: by key, the other parts.
        keys: those of all parts, in their order.
        is_norm: whether it is a batch norm or the like.
    """

    __slots__ = (
        "_contents", "_frame", "_is_complete", "_item", "_length", "_reference",
        "anatomy", "is_norm", "keys", "kind", "links", "strong", "weak",
    )  # fmt: skip

    def __init__(self, item: Any, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.kind = type(item)
        self.is_norm = isinstance(item, NormBase)
        self.links: dict[Any, Node] = {}
        self.strong: Parts = {}
        self.weak: dict[Any, weakref.ref[Any]] = {}
        self.keys: Sequence[Any] = ()
        self._item = item
        self._contents: Parts = {}
        self._is_complete = True
        self._length: int | None = None
        self._frame: Any = None
        self._reference: weakref.ref[Any] | None = None

    def take_apart(self) -> Parts:
        """Note what the object holds."""
        try:
            self._contents = self.anatomy.parts(self._item)
        except Exception:  # an object that does not let itself be looked into
            self._is_complete = False
        return self._contents

    def settle(self) -> None:
        """Keep of the parts those that are still there, strongly only what can't keep a graph alive."""
        item, contents, self._item, self._contents = self._item, self._contents, None, {}
        if is_infrastructure(self.kind):
            contents, self.links, self._is_complete = {}, {}, False
        with contextlib.suppress(TypeError):
            self._reference = weakref.ref(item) if self.anatomy.has_identity else None
            self._frame = self.anatomy.frame(item)
        now = self.anatomy.parts(item) if contents else {}
        self.keys = tuple(contents)
        if self.anatomy.has_length and len(now) == len(contents):
            self._length = len(now)
        for key, value in contents.items():
            if now.get(key, MISSING) is not value:
                self._is_complete = False
                self.links.pop(key, None)
            elif key not in self.links:
                self._settle_part(key, value)

    def _settle_part(self, key: Any, value: Any) -> None:
        if keeps_no_graph(value):
            self.strong[key] = value
            return
        try:
            self.weak[key] = weakref.ref(value)
        except TypeError:
            self._is_complete = False

    def is_at(self, item: Any) -> bool:
        """Return whether an object is this one, or may stand for it."""
        return type(item) is self.kind if self._reference is None else self._reference() is item

    def original(self) -> Any:
        """Return the object, if it is there; what was kept of it, if it is not."""
        item = None if self._reference is None else self._reference()
        return self._frame if item is None else item

    def can_be_made(self, seen: set[Node]) -> bool:
        """Return whether the object can be made again of its parts, of which `seen` are being made."""
        if self in seen or (self._reference is not None and self._reference() is not None):
            return True
        seen.add(self)
        return (
            self._is_complete
            and all(reference() is not None for reference in self.weak.values())
            and all(child.can_be_made(seen) for child in self.links.values())
        )

    def changed_keys(self, parts: Mapping[Any, Any]) -> list[Any]:
        """Return the keys of parts that are not taken apart themselves and are not what they were."""
        keys = [key for key, value in self.strong.items() if parts.get(key, MISSING) is not value]
        for key, reference in self.weak.items():
            if (value := reference()) is not None and parts.get(key, MISSING) is not value:
                keys.append(key)
        if self._length is not None and len(parts) > self._length:
            keys.append(MISSING)
        return keys

    def put_into(self, parts: Parts) -> None:
        """Put the parts that are not taken apart themselves where they were."""
        parts.update(self.strong)
        parts.update({key: value for key, r in self.weak.items() if (value := r()) is not None})
        for key in range(self._length, len(parts)) if self._length is not None else ():
            del parts[key]


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
            for key, value in node.take_apart().items():  # which is kept, so that no identity is used twice
                kind = type(value)
                if kind in ATOMS or (kind in CONTAINERS and not value):
                    continue
                child = seen[id(value)] if id(value) in seen else self._node_of(value, seen)
                if child is not None:
                    node.links[key] = child
        norms: list[Any] = [node._item for node in self._nodes if node.is_norm]
        statistics = {id(buffer) for norm in norms for buffer in norm._buffers.values()}
        self._versions = [(x, x._version) for x in self.frozen if id(x) not in statistics]
        self._statistics = [(x, x._version) for x in self.frozen if id(x) in statistics]

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


class Survey:
    """A comparison of the contents of a callable now with those of the forward pass.

    Args:
        root: the node of the callable.
        item: the callable.
        isolated: whether what has not changed is to be copied as well, as far as it can, since another thread may
            change it before the copy is done with.

    Attributes:
        items: by node, the object there is for it now; None for one that has to be made again.
        holders: by node, those that hold it.
        changed: the nodes that hold anything else than they did.
        norms: those of batch norms that would count an evaluation.
        differences: the places, and what is there now.
    """

    def __init__(self, root: Node, item: Any, *, isolated: bool) -> None:
        self.items: dict[Node, Any] = {root: item}
        self.holders: dict[Node, list[tuple[Node, Any]]] = {root: []}
        self.changed: dict[Node, list[Any]] = {}
        self.norms: list[Node] = []
        self.differences: list[Any] = []
        self.isolated = isolated
        queue = [root]
        for node in queue:
            self._compare(node, queue)

    @property
    def differs(self) -> bool:
        """Return whether a copy is needed."""
        return self.isolated or bool(self.changed or self.norms)

    def _compare(self, node: Node, queue: list[Node]) -> None:
        item = self.items[node]
        parts: Mapping[Any, Any] = {} if item is None else node.anatomy.view(item)
        for key in node.changed_keys(parts):
            self._note(node, key, parts)
        for key, child in node.links.items():
            now = parts.get(key, MISSING)
            if not child.is_at(now):
                if not child.can_be_made(set()):
                    continue  # gone: it stays what it is now, which shows where steps are compared
                self._note(node, key, parts)
                now = child.original()
            if child not in self.items:
                self.items[child] = now
                self.holders[child] = []
                queue.append(child)
            self.holders[child].append((node, key))
        if node.is_norm and _counts({**parts, **node.strong}):
            self.norms.append(node)

    def _note(self, node: Node, key: Any, parts: Mapping[Any, Any]) -> None:
        self.changed.setdefault(node, []).append(key)
        self.differences += (node, key, parts.get(key, MISSING))


def _counts(attributes: Parts) -> bool:
    """Return whether a batch norm of these attributes changes its statistics when it is evaluated."""
    has_statistics = attributes["track_running_stats"] and attributes["_buffers"].get("running_mean") is not None
    return bool(attributes["training"] and has_statistics)


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
