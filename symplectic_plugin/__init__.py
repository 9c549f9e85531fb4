"""Exact gradients of neural ODEs by the symplectic adjoint method, for the PyTorch ODE libraries, by one flag.

torch imports this package at the end of every ``import torch``, whether the program solves an ODE or not. The package
therefore imports no module until a public name is first used (PEP 562).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from symplectic_plugin.field.report import profile
    from symplectic_plugin.methods.read_tableau import read_tableau
    from symplectic_plugin.methods.tableau import ButcherTableau, partner_tableau
    from symplectic_plugin.registration.registry import register, registered, unregister

__version__ = "0.1.0"

__all__ = [
    "ButcherTableau",
    "__version__",
    "partner_tableau",
    "profile",
    "read_tableau",
    "register",
    "registered",
    "unregister",
]

_MODULE_OF = {
    "register": "registration.registry",
    "registered": "registration.registry",
    "unregister": "registration.registry",
    "profile": "field.report",
    "ButcherTableau": "methods.tableau",
    "partner_tableau": "methods.tableau",
    "read_tableau": "methods.read_tableau",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
