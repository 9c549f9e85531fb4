"""Solvers put into one table of a host, and their removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from symplectic_plugin.registration.discovery import Found, failure

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence


class Registration:
    """Solvers that were put into one table of a host. Entries of the host and the user are never overwritten.

    Args:
        table: table of the host, from names to solvers.
    """

    def __init__(self, table: MutableMapping[str, Any]) -> None:
        self.table = table
        self._entries: dict[str, Found] = {}
        self._variants: set[str] = set()
        self._installed: list[Any] = []

    @property
    def distributions(self) -> dict[str, str]:
        """Distributions by registered name."""
        return {name: entry.distribution for name, entry in self._entries.items()}

    def fill(self, found: Sequence[Found]) -> list[str]:
        """Put solvers and their variants into the table, where they are not yet; returns warnings for the user."""
        problems: list[str] = []
        self._entries = {name: entry for name, entry in self._entries.items() if self._is_in_table(name, entry)}
        present = [each for each in found if self._put_solver(each, problems)]
        # No variant is built on another one: the result depends neither on the order nor on the number of calls.
        variants = self._variants & self._entries.keys()
        methods = {name: solver for name, solver in self.table.items() if name not in variants}
        for each in present:
            self._put_variants(each, methods, problems)
        return problems

    def withdraw(self) -> list[str]:
        """Remove everything from the table; returns warnings for the user."""
        problems = []
        for name, entry in self._entries.items():
            if self._is_in_table(name, entry):
                del self.table[name]
        for solver in reversed(self._installed):
            try:
                if callable(getattr(solver, "uninstall", None)):
                    solver.uninstall()
            except Exception as error:
                problems.append(f"{solver!r} cannot be uninstalled: {error!r}")
        return problems

    def _is_in_table(self, name: str, entry: Found) -> bool:
        """Tell whether the entry is still in the table, where the user may have replaced it."""
        return self.table.get(name) is entry.solver

    def _put_solver(self, found: Found, problems: list[str]) -> bool:
        if found.name not in self._entries and found.name not in self.table:
            try:
                self._install(found.solver)
            except Exception as error:
                problems.append(failure("cannot be installed", found.name, found.distribution, error))
                return False
        return self._put(found, problems)

    def _put_variants(self, found: Found, methods: dict[str, Any], problems: list[str]) -> None:
        name, distribution, solver = found
        if not callable(getattr(solver, "variants", None)):
            return
        try:
            variants = dict(solver.variants(name, {other: each for other, each in methods.items() if other != name}))
        except Exception as error:
            problems.append(failure("has no variants", name, distribution, error))
            return
        for variant, variant_solver in variants.items():
            self._variants.add(variant)
            self._put(Found(variant, distribution, variant_solver), problems)

    def _put(self, found: Found, problems: list[str]) -> bool:
        """Put a solver into the table, unless its name is taken; returns whether the name is registered."""
        name = found.name
        if name not in self._entries:
            if name in self.table:
                problems.append(
                    f"{found.distribution}: {name!r} is not registered, a solver of that name exists already"
                )
                return False
            self.table[name] = found.solver
            self._entries[name] = found
        return True

    def _install(self, solver: Any) -> None:
        if any(solver is each for each in self._installed):  # a solver with two names
            return
        if callable(getattr(solver, "install", None)):
            solver.install()
        self._installed.append(solver)
