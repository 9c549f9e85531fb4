"""The entry point that torch calls at the end of ``import torch``: an import hook and nothing else.

A host library is usually imported after torch, so what is left behind is a hook that waits for it. The module that is
hooked is not the host's package: a program whose first import is the host imports torch, and so gets here, while the
package and its first modules are already half executed. One that every import order reaches after torch is hooked.

An exception that left :func:`autoload` would make ``import torch`` fail, for programs that may not use an ODE library
at all: it says what went wrong and carries on.
"""

import sys
from functools import partial

# The host's module that is waited for -> the host, as the registry calls it.
HOOKED_MODULES = {
    "torchdiffeq._impl.adjoint": "torchdiffeq",
    "torchdyn.numerics.odeint": "torchdyn",
    "torchdyn.core.problems": "torchdyn",
}


def autoload() -> None:
    """Register with the hosts as soon as they are imported; right away with those that already are.

    Calling it again does nothing more. Raises nothing, whatever happens.
    """
    try:
        install_hook()
        for module, host in HOOKED_MODULES.items():
            if module in sys.modules:
                _host_executed(host)
    except Exception as error:
        _complain(f"symplectic-plugin could not prepare for the ODE libraries' import ({error!r}); use register()")


def is_active() -> bool:
    """Whether the import hook is in place."""
    return any(getattr(finder, "reports_to", None) == __name__ for finder in sys.meta_path)


def install_hook() -> None:
    """Put the import hook in place, once."""
    from symplectic_plugin.registration.import_hook import ReportingFinder

    if not is_active():
        watched = {
            module: (partial(_host_executing, host), partial(_host_executed, host))
            for module, host in HOOKED_MODULES.items()
        }
        sys.meta_path.insert(0, ReportingFinder(watched, reports_to=__name__))


def _host_executing(host: str) -> None:
    from symplectic_plugin.registration import registry

    registry.host_executing(host)


def _host_executed(host: str) -> None:
    from symplectic_plugin.registration import registry

    registry.host_executed(host)


def _complain(message: str) -> None:
    try:
        from symplectic_plugin.registration.import_hook import complain

        complain(message)
    except Exception:  # nothing of the package can be relied on here
        print(message, file=sys.stderr)
