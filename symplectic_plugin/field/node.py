"""One object that a vector field is made of, and what has become of it since."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from ._torch_compat import NormBase
from .anatomy import MISSING, Anatomy, Parts, is_infrastructure, keeps_no_graph

_NONE: Mapping[Any, Any] = types.MappingProxyType({})


class Node:
    """The record of one object that a vector field is made of. Once settled, it keeps neither object nor graphs alive.

    Args:
        item: the object.
        anatomy: how it is taken apart.

    Attributes:
        kind: its class.
        item, contents: the object and all its parts by key, until it is settled; None and empty then.
        links: by key, the nodes of the parts that are taken apart themselves.
        strong, weak: by key, the other parts.
        keys: those of all parts, in their order.
        is_norm: whether it is a batch norm or the like.
    """

    __slots__ = (
        "_frame", "_is_complete", "_length", "_reference",
        "anatomy", "contents", "is_norm", "item", "keys", "kind", "links", "strong", "weak",
    )  # fmt: skip

    def __init__(self, item: Any, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.kind = type(item)
        self.is_norm = isinstance(item, NormBase)
        self.links: dict[Any, Node] = {}
        self.strong: Mapping[Any, Any] = _NONE
        self.weak: Mapping[Any, weakref.ref[Any]] = _NONE
        self.keys: Sequence[Any] = ()
        self.item = item
        self.contents: Mapping[Any, Any] = _NONE
        self._is_complete = True
        self._length: int | None = None
        self._frame: Any = None
        self._reference: weakref.ref[Any] | None = None
        try:
            self.contents = anatomy.parts(item)
        except Exception:  # an object that does not let itself be looked into
            self._is_complete = False

    def settle(self) -> None:
        """Keep of the parts those that are still there, strongly only what can't keep a graph alive."""
        item, contents, self.item, self.contents = self.item, self.contents, None, _NONE
        if is_infrastructure(self.kind):
            contents, self.links, self._is_complete = _NONE, {}, False
        with contextlib.suppress(TypeError):
            self._reference = weakref.ref(item) if self.anatomy.has_identity else None
            self._frame = self.anatomy.frame(item)
        now = self.anatomy.parts(item) if contents else {}
        self.keys = tuple(contents)
        if self.anatomy.has_length and len(now) == len(contents):
            self._length = len(now)
        self.strong, self.weak = strong, weak = {}, {}
        for key, value in contents.items():
            if now.get(key, MISSING) is not value:
                self._is_complete = False
                self.links.pop(key, None)
            elif key in self.links:
                continue
            elif keeps_no_graph(value):
                strong[key] = value
            else:
                try:
                    weak[key] = weakref.ref(value)
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
