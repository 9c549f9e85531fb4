"""What the import system is asked to tell: that a module is about to be executed, has been, or is complete.

Whatever is called back from here runs in the middle of an import of somebody else's module, which must not fail over
it: exceptions and, in programs that make warnings errors, warnings are printed instead.
"""

from __future__ import annotations

import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class ReportingFinder:
    """Finds modules where the other finders find them, and has their execution reported.

    Left on ``sys.meta_path`` it reports every execution: the first, a reload, an import anew.

    Args:
        watched: name of a module -> what to call before and after it is executed.
        reports_to: name of the module that the calls are for; only kept, to tell whose finder this is.
    """

    def __init__(self, watched: Mapping[str, tuple[Callable[[], None], Callable[[], None]]], reports_to: str) -> None:
        self.reports_to = reports_to
        self._watched = watched
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another finder that asks all the others would ask this one again, and so on for ever: it is answered None.
        if fullname not in self._watched or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._searching.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ReportingLoader(spec.loader, *self._watched[fullname])  # type: ignore[assignment]
        return spec

    def _ask_others(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _ReportingLoader:
    """The module's own loader in everything but the reports."""

    def __init__(self, loader: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._loader = loader
        self._before = before
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: ModuleType) -> None:
        # Once executed, the module is to look as if it had been imported without the finder.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _call(self._before)
        self._loader.exec_module(module)
        _call(self._after)


def in_progress(module: str) -> ModuleSpec | None:
    """The spec of the outermost package of ``module``, or of itself, that is in the middle of being imported."""
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = getattr(sys.modules.get(".".join(parts[:depth])), "__spec__", None)
        if getattr(spec, "_initializing", False):
            return spec
    return None


def when_complete(spec: ModuleSpec, call: Callable[[], None]) -> None:
    """Call ``call`` when the import that is in progress has succeeded.

    The import system has no such call. It marks the end by setting ``_initializing`` on the spec to False, which is
    made a property for as long. Where specs have no such attribute, :func:`in_progress` sees no import.
    """
    kind = type(spec)

    def set_initializing(self: Any, value: bool) -> None:
        if value:
            return
        self.__class__ = kind
        self._initializing = value
        if self.name in sys.modules:  # a module whose import failed is not
            _call(call)

    spec.__class__ = type(kind.__name__, (kind,), {"_initializing": property(lambda self: True, set_initializing)})


def complain(message: str) -> None:
    """Warn, without raising in a program that makes warnings errors."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Exception:
        print(f"RuntimeWarning: {message}", file=sys.stderr)


def _call(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        complain(f"symplectic-plugin could not register as it should: {type(error).__name__}: {error}")
