"""Entry point that torch calls at the end of ``import torch``: installs an import hook and does nothing else.

Most programs import a host after torch, so the hook waits for the host. It watches modules of the host other than the
package itself: in a program whose first import is the host, the host imports torch, and :func:`autoload` is called
while the package and its first modules are half executed. Every order of imports executes the watched modules after
torch.

An exception from :func:`autoload` would make ``import torch`` fail, also in programs that use no ODE library, so errors
are reported as warnings.
"""

import sys
from functools import partial

# Watched module of a host -> name of the host.
HOOKED_MODULES = {
    "torchdiffeq._impl.adjoint": "torchdiffeq",
    "torchdyn.numerics.odeint": "torchdyn",
    "torchdyn.core.problems": "torchdyn",
}


def autoload() -> None:
    """Register with hosts that are imported, and with the others when they are imported.

    Further calls change nothing. No exception is raised.
    """
    try:
        install_hook()
        for module, host in HOOKED_MODULES.items():
            if module in sys.modules:
                _host_executed(host)
    except Exception as error:
        _complain(f"symplectic-plugin could not prepare for the ODE libraries' import ({error!r}); use register()")


def is_active() -> bool:
    """Tell whether the import hook is installed."""
    return any(getattr(finder, "reports_to", None) == __name__ for finder in sys.meta_path)


def install_hook() -> None:
    """Install the import hook, unless it is installed."""
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
    except Exception:  # a broken installation, of which no module may be importable
        print(message, file=sys.stderr)
