"""Binomial checkpointing: the states of a stretch of steps in reverse order, from its first one and a few snapshots.

The optimal schedules are those of Griewank and Walther (Algorithm 799: revolve, ACM TOMS 26, 2000), from the package
checkpoint-schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def reversed_states(
    first: Any,
    steps: int,
    snapshots: int,
    advance: Callable[[int, Any], Any],
    put: Callable[[Any], Any],
    get: Callable[[Any], Any],
) -> Iterator[Any]:
    """What is at the start of each step, the last step's first.

    Args:
        first: what is at the start of the first one.
        steps: how many there are.
        snapshots: how many of them may be held at once, `first` among them.
        advance: takes the number of a step and what is at its start, and returns what is at its end.
        put: puts something into storage, and returns what `get` gets it back with.
        get: the reverse.
    """
    if steps == 1:
        yield first
        return
    import checkpoint_schedules as schedules  # where it is needed, since it imports numpy and others

    stored: dict[int, Any] = {}
    current = first
    for action in schedules.MultistageCheckpointSchedule(steps, max(1, snapshots), 0):
        if isinstance(action, schedules.Forward):
            if action.write_ics:
                stored[action.n0] = put(current)
            if not action.write_adj_deps:  # else it is the step whose turn it is, which needs no more than its start
                for n in range(action.n0, action.n1):
                    current = advance(n, current)
        elif isinstance(action, schedules.Copy):
            current = get(stored[action.n])
        elif isinstance(action, schedules.Move):
            current = get(stored.pop(action.n))
        elif isinstance(action, schedules.Reverse):
            yield current
        elif isinstance(action, schedules.EndReverse):
            return


def positions(steps: int, snapshots: int) -> set[int]:
    """Of a known number of steps, those at whose start a snapshot is best taken on the way forward."""
    if steps == 1:
        return {0}
    import checkpoint_schedules as schedules

    taken = set()
    for action in schedules.MultistageCheckpointSchedule(steps, max(1, snapshots), 0):
        if isinstance(action, schedules.EndForward):
            break
        if isinstance(action, schedules.Forward) and action.write_ics:
            taken.add(action.n0)
    return taken
