"""Hosts, by name: their tables of solvers, and the groups of entry points that are put into each table."""

from __future__ import annotations

from typing import NamedTuple


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

SLOW_TO_IMPORT = ("torchdyn",)
"""Hosts that are only imported where they are named, as that takes seconds."""


def chosen(host: str | None) -> list[str]:
    """List the named host, or all hosts for None.

    Raises:
        ValueError: if there is no host of that name.
    """
    if host is not None and host not in HOSTS:
        raise ValueError(f"unknown host {host!r}: the hosts are {', '.join(sorted(HOSTS))}")
    return list(HOSTS) if host is None else [host]
