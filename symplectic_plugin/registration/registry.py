"""From entry points into the hosts' own registries of solvers, and back out.

A host is a library with tables of solvers by name. For each table there is a group of entry points, and what the
installed distributions declare in that group is put into the table under the names they chose:

==========================  =======================================================================
group                       table
==========================  =======================================================================
``torchdiffeq.solvers``     ``SOLVERS`` in ``torchdiffeq._impl.odeint``
``torchdyn.solvers``        ``SOLVER_DICT`` in ``torchdyn.numerics.solvers.ode``
``torchdyn.sensitivities``  ``SENSITIVITIES`` in ``symplectic_plugin.hosts.torchdyn``: torchdyn has none
==========================  =======================================================================

An entry point's object is what the host's table holds (for torchdiffeq, a solver class). Two optional parts, each a
callable attribute of the object, are used where present:

``variants(name, solvers)``
    Further names for solvers built on the other methods in the table. ``name`` is the entry point's name, ``solvers``
    the table without the object itself and without any variant; returns a mapping from names to solvers.
``install()``, ``uninstall()``
    Called once when the object is registered and unregistered, for what a table entry cannot do.

A name that the host has already, or that the user gave to something else, is never overwritten.
"""

from __future__ import annotations

import sys
import threading
import warnings
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from symplectic_plugin.registration.import_hook import complain, in_progress, when_complete

if TYPE_CHECKING:
    from collections.abc import MutableMapping


class Group(NamedTuple):
    """A group of entry points, the host's table that they go into, and the module that must be loaded before."""

    name: str
    module: str
    table: str
    after: str


# Host (the name of its package, and of its distribution) -> its groups.
HOSTS: dict[str, tuple[Group, ...]] = {
    "torchdiffeq": (
        Group("torchdiffeq.solvers", "torchdiffeq._impl.odeint", "SOLVERS", after="torchdiffeq._impl.adjoint"),
    ),
    "torchdyn": (
        Group("torchdyn.solvers", "torchdyn.numerics.solvers.ode", "SOLVER_DICT", after="torchdyn.numerics.odeint"),
        Group(
            "torchdyn.sensitivities",
            "symplectic_plugin.hosts.torchdyn",
            "SENSITIVITIES",
            after="torchdyn.core.problems",
        ),
    ),
}

_SLOW_TO_IMPORT = ("torchdyn",)
_OWN_DISTRIBUTION = "symplectic-plugin"


class _Entry(NamedTuple):
    solver: Any
    distribution: str
    is_variant: bool


@dataclass
class _Registration:
    """What has been put into one table."""

    table: MutableMapping[str, Any]
    entries: dict[str, _Entry] = field(default_factory=dict)
    installed: list[Any] = field(default_factory=list)


class _Found(NamedTuple):
    name: str
    distribution: str
    solver: Any


_registrations: dict[str, dict[Group, _Registration]] = {}  # by host
_left_alone: set[str] = set()  # hosts that the user unregistered
_lock = threading.RLock()


def register(host: str | None = None) -> None:
    """Put the solvers of all installed distributions into a host, by default into every installed one.

    Programs need this only where torch does not load the plugin by itself (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) or
    after :func:`unregister`. A second call changes nothing, except that it takes up distributions installed since, and
    variants of methods that the host got since.

    A distribution whose solver cannot be loaded, or whose name for it is taken, is reported by a ``RuntimeWarning``
    that names it; the others are registered all the same.

    Args:
        host: the host, which is imported. Without it, torchdiffeq is imported if it is installed, and torchdyn, which
            takes seconds to import, is registered with when the program imports it.

    Raises:
        ValueError: there is no host of that name.
        ImportError: the host is not installed; without an argument, none is.
    """
    from symplectic_plugin.registration import autoload

    installed = [name for name in _chosen(host) if find_spec(name) is not None]
    if not installed:
        name = host or next(iter(HOSTS))
        raise ImportError(f"{name if host else 'no ODE library to register with'} is not installed: pip install {name}")
    for name in installed:
        _left_alone.discard(name)
        if host is not None or name not in _SLOW_TO_IMPORT:
            for group in HOSTS[name]:
                import_module(group.after)
    autoload.install_hook()
    for name in installed:
        for problem in _register(name):
            warnings.warn(problem, RuntimeWarning, stacklevel=2)


def unregister(host: str | None = None) -> None:
    """Put a host (by default, every host) back to what it was before, until :func:`register` is called.

    A host that is not registered with, or not even imported or installed, is left alone from then on.

    Raises:
        ValueError: there is no host of that name.
    """
    for name in _chosen(host):
        _left_alone.add(name)
        for problem in _withdraw(name):
            warnings.warn(problem, RuntimeWarning, stacklevel=2)


def registered() -> dict[str, dict[str, str]]:
    """What is registered: for each group of entry points, the names and the distribution, with its version, of each."""
    with _lock:
        return {
            group.name: {name: entry.distribution for name, entry in registration.entries.items()}
            for by_group in _registrations.values()
            for group, registration in by_group.items()
        }


def host_executing(host: str) -> None:
    """Called by the import hook before the host's module is executed, the first time or in a reload.

    What was installed into the module goes before the reload, which would otherwise leave half of it.
    """
    for problem in _withdraw(host):
        complain(problem)


def host_executed(host: str) -> None:
    """Called by the import hook when a module of the host's has been executed."""
    if host in _left_alone:
        return
    # Until the host's packages are complete, what the entry points name could not import from them in the usual way.
    waited_for = [spec for group in HOSTS[host] if (spec := in_progress(group.after)) is not None]
    for spec in waited_for[:1]:
        when_complete(spec, partial(host_executed, host))
    for problem in _register(host):
        complain(problem)


