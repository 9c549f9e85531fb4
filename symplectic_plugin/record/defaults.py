"""Defaults of the options that decide what is kept of a solve, and the hook by which tests shrink them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Defaults:
    """Values that hold where a solve's own options do not say otherwise.

    Attributes:
        checkpoint: the policy, one of `POLICIES`.
        budget: bytes that a solve may take under the policy "auto", even where it could do with much less.
        snapshots: number of states that the policy "binomial" keeps.
        live_graphs: whether a solve may keep autograd's own graph of all its steps, where that fits.
        offload: where states are put, as the option `offload`; None for the device's memory.
    """

    checkpoint: str = "auto"
    budget: int = 32 * 2**20
    snapshots: int = 32
    live_graphs: bool = True
    offload: str | os.PathLike[str] | None = None


DEFAULTS = Defaults()
"""The values in force, for every thread of the process."""


@contextlib.contextmanager
def override(**values: Any) -> Iterator[None]:
    """Put other defaults in force for as long: the one hook for tests, which need small budgets and every policy.

    Args:
        **values: new values of some attributes of `Defaults`.

    Raises:
        TypeError: if there is no such attribute.
    """
    if unknown := values.keys() - {field.name for field in fields(Defaults)}:
        raise TypeError(f"there is no default named {', '.join(sorted(unknown))}")
    before = {name: getattr(DEFAULTS, name) for name in values}
    vars(DEFAULTS).update(values)
    try:
        yield
    finally:
        vars(DEFAULTS).update(before)
