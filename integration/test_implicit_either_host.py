"""Implicit methods by either host: what is refused, and what has to hold whatever is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from symplectic_plugin.record.store import POLICIES

from .fields import StiffField, T, random
from .hosts import FLAG, IMPLICIT_FIXED, solve

SOLVERS = [
    *(
        f"{host} {method}"
        for host in ("torchdiffeq", "torchdyn")
        for method in ("sdirk2", "trapezoid", "gl4", "kencarp3")
    ),
    "torchdiffeq kencarp3_imex",
]
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def solution(solver: str, field: Any, y0: Tensor | None = None, **options: Any) -> Tensor:
    y0 = torch.ones(2, 2, dtype=torch.float64, requires_grad=True) if y0 is None else y0
    return solve(solver, True, field, y0, T.to(y0.dtype), **options)


@every_solver
@pytest.mark.parametrize("policy", POLICIES)
def test_backward_twice(solver, policy) -> None:
    field = StiffField(2, 0)
    y = solution(solver, field, checkpoint=policy)
    first, second = (torch.autograd.grad(y[-1].sum(), field.w1, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-13, atol=0)


@every_solver
@pytest.mark.parametrize("policy", ["steps", "stages"])
def test_another_field_in_the_backward_pass_is_refused(solver, policy) -> None:
    factor = np.ones(())

    class Changing(StiffField):
        def nonstiff(self, t, x):
            return float(factor) * super().nonstiff(t, x)

    y = solution(solver, Changing(2, 0), checkpoint=policy)
    factor += 1
    with pytest.raises(RuntimeError, match="returned other values in the backward pass"):
        y[-1].sum().backward()


@pytest.mark.parametrize("host", ["torchdiffeq", "torchdyn"])
@pytest.mark.parametrize("method", IMPLICIT_FIXED)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("policy", ["steps", "stages"])
def test_states_of_no_elements(host, method, shape, policy) -> None:
    w, y0 = torch.ones((), dtype=torch.float64, requires_grad=True), random(*shape).requires_grad_()
    y = solution(f"{host} {method}", lambda t, y: -w * t * y, y0, checkpoint=policy)
    y.sum().backward()
    assert y.shape == (4, *shape)
    assert y0.grad.shape == shape
    assert w.grad == 0


class TestRefused:
    @every_solver
    def test_second_derivatives(self, solver) -> None:
        y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(solution(solver, StiffField(2, 0), y0)[-1].sum(), y0, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            first.sum().backward()

    @every_solver
    def test_random_numbers(self, solver) -> None:
        field = StiffField(2, 0)
        field.register_forward_hook(lambda _, args, slope: torch.dropout(slope, 0.5, True))
        with pytest.raises(ValueError, match="draws random numbers"):
            solution(solver, field)

    @every_solver
    def test_autocast(self, solver) -> None:
        class Field(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stiff = self.nonstiff = lambda t, x: 0.5 * (linear @ x)

            def forward(self, t, x):
                return linear @ x

        linear = -torch.eye(2, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="leave autocast off"):
            solution(solver, Field(), torch.ones(2, 2, requires_grad=True))

    @every_solver
    def test_half_precision(self, solver) -> None:
        with pytest.raises(ValueError, match="single or double precision"):
            solution(solver, StiffField(2, 0).bfloat16(), torch.ones(2, dtype=torch.bfloat16))

    @pytest.mark.parametrize("name", ["gl4", f"{FLAG}:gl4"])
    def test_integers(self, name) -> None:
        with pytest.raises(ValueError, match="single or double precision"):
            torchdiffeq.odeint(lambda t, x: -x, torch.ones(2, dtype=torch.int64), torch.tensor([0.0, 1.0]), method=name)
