"""Entry points of a group in all installed distributions, loaded."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from symplectic_plugin.registration.import_hook import in_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.machinery import ModuleSpec

_OWN_DISTRIBUTION = "symplectic-plugin"


class Found(NamedTuple):
    """Solver of an entry point, with the entry point's name and distribution (name and version)."""

    name: str
    distribution: str
    solver: Any


def discover(
    group: str, taken: Mapping[str, str], problems: list[str], when_importing: Callable[[ModuleSpec], None]
) -> list[Found]:
    """Load the entry points of a group, one for each name.

    Of two entry points with one name, that of `taken` precedes, then the plugin's own, then the first by distribution.

    Args:
        group: name of the group.
        taken: distributions by the names that are registered already.
        problems: list to which warnings for the user are appended.
        when_importing: called instead of loading an entry point whose module's import is in progress, so that the
            solver may not exist yet, with the spec of the module.
    """
    found = []
    for entry_point in _one_by_name(group, taken, problems):
        if (importing := in_progress(entry_point.module)) is not None:
            when_importing(importing)
            continue
        try:
            solver = entry_point.load()
            if not callable(solver):
                raise TypeError(f"{solver!r} is not callable")
        except Exception as error:
            problems.append(failure("cannot be loaded", entry_point.name, _distribution(entry_point), error))
        else:
            found.append(Found(entry_point.name, _distribution(entry_point), solver))
    return found


def failure(what: str, name: str, distribution: str, error: Exception) -> str:
    """Format the warning about an entry point that failed."""
    return f"{distribution}: the entry point {name!r} {what}: {type(error).__name__}: {error}"


def _one_by_name(group: str, taken: Mapping[str, str], problems: list[str]) -> list[EntryPoint]:
    """List the first entry point of each name by precedence, and append the conflicts to `problems`."""

    def precedence(entry_point: EntryPoint) -> tuple[bool, bool, str, str]:
        distribution = _distribution(entry_point)
        return (
            taken.get(entry_point.name) != distribution,
            distribution.split()[0] != _OWN_DISTRIBUTION,
            distribution,
            entry_point.value,
        )

    first: dict[str, EntryPoint] = {}
    for entry_point in sorted(entry_points(group=group), key=precedence):
        winner = _distribution(first.setdefault(entry_point.name, entry_point))
        if winner != _distribution(entry_point):  # an editable install can be listed twice under one distribution
            problems.append(
                f"{winner} and {_distribution(entry_point)} both have a {entry_point.name!r} in {group}: the one of "
                f"{winner} is used"
            )
    if not first:
        problems.append(f"no installed distribution has entry points in {group}: pip install {_OWN_DISTRIBUTION}")
    return list(first.values())


def _distribution(entry_point: EntryPoint) -> str:
    distribution = entry_point.dist
    if distribution is None:
        return "unknown 0"
    return f"{distribution.name.lower().replace('_', '-')} {distribution.version}"
