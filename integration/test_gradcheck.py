"""First and second derivatives are those that differences of the solutions show, whatever is kept."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import Tensor

pytest.importorskip("torchdyn")

from torchdyn.numerics import odeint

from .fields import random
from .hosts import FLAG, KEPT, keeping

W = 0.5 * random(2, 2)
Y0 = random(2, seed=1)
T = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
# Steps of a given size, since differences also see how a chosen size changes. The start is no grid point of its own.
SOLVES = {
    "torchdiffeq rk4": {},
    "torchdiffeq rk4 between grid points": {"step_size": 0.25},
    "torchdiffeq dopri5": {"first_step": 0.25, "max_step": 0.25},
    "torchdyn rk4": {},
}


def solution(name: str, y0: Tensor, w: Tensor, t: Tensor) -> Tensor:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(w @ y) * torch.cos(t)

    host, method = name.split()[:2]
    if host == "torchdyn":
        return odeint(f, y0, t, solver=f"{FLAG}:{method}")[1]
    return torchdiffeq.odeint(f, y0, t, method=f"{FLAG}:{method}", rtol=1e6, atol=1e6, options=SOLVES[name])


def inputs(of_times: bool) -> tuple[Tensor, ...]:
    return Y0.clone().requires_grad_(), W.clone().requires_grad_(), T.clone().requires_grad_(of_times)


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("of_times", [False, True])
@pytest.mark.parametrize("name", SOLVES)
def test_first_derivatives(name, of_times, what) -> None:
    with keeping(what):
        assert torch.autograd.gradcheck(lambda *x: solution(name, *x), inputs(of_times))


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("of_times", [False, True])
@pytest.mark.parametrize("name", SOLVES)
def test_second_derivatives(name, of_times, what) -> None:
    with keeping(what):
        assert torch.autograd.gradgradcheck(lambda *x: solution(name, *x), inputs(of_times))
