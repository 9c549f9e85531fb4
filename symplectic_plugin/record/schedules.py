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
    """Yield the states at the starts of steps, the last step's first.

    Args:
        first: state at the start of the first step.
        steps: number of steps.
        snapshots: number of states that may be held at once, `first` included.
        advance: `advance(n, state)` takes step n from the state at its start to the one at its end.
        put: stores a state, and returns a handle.
        get: returns the state of a handle.
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
    """Return the numbers of the steps, out of a known number, whose starts are best kept in the forward pass."""
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
