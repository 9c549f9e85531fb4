"""Nothing of a solve outlives its result, with the garbage collector off, however far a backward pass got."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

import pytest
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from symplectic_plugin.record import defaults
from symplectic_plugin.record.store import POLICIES

from .fields import Y0, T, mlp
from .hosts import KEPT, SOLVERS, solve


class Sentinel:
    """Takes weak references."""


class Field(nn.Module):
    """A field that holds an object, and raises after a number of evaluations."""

    def __init__(self, sentinel: Sentinel) -> None:
        super().__init__()
        self.net, self.sentinel, self.left = mlp(), sentinel, [10**9]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise ZeroDivisionError
        return self.net(t, y)


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


WHAT = KEPT | {policy: {"checkpoint": policy, "snapshots": 2} for policy in POLICIES if policy != "auto"}


def work(solver: str, until: str, y0: Tensor, field: Field) -> None:
    """Solve, and go back as far as told; all but what is handed in is gone then."""
    if until == "an exception on the way forward":
        field.left[0] = 7
        with pytest.raises(ZeroDivisionError):
            solve(solver, True, field, y0, T)
        return
    y = solve(solver, True, field, y0, T)
    if until == "no backward pass":
        return
    if until == "an exception in the backward pass":
        field.left[0] = 2
        with contextlib.suppress(ZeroDivisionError):
            y.sum().backward()
        return
    loss = {"an early output": y[1], "the initial state": y[0], "the end": y[-1]}[until].sum()
    loss.backward()
    field.zero_grad()


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize(
    "until",
    [
        "no backward pass",
        "the initial state",
        "an early output",
        "the end",
        "an exception on the way forward",
        "an exception in the backward pass",
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_stays_alive(solver, until, what) -> None:
    sentinel, y0 = Sentinel(), Y0.clone().requires_grad_()
    field = Field(sentinel)
    with defaults.override(**WHAT[what]):
        work(solver, until, y0, field)
    references = [weakref.ref(x) for x in (sentinel, y0, field, field.net.w1)]
    del sentinel, y0, field
    assert [reference() for reference in references] == [None] * 4