def _chosen(host: str | None) -> list[str]:
    if host is not None and host not in HOSTS:
        raise ValueError(f"unknown host {host!r}: the hosts are {', '.join(sorted(HOSTS))}")
    return list(HOSTS) if host is None else [host]


def _register(host: str) -> list[str]:
    """Register with what is imported of a host; returns what is to be warned of, once everything else is done."""
    problems: list[str] = []
    for group in HOSTS[host]:
        if group.after not in sys.modules or in_progress(group.after) is not None:
            continue
        # Outside the lock: importing takes locks of its own, and another thread may hold those and want this one.
        found = _find(host, group, problems)
        with _lock:
            _fill(_registration(host, group, problems), found, problems)
    return problems


def _registration(host: str, group: Group, problems: list[str]) -> _Registration:
    try:
        table = getattr(import_module(group.module), group.table)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"this version of {host} has no {group.module}.{group.table}") from error
    known = _registrations.get(host, {}).get(group)
    if known is not None and known.table is not table:  # a reloaded module has a new table
        problems += _withdraw(host)
    return _registrations.setdefault(host, {}).setdefault(group, _Registration(table))


def _find(host: str, group: Group, problems: list[str]) -> list[_Found]:
    """The group's entry points, loaded; of two with one name, the one that is registered already or sorts first."""
    taken = registered().get(group.name, {})

    def precedence(entry_point: EntryPoint) -> tuple[bool, bool, str, str]:
        distribution = _distribution(entry_point)
        return (
            taken.get(entry_point.name) != distribution,
            distribution.split()[0] != _OWN_DISTRIBUTION,
            distribution,
            entry_point.value,
        )

    first: dict[str, EntryPoint] = {}
    for entry_point in sorted(entry_points(group=group.name), key=precedence):
        winner = first.setdefault(entry_point.name, entry_point)
        # An editable install can be listed twice under one distribution.
        if _distribution(winner) != _distribution(entry_point):
            problems.append(
                f"{_distribution(winner)} and {_distribution(entry_point)} both have a {entry_point.name!r} in "
                f"{group.name}: the one of {_distribution(winner)} is used"
            )
    if not first:
        problems.append(f"no installed distribution has entry points in {group.name}: pip install {_OWN_DISTRIBUTION}")
    found = []
    for entry_point in first.values():
        importing = in_progress(entry_point.module)
        if importing is not None:  # its module is what imports the host, and does not have the object yet
            when_complete(importing, partial(host_executed, host))
            continue
        try:
            solver = entry_point.load()
            if not callable(solver):
                raise TypeError(f"{solver!r} is not callable")
        except Exception as error:
            problems.append(_failure("cannot be loaded", entry_point.name, _distribution(entry_point), error))
        else:
            found.append(_Found(entry_point.name, _distribution(entry_point), solver))
    return found


def _fill(registration: _Registration, found: list[_Found], problems: list[str]) -> None:
    table, entries = registration.table, registration.entries
    for name in [name for name, entry in entries.items() if table.get(name) is not entry.solver]:
        del entries[name]  # the user has put something else there since

    def put(name: str, entry: _Entry) -> bool:
        if name in entries:
            return True
        if name in table:
            problems.append(f"{entry.distribution}: {name!r} is not registered, a solver of that name exists already")
            return False
        table[name] = entry.solver
        entries[name] = entry
        return True

    present = []
    for name, distribution, solver in found:
        if name not in entries and name not in table:
            try:
                _install(registration, solver)
            except Exception as error:
                problems.append(_failure("cannot be installed", name, distribution, error))
                continue
        if put(name, _Entry(solver, distribution, is_variant=False)):
            present.append((name, distribution, solver))

    # Without variants in it, so that what comes out does not depend on the order or on how often this is done.
    methods = {name: solver for name, solver in table.items() if not (name in entries and entries[name].is_variant)}
    for name, distribution, solver in present:
        if not callable(getattr(solver, "variants", None)):
            continue
        try:
            variants = dict(solver.variants(name, {other: each for other, each in methods.items() if other != name}))
        except Exception as error:
            problems.append(_failure("has no variants", name, distribution, error))
            continue
        for variant, variant_solver in variants.items():
            put(variant, _Entry(variant_solver, distribution, is_variant=True))


def _install(registration: _Registration, solver: Any) -> None:
    if any(solver is each for each in registration.installed):  # it has two names
        return
    if callable(getattr(solver, "install", None)):
        solver.install()
    registration.installed.append(solver)


def _withdraw(host: str) -> list[str]:
    """Take everything out of a host again; returns what is to be warned of."""
    problems = []
    with _lock:
        for registration in _registrations.pop(host, {}).values():
            for name, entry in registration.entries.items():
                if registration.table.get(name) is entry.solver:
                    del registration.table[name]
            for solver in reversed(registration.installed):
                try:
                    if callable(getattr(solver, "uninstall", None)):
                        solver.uninstall()
                except Exception as error:
                    problems.append(f"{solver!r} cannot be uninstalled from {host}: {error!r}")
    return problems


def _distribution(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist
    if distribution is None:
        return "unknown 0"
    return f"{distribution.name.lower().replace('_', '-')} {distribution.version}"


def _failure(what: str, name: str, distribution: str, error: Exception) -> str:
    return f"{distribution}: the entry point {name!r} {what}: {type(error).__name__}: {error}"
