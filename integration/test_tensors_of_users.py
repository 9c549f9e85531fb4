"""Tensors that users get can be saved, pickled and copied as without the flag, and nothing is put on any of theirs."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.numerics.solvers.ode import SOLVER_DICT

from .fields import Y0, T, mlp
from .hosts import EXPLICIT, FLAG, KEPT, SOLVERS, every_solver, keeping, solve

every_kept = pytest.mark.parametrize("what", KEPT)
STEPPED = ("euler", "midpoint", "rk4", "dopri5", "tsit5", "alf")


def saved(tensor: Tensor) -> Tensor:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    stream.seek(0)
    return torch.load(stream)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "saved": saved,
    "pickled": lambda tensor: pickle.loads(pickle.dumps(tensor)),
    "copied": copy.deepcopy,
}


def after(way: str, tensor: Tensor) -> Any:
    """Return the tensor that a way of copying gives, or the type of the error that it raises."""
    try:
        return WAYS[way](tensor)
    except Exception as error:
        return type(error), str(error)


def assert_goes_as(way: str, actual: Tensor, expected: Tensor) -> None:
    ours, theirs = after(way, actual), after(way, expected)
    if not isinstance(theirs, Tensor):
        assert ours == theirs  # tensors with a history are not copied
        return
    assert isinstance(ours, Tensor), ours
    assert torch.equal(ours, actual)
    assert ours.requires_grad == theirs.requires_grad


@every_kept
@every_solver
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gradient", [True, False])
def test_a_solution(solver, what, way, gradient) -> None:
    with keeping(what), torch.set_grad_enabled(gradient):
        actual, expected = (solve(solver, flag, mlp(), Y0, T) for flag in (True, False))
    assert_goes_as(way, actual, expected)
    assert_goes_as(way, actual.detach(), expected.detach())


def step(name: str) -> list[Tensor]:
    """Return the tensors that a step of torchdyn's gives, but the error estimate, which has no graph with the flag."""
    solver, x = SOLVER_DICT[name](dtype=torch.float64), Y0.clone()
    x = torch.cat([x, x], -1) if name.endswith("alf") else x
    x, t, dt = x.requires_grad_(), torch.zeros((), dtype=torch.float64), torch.full((), 0.1, dtype=torch.float64)
    solver.sync_device_dtype(x, T)
    last_slope, end, _, *slopes = solver.step(mlp(), x, t, dt, None)
    return [part for part in (last_slope, end, *(slopes[0] if slopes else ())) if isinstance(part, Tensor)]


@every_kept
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPPED)
def test_what_a_step_returns(name, way, what) -> None:
    with keeping(what):
        actual, expected = step(f"{FLAG}:{name}"), step(name)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_goes_as(way, ours, theirs)
        assert vars(ours) == {}


class Seeing(nn.Module):
    """A field that keeps all tensors that it is given and returns; at the end it returns a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.slope = mlp(), nn.Parameter(torch.ones_like(Y0))
        self.context = torch.sin(self.field.w1.sum())
        self.seen: list[Tensor] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self.slope if t > 0.9 else self.field(t, y) + self.context
        self.seen += [t, y, slope]
        return slope

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.seen += [x for x in (t0, y0, dt) if isinstance(x, Tensor)]


@every_kept
@pytest.mark.parametrize("solver", [*(f"torchdiffeq {method}" for method in EXPLICIT), *SOLVERS[2:], "torchdyn dopri5"])
def test_nothing_is_put_on_any_tensor_that_a_user_gets(solver, what) -> None:
    field, y0, t = Seeing(), Y0.clone().requires_grad_(), T.clone()
    seen = field.seen  # as it is: f's attributes are put back in the backward pass to what they were
    with keeping(what):
        y = solve(solver, True, field, y0, t)
        tensors = [y, y0, t, field.context, *field.parameters()]
        assert [vars(x) for x in (*tensors, *seen) if vars(x)] == []
        (y**2).sum().backward()
    assert [vars(x) for x in (*tensors, *seen) if vars(x)] == []
    assert [vars(x.grad) for x in tensors if x.is_leaf and x.grad is not None and vars(x.grad)] == []
