"""A comparison of what a vector field is made of with what it was made of in the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .anatomy import MISSING, Parts
from .node import Node


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
