"""Reports of solves: counts, bytes and times, for `symplectic_plugin.profile()`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass
class SolveReport:
    """One solve, and its backward passes so far.

    Attributes:
        host: "torchdiffeq" or "torchdyn".
        method: the base method.
        accepted, rejected: steps.
        evaluations: number of evaluations of f in the forward pass.
        recomputed: number of evaluations of f in backward passes.
        vjps: number of vector-Jacobian products of f.
        checkpoint_bytes: the most bytes that states of steps and stages took at a time.
        graph_bytes: the most bytes that graphs took.
        evaluation_bytes: bytes that one evaluation of f keeps with its graph.
        budget_bytes: bytes that the solve and its backward pass may take; infinite for a policy without a budget.
        policy: the option `checkpoint`.
        kept: the checkpoints when the forward pass ended, in words; set only for reports that a profile holds.
        forward_seconds, backward_seconds: wall-clock times.
        is_seen: whether a profile holds it.
    """

    is_seen: ClassVar[bool] = False

    host: str = ""
    method: str = ""
    accepted: int = 0
    rejected: int = 0
    evaluations: int = 0
    recomputed: int = 0
    vjps: int = 0
    checkpoint_bytes: int = 0
    graph_bytes: int = 0
    evaluation_bytes: int = 0
    budget_bytes: float = float("inf")
    policy: str = ""
    kept: str = ""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


@dataclass(eq=False)
class Profile:
    """The reports of the solves that began while a profile was taken.

    Attributes:
        solves: their reports, in the order in which they began.
    """

    solves: list[SolveReport] = field(default_factory=list)

    def __iter__(self) -> Iterator[SolveReport]:
        return iter(self.solves)

    def __len__(self) -> int:
        return len(self.solves)

    def __getitem__(self, index: int) -> SolveReport:
        return self.solves[index]

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the reports as dictionaries, for JSON or a data frame."""
        return [asdict(solve) for solve in self.solves]

    def __str__(self) -> str:
        names = [entry.name for entry in fields(SolveReport)]
        rows = [[_text(name, getattr(solve, name)) for name in names] for solve in self.solves]
        heads = [name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ") for name in names]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (heads, *rows)
        ]
        return "\n".join(lines)


@contextlib.contextmanager
def profile() -> Iterator[Profile]:
    """Report on the solves with an exact gradient that begin within, in any thread, and on their backward passes.

    Yields:
        A sequence of `SolveReport`, which prints as a table.

    >>> with symplectic_plugin.profile() as solves:
    ...     loss(torchdiffeq.odeint(f, y0, t, method="symplectic_adjoint")).backward()
    >>> print(solves)
    """
    taken = Profile()
    _active.append(taken)
    try:
        yield taken
    finally:
        _active.remove(taken)


_active: list[Profile] = []


def new_report(host: str, method: str, policy: str) -> SolveReport:
    """Make the report of a solve that begins, and add it to the profiles that are being taken."""
    report = SolveReport(host, method, policy=policy)
    for taken in _active:
        taken.solves.append(report)
        report.is_seen = True  # type: ignore[misc]
    return report


@contextlib.contextmanager
def timed(report: SolveReport) -> Iterator[None]:
    """Count the time within as time of the backward pass."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        report.backward_seconds += time.perf_counter() - begin


def _text(name: str, value: Any) -> str:
    if name.endswith("_seconds"):
        return f"{value * 1e3:.1f} ms"
    if name.endswith("_bytes"):
        if value == float("inf"):
            return "no limit"
        return f"{value / 2**20:.2f} MiB" if value >= 2**20 else f"{value / 2**10:.2f} KiB"
    return str(value)
