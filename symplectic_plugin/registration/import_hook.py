"""Reports from the import system: a module is about to be executed, was executed, or is completely imported.

Callbacks run in the middle of an import of another project's module, which must not fail because of them: exceptions
in a callback, and warnings in programs that turn warnings into errors, are printed instead.
"""

from __future__ import annotations

import sys
import threading
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


HOOKED_MODULES = {
    "torchdiffeq._impl.adjoint": "torchdiffeq",
    "torchdyn.numerics.odeint": "torchdyn",
    "torchdyn.core.problems": "torchdyn",
}
"""Names of hosts by the modules that are watched."""


def install_hook(executing: Callable[[str], None], executed: Callable[[str], None]) -> None:
    """Install the import hook for the hosts, unless it is installed.

    Args:
        executing: called with the name of a host before one of its watched modules is executed.
        executed: called so afterwards.
    """
    if not is_active():
        watched = {
            module: (partial(executing, host), partial(executed, host)) for module, host in HOOKED_MODULES.items()
        }
        sys.meta_path.insert(0, ReportingFinder(watched, reports_to=__name__))


def is_active() -> bool:
    """Tell whether the import hook is installed."""
    return any(getattr(finder, "reports_to", None) == __name__ for finder in sys.meta_path)


class ReportingFinder:
    """Finder that delegates to the other finders and reports the execution of the modules it watches.

    On ``sys.meta_path`` it reports every execution: first imports, reloads, and imports after a removal from
    ``sys.modules``.

    Args:
        watched: module name -> functions to call before and after the module is executed.
        reports_to: name of the module that installs the finder, by which the finder can be recognised.
    """

    def __init__(self, watched: Mapping[str, tuple[Callable[[], None], Callable[[], None]]], reports_to: str) -> None:
        self.reports_to = reports_to
        self._watched = watched
        self._searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Returns None to another delegating finder, which would otherwise ask this one without end.
        if fullname not in self._watched or getattr(self._searching, "now", False):
            return None
        self._searching.now = True
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            specs = (finder.find_spec(fullname, path, target) for finder in finders)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._searching.now = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _ReportingLoader(spec.loader, *self._watched[fullname])  # type: ignore[assignment]
        return spec


class _ReportingLoader:
    """Loader that delegates to the module's own loader and reports the execution.

    Args:
        loader: the module's own loader.
        before: called before the module is executed.
        after: called after the module was executed.
    """

    def __init__(self, loader: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._loader = loader
        self._before = before
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: ModuleType) -> None:
        # The executed module must look as if it had been imported without the finder.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _call_safely(self._before)
        self._loader.exec_module(module)
        _call_safely(self._after)


def in_progress(module: str) -> ModuleSpec | None:
    """Return the spec of the outermost package of `module`, or of `module` itself, whose import is in progress.

    The import system marks such a spec by an attribute `_initializing` (CPython 3.4 to 3.14). Without the attribute,
    no import is seen.
    """
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = getattr(sys.modules.get(".".join(parts[:depth])), "__spec__", None)
        if getattr(spec, "_initializing", False):
            return spec
    return None


def when_complete(spec: ModuleSpec, call: Callable[[], None]) -> None:
    """Call a function when an import in progress has succeeded.

    The import system offers no such callback. It marks the end of an import by setting `_initializing` of the spec to
    False, and so the attribute becomes a property until then.

    Args:
        spec: result of :func:`in_progress`.
        call: function to call.
    """
    kind = type(spec)

    def set_initializing(self: Any, value: bool) -> None:
        if value:
            return
        self.__class__ = kind
        self._initializing = value
        if self.name in sys.modules:  # false if the import failed
            _call_safely(call)

    spec.__class__ = type(kind.__name__, (kind,), {"_initializing": property(lambda self: True, set_initializing)})


def complain(message: str) -> None:
    """Issue a RuntimeWarning, as a printed line in programs that turn warnings into errors."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except Exception:
        print(f"RuntimeWarning: {message}", file=sys.stderr)


def _call_safely(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        complain(f"symplectic-plugin could not register as it should: {type(error).__name__}: {error}")
