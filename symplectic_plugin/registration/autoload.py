"""Entry point that torch calls at the end of ``import torch``: installs an import hook and does nothing else.

Most programs import a host after torch, so the hook waits for the host. It watches modules of the host other than the
package itself: in a program whose first import is the host, the host imports torch, and :func:`autoload` is called
while the package and its first modules are half executed. Every order of imports executes the watched modules after
torch.

An exception from :func:`autoload` would make ``import torch`` fail, also in programs that use no ODE library, so errors
are reported as warnings.
"""

import sys


def autoload() -> None:
    """Register with hosts that are imported, and with the others when they are imported.

    Further calls change nothing. No exception is raised.
    """
    try:
        from symplectic_plugin.registration.import_hook import HOOKED_MODULES, install_hook

        install_hook(_host_executing, _host_executed)
        for module, host in HOOKED_MODULES.items():
            if module in sys.modules:
                _host_executed(host)
    except Exception as error:
        _complain(f"symplectic-plugin could not prepare for the ODE libraries' import ({error!r}); use register()")


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
