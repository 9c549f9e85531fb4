"""However many solves, with a backward pass or without: nothing of them is left, not even for the collector to find."""

from __future__ import annotations

import collections
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

STATE_BYTES = 32 * 1024
LITTLE = 3_000_000
"""Bytes that an allocator takes once and for all: some thirty states."""
T = torch.tensor([0.0, 0.1], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "euler": {}, "rk4": {}, "dopri5": {"first_step": 0.1}, "adaptive_heun": {"first_step": 1e-3, "max_step": 2e-3}
}  # fmt: skip


class Field(nn.Module):
    """f with a parameter, a tensor that has a history, and a backward pass that raises when told to."""

    fails = False  # of the class, so that it is not put back in the backward pass to what it was

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.encoded = False

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        if Field.fails:
            raise ZeroDivisionError
        return torch.tanh(self.w * y) + (self.context if self.encoded else 0)


class Torchdiffeq:
    """A model that is solved by torchdiffeq."""

    def __init__(self, method: str) -> None:
        self.field = Field()
        self.y0 = torch.ones(STATE_BYTES // 8, dtype=torch.float64).requires_grad_()
        self.method, self.options = f"symplectic_adjoint:{method}", OPTIONS[method]

    def solve(self, **options: Any) -> Tensor:
        self.field.context = torch.sin(self.field.w)
        return torchdiffeq.odeint(self.field, self.y0, T, method=self.method, options={**self.options, **options})[-1]


class Torchdyn(Torchdiffeq):
    """Solves by torchdyn."""

    def __init__(self, method: str) -> None:
        core = pytest.importorskip("torchdyn.core")
        super().__init__(method)
        self.ode = core.NeuralODE(self.field, solver=method, sensitivity="symplectic_adjoint", return_t_eval=False)

    def solve(self, checkpoint: str | None = None) -> Tensor:
        self.field.context = torch.sin(self.field.w)
        self.ode.solver.checkpoint = checkpoint
        return self.ode(self.y0, T)[-1]


def without_backward(model: Torchdiffeq) -> None:
    model.solve()


def with_backward(model: Torchdiffeq) -> None:
    model.solve().sum().backward()


def with_a_failing_backward_pass(model: Torchdiffeq) -> None:
    loss = model.solve(checkpoint="steps").sum()
    Field.fails = True
    try:
        loss.backward()
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("it did not fail")
    finally:
        Field.fails = False


def with_a_graph_of_the_gradient(model: Torchdiffeq) -> None:
    model.y0.requires_grad_(False)
    model.solve().sum().backward(create_graph=True)
    model.field.w.grad = None


def with_second_derivatives(model: Torchdiffeq) -> None:
    first = torch.autograd.grad((model.solve() ** 2).sum(), model.y0, create_graph=True)
    torch.autograd.grad(first[0].sum(), model.field.w)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def objects() -> collections.Counter[str]:
    return collections.Counter(type(x).__qualname__ for x in gc.get_objects())


def assert_nothing_left(work: Callable[[], None], solves: int) -> None:
    gc.collect()
    gc.freeze()  # what is there already is not counted
    gc.disable()
    try:
        for _ in range(10):
            work()
        objects()  # counting leaves something behind itself the first time
        gc.collect()
        before, blocks, resident = objects(), sys.getallocatedblocks(), resident_bytes()
        for _ in range(solves):
            work()
        # No cycle that waits to be collected holds a tensor, a node of a graph, or a record of a solve.
        growth = {name: count - before[name] for name, count in objects().items() if count > before[name]}
        assert not any("Tensor" in name or "Backward" in name or name.startswith("_") for name in growth), growth
        assert resident_bytes() - resident <= LITTLE, growth
        gc.collect()
        growth = {name: count - before[name] for name, count in objects().items() if count > before[name]}
        assert max(growth.values(), default=0) <= 50, growth
        assert resident_bytes() - resident <= LITTLE
        assert sys.getallocatedblocks() - blocks <= 10_000  # of which the counts above are most
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory in use can't be read")
class TestNothingIsLeft:
    @pytest.mark.parametrize(("work", "solves"), [(with_backward, 10_000), (without_backward, 2_000)])
    def test_of_thousands_of_solves(self, work, solves) -> None:
        model = Torchdiffeq("euler")
        assert_nothing_left(lambda: work(model), solves)

    @pytest.mark.parametrize("host", [Torchdiffeq, Torchdyn])
    @pytest.mark.parametrize(
        ("method", "work"),
        [
            ("rk4", with_backward),
            ("dopri5", with_backward),
            ("dopri5", without_backward),
            ("rk4", with_a_failing_backward_pass),
            ("rk4", with_second_derivatives),
            ("rk4", with_a_graph_of_the_gradient),
        ],
    )
    def test_of_a_hundred(self, host, method, work) -> None:
        model = host(method)
        model.field.encoded = True
        assert_nothing_left(lambda: work(model), 100)

    def test_of_states_taken_again_with_their_slopes(self) -> None:
        model = Torchdiffeq("adaptive_heun")
        assert_nothing_left(lambda: model.solve(checkpoint="binomial").sum().backward(), 20)
