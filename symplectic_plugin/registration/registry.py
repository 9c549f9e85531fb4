"""Registration of the solvers of all installed distributions with the hosts.

A host is a library with tables of solvers by name. For each table there is a group of entry points, and the entry
points of all installed distributions in that group are put into the table under the names that they declare:

==========================  =======================================================================
group                       table
==========================  =======================================================================
``torchdiffeq.solvers``     ``SOLVERS`` in ``torchdiffeq._impl.odeint``
``torchdyn.solvers``        ``SOLVER_DICT`` in ``torchdyn.numerics.solvers.ode``
``torchdyn.sensitivities``  ``SENSITIVITIES`` in ``symplectic_plugin.hosts.torchdyn``: torchdyn has none
==========================  =======================================================================

An entry point's object is an entry of the host's table (for torchdiffeq, a solver class). Two optional attributes of
the object are called where present:

``variants(name, solvers)``
    Further names for solvers built on the other methods in the table. ``name`` is the entry point's name, ``solvers``
    the table without the object itself and without any variant; returns a mapping from names to solvers.
``install()``, ``uninstall()``
    Changes to the host beside the table, made when the object is registered and undone when it is unregistered.

A name that the host has already, or that the user gave to something else, is never overwritten.
"""

from __future__ import annotations

import sys
import threading
import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from symplectic_plugin.registration.discovery import discover
from symplectic_plugin.registration.import_hook import complain, in_progress, install_hook, when_complete
from symplectic_plugin.registration.registration import Registration


class Group(NamedTuple):
    """Group of entry points and the table of a host for its solvers.

    Attributes:
        name: name of the group.
        module: module that has the table.
        table: name of the table in the module, a mutable mapping from names to solvers.
        after: module of the host that must have been executed before the table is filled.
    """

    name: str
    module: str
    table: str
    after: str


HOSTS: dict[str, tuple[Group, ...]] = {
    "torchdiffeq": (
        Group("torchdiffeq.solvers", "torchdiffeq._impl.odeint", "SOLVERS", after="torchdiffeq._impl.adjoint"),
    ),
    "torchdyn": (
        Group("torchdyn.solvers", "torchdyn.numerics.solvers.ode", "SOLVER_DICT", after="torchdyn.numerics.odeint"),
        # torchdyn itself has no table of sensitivities.
        Group(
            "torchdyn.sensitivities", "symplectic_plugin.hosts.torchdyn", "SENSITIVITIES",
            after="torchdyn.core.problems",
        ),
    ),
}  # fmt: skip
"""Name of a host's package, which is that of its distribution too -> groups of entry points."""

_SLOW_TO_IMPORT = ("torchdyn",)
"""Hosts that are only imported where they are named, as that takes seconds."""

_registrations: dict[str, dict[Group, Registration]] = {}  # by host
_left_alone: set[str] = set()  # hosts that the user unregistered
_lock = threading.RLock()


def register(host: str | None = None) -> None:
    """Put the solvers of all installed distributions into a host, by default into every installed one.

    Programs need this only where torch does not load the plugin by itself (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) or
    after :func:`unregister`. A second call changes nothing, except that it registers distributions installed since, and
    variants of methods that the host got since.

    A distribution whose solver cannot be loaded, or whose name for it is taken, is reported by a ``RuntimeWarning``
    that names it; the others are registered all the same.

    Args:
        host: host to import and register with. By default, torchdiffeq is imported if it is installed, and torchdyn,
            which takes seconds to import, is registered with when the program imports it.

    Raises:
        ValueError: if there is no host of that name.
        ImportError: if the host is not installed; by default, if none is.
    """
    installed = [name for name in _chosen(host) if find_spec(name) is not None]
    if not installed:
        name = host or next(iter(HOSTS))
        raise ImportError(f"{name if host else 'no ODE library to register with'} is not installed: pip install {name}")
    for name in installed:
        _left_alone.discard(name)
        if host is not None or name not in _SLOW_TO_IMPORT:
            for group in HOSTS[name]:
                import_module(group.after)
    install_hook(host_executing, host_executed)
    for name in installed:
        for problem in _register(name):
            warnings.warn(problem, RuntimeWarning, stacklevel=2)


def unregister(host: str | None = None) -> None:
    """Restore a host (by default, every host) to the state before registration, until :func:`register` is called.

    A host that is not registered with, imported or installed yet will not be registered with when it is imported.

    Args:
        host: host to restore.

    Raises:
        ValueError: if there is no host of that name.
    """
    for name in _chosen(host):
        _left_alone.add(name)
        for problem in _withdraw(name):
            warnings.warn(problem, RuntimeWarning, stacklevel=2)


def registered() -> dict[str, dict[str, str]]:
    """List what is registered: group of entry points -> name -> distribution with its version."""
    with _lock:
        return {
            group.name: registration.distributions
            for by_group in _registrations.values()
            for group, registration in by_group.items()
        }


def host_executing(host: str) -> None:
    """Withdraw from a host whose module is about to be executed, the first time or in a reload.

    A reload would otherwise undo half of what solvers installed into the module.
    """
    for problem in _withdraw(host):
        complain(problem)


def host_executed(host: str) -> None:
    """Register with a host of which a module was executed."""
    if host in _left_alone:
        return
    # While the host's packages are incomplete, entry points could not import from them in the usual way.
    incomplete = [spec for group in HOSTS[host] if (spec := in_progress(group.after)) is not None]
    for spec in incomplete[:1]:
        when_complete(spec, partial(host_executed, host))
    for problem in _register(host):
        complain(problem)


def _chosen(host: str | None) -> list[str]:
    """List the named host, or all hosts for None.

    Raises:
        ValueError: if there is no host of that name.
    """
    if host is not None and host not in HOSTS:
        raise ValueError(f"unknown host {host!r}: the hosts are {', '.join(sorted(HOSTS))}")
    return list(HOSTS) if host is None else [host]


def _register(host: str) -> list[str]:
    """Register with the imported modules of a host; returns warnings for the user, to be issued after all else."""
    problems: list[str] = []
    when_importing = partial(when_complete, call=partial(host_executed, host))
    for group in HOSTS[host]:
        if group.after not in sys.modules or in_progress(group.after) is not None:
            continue
        # Outside the lock: loading takes import locks, and a thread that holds one of those may wait for this lock.
        found = discover(group.name, registered().get(group.name, {}), problems, when_importing)
        with _lock:
            problems += _registration(host, group, problems).fill(found)
    return problems


def _registration(host: str, group: Group, problems: list[str]) -> Registration:
    """Return the registration with a host's present table, and append warnings to `problems`.

    Raises:
        RuntimeError: if the host has no such table.
    """
    try:
        table = getattr(import_module(group.module), group.table)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"this version of {host} has no {group.module}.{group.table}") from error
    known = _registrations.get(host, {}).get(group)
    if known is not None and known.table is not table:  # a reloaded module has a new table
        problems += _withdraw(host)
    return _registrations.setdefault(host, {}).setdefault(group, Registration(table))


def _withdraw(host: str) -> list[str]:
    """Remove everything from a host's tables; returns warnings for the user."""
    with _lock:
        registrations = _registrations.pop(host, {}).values()
        return [f"{host}: {problem}" for registration in registrations for problem in registration.withdraw()]
