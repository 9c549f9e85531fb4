"""Entry points of a group in all installed distributions, loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from symplectic_plugin.registration.import_hook import in_progress

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.machinery import ModuleSpec

_OWN_DISTRIBUTION = "symplectic-plugin"


class Found(NamedTuple):
    """Solver of an entry point, with the entry point's name and distribution (name and version)."""

    name: str
    distribution: str
    solver: Any


@dataclass(frozen=True)
class Discovery:
    """Entry points of one group.

    Attributes:
        found: loaded solvers, one for each name.
        importing: specs of entry points' modules whose import is in progress, so that the solver may not exist yet.
        problems: warnings for the user.
    """

    found: list[Found] = field(default_factory=list)
    importing: list[ModuleSpec] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def discover(group: str, taken: Mapping[str, str]) -> Discovery:
    """Load the entry points of a group.

    Of two entry points with one name, that of `taken` precedes, then the plugin's own, then the first by distribution.

    Args:
        group: name of the group.
        taken: distributions by the names that are registered already.
    """
    discovery = Discovery()
    for entry_point in _one_by_name(group, taken, discovery.problems):
        importing = in_progress(entry_point.module)
        if importing is not None:
            discovery.importing.append(importing)
            continue
        try:
            solver = entry_point.load()
            if not callable(solver):
                raise TypeError(f"{solver!r} is not callable")
        except Exception as error:
            discovery.problems.append(failure("cannot be loaded", entry_point.name, _distribution(entry_point), error))
        else:
            discovery.found.append(Found(entry_point.name, _distribution(entry_point), solver))
    return discovery


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
