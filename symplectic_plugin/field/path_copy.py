"""Path copying: a copy of an object as it was, made along the paths to what has changed, which shares everything else.

As persistent data structures do (Driscoll, Sarnak, Sleator, Tarjan, Making Data Structures Persistent, 1989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from .anatomy import ATTRIBUTES, CODE, Function, Object, Parts, is_infrastructure, is_library
from .node import Node
from .survey import Survey


class Copying:
    """Copies objects, each of them once.

    Args:
        survey: what the objects are made of now, and what has changed.
    """

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._buffers = {norm.links["_buffers"] for norm in survey.norms if "_buffers" in norm.links}
        gone = [node for node, item in survey.items.items() if item is None]
        self._needed = self._above([*survey.changed, *self._buffers, *gone], through_code=True)
        may_change = [node for node, item in survey.items.items() if survey.isolated and _may_be_changed(node, item)]
        self._wanted = self._above(may_change, through_code=False)
        self._copies: dict[Node, Any] = {}
        self._variables: dict[int, dict[str, Any]] = {}
        self._to_fill: list[Callable[[], None]] = []

    def copy(self, root: Node) -> Any:
        """Return the object of a node as it was."""
        copy = self._of(root)
        while self._to_fill:
            self._to_fill.pop()()
        return copy

    def _above(self, nodes: Iterable[Node], through_code: bool) -> set[Node]:
        """Nodes, and all that hold one of them; not by classes and libraries' globals unless `through_code`."""
        above = set(nodes)
        queue = list(above)
        for node in queue:
            for holder, key in self._survey.holders[node]:
                if holder not in above and (through_code or self._is_users(holder, key)):
                    above.add(holder)
                    queue.append(holder)
        return above

    def _is_users(self, holder: Node, key: Any) -> bool:
        """Return whether a part belongs to what users write: no class's code, no global of a library's function."""
        if not is_code(holder, key):
            return not _is_torchs(holder.kind)
        return key != CODE and not is_library(self._survey.items[holder].__module__)

    def _is_replaced(self, holder: Node, key: Any, child: Node) -> bool:
        """Return whether a copy of the holder holds a copy of this part."""
        return child in self._needed or (child in self._wanted and self._is_users(holder, key))

    def _of(self, node: Node) -> Any:
        """Return the object of a node: the one that is there, or a copy, which is filled later if it can be."""
        if node in self._copies:
            return self._copies[node]
        if node not in self._needed and node not in self._wanted:
            return self._survey.items[node]
        try:
            new, is_made = self._new(node)
        except Exception as error:
            if node in self._needed:
                raise RuntimeError(_refusal(node, error)) from error
            new, is_made = self._survey.items[node], True
        self._copies[node] = new
        if not is_made:
            self._to_fill.append(functools.partial(self._fill, node, new))
        return new

    def _fill(self, node: Node, new: Any) -> None:
        try:
            node.anatomy.fill(new, self._parts(node))
        except Exception as error:
            raise RuntimeError(_refusal(node, error)) from error

    def _new(self, node: Node) -> tuple[Any, bool]:
        """A copy of a node's object, and whether it holds its parts already."""
        item = self._survey.items[node]
        if isinstance(node.anatomy, Function):
            cells = [self._of(node.links[i]) if i in node.links else c for i, c in enumerate(item.__closure__ or ())]
            return Function.of(item, tuple(cells), self._globals(node, item)), False
        if node.anatomy.is_mutable:
            return node.anatomy.empty(node.kind, item), False
        made = node.anatomy.made(node.kind, self._parts(node))
        return self._copies.get(node, made), True  # it was made meanwhile if it holds itself

    def _parts(self, node: Node) -> Parts:
        """Return what a node's object is to hold."""
        item = self._survey.items[node]
        parts = {} if item is None else node.anatomy.parts(item)
        node.put_into(parts)
        parts.update(self._linked(node))
        parts = {key: parts[key] for key in dict.fromkeys((*node.keys, *parts)) if key in parts}
        if node in self._buffers:
            parts = {name: x.clone() if isinstance(x, Tensor) else x for name, x in parts.items()}
        return parts

    def _linked(self, node: Node) -> Parts:
        """Return the parts that are taken apart themselves and are there."""
        return {
            key: self._of(child)
            for key, child in node.links.items()
            if (node, key) in self._survey.holders.get(child, ())
            and (self._is_replaced(node, key, child) or not is_code(node, key))
        }

    def _globals(self, node: Node, function: Any) -> dict[str, Any]:
        """Return the globals of a copied function: others than the original's only where one that it names differs."""
        variables: dict[str, Any] = function.__globals__
        changed = self._survey.changed.get(node, ())
        names = {key for key in changed if is_code(node, key)}
        names |= {
            key for key, child in node.links.items() if is_code(node, key) and self._is_replaced(node, key, child)
        }
        if not names:
            return variables
        mine = self._variables.setdefault(id(variables), dict(variables))
        self._to_fill.append(functools.partial(self._fill_globals, node, mine, names))
        return mine

    def _fill_globals(self, node: Node, variables: dict[str, Any], names: set[str]) -> None:
        parts: Parts = {}
        node.put_into(parts)
        parts.update(self._linked(node))
        variables.update({name: parts[name] for name in names if name in parts})


def is_code(holder: Node, key: Any) -> bool:
    """Return whether a part belongs to a function's globals or to an object's class, not to the object itself."""
    is_global = isinstance(holder.anatomy, Function) and isinstance(key, str) and key not in ATTRIBUTES
    return is_global or (key == CODE and isinstance(holder.anatomy, Object))


def _may_be_changed(node: Node, item: Any) -> bool:
    """Return whether another thread may give an object other parts, and a copy of it does as well as the object."""
    if item is None or not node.anatomy.is_mutable or isinstance(node.anatomy, Function):
        return False
    if not isinstance(node.anatomy, Object):
        return True
    return not (_is_torchs(node.kind) or is_infrastructure(node.kind) or hasattr(node.kind, "__del__"))


def _is_torchs(kind: type) -> bool:
    """Return whether a class is one of torch, which may have programs for the very objects, as torch.jit has."""
    module = str(kind.__module__)
    return module.partition(".")[0] == "torch" and not module.startswith("torch.nn.")


def _refusal(node: Node, error: Exception) -> str:
    name = f"{node.kind.__module__}.{node.kind.__qualname__}"
    return (
        f"symplectic_adjoint: the vector field holds an object of class {name} that can't be copied ({error}). The "
        "backward pass needs a copy, since the object leads to a batch norm in training mode or to what was changed "
        "after the forward pass: put batch norms in eval mode, call backward() before the change, or let copy.copy "
        "work for the object."
    )
