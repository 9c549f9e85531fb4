"""Where torchdiffeq has implicit methods of its own, as its main branch does, their coefficients are the ones used."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torchdiffeq
from torchdiffeq._impl import rk_common
from torchdiffeq._impl.solvers import FixedGridODESolver

from .exactness import Outcome, errors
from .fields import MLP
from .hosts import FLAG, REGISTRY

ROOT = math.sqrt(3) / 6


class FixedGridFIRKODESolver(FixedGridODESolver):
    """As that of torchdiffeq's main branch, but for its iteration."""

    def _step_func(self, func, t0, dt, t1, y0):
        raise AssertionError("its coefficients are taken, not its steps")


class FixedGridDIRKODESolver(FixedGridFIRKODESolver):
    def _step_func(self, func, t0, dt, t1, y0):
        raise AssertionError("its coefficients are taken, not its steps")


def method(family: type, order: int, alpha: list[float], beta: list[list[float]], b: list[float]) -> type:
    def tensor(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    tableau = rk_common._ButcherTableau(tensor(alpha), [tensor(row) for row in beta], tensor(b), tensor([]))
    return type("Theirs", (family,), {"order": order, "tableau": tableau})


def gauss(second_time: float) -> type:
    rows = [[1 / 4, 1 / 4 - ROOT], [1 / 4 + ROOT, 1 / 4]]
    return method(FixedGridFIRKODESolver, 4, [1 / 2 - ROOT, second_time], rows, [1 / 2, 1 / 2])


THETA = 0.6
"""Of a method that is in no table here: x_{n+1} = x_n + h ((1 - theta) k_n + theta k_{n+1})."""


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(rk_common, "FixedGridFIRKODESolver", FixedGridFIRKODESolver, raising=False)
    monkeypatch.setattr(rk_common, "FixedGridDIRKODESolver", FixedGridDIRKODESolver, raising=False)

    def register(name: str, theirs: type) -> None:
        monkeypatch.setitem(REGISTRY, name, theirs)
        for variant, solver in REGISTRY[FLAG].variants(FLAG, {name: theirs}).items():
            monkeypatch.setitem(REGISTRY, variant, solver)

    return register


def outcome(name: str) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    field, y0 = MLP(3, 4, generator), torch.randn(2, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    return Outcome(field, y0, t, method=name, options={"step_size": 0.1})


def test_their_coefficients_are_used_and_their_iteration_is_not(register) -> None:
    rows = [[0.0], [1 - THETA, THETA]]
    register("theta", method(FixedGridDIRKODESolver, 1, [0.0, 1.0], rows, [1 - THETA, THETA]))
    field = torch.nn.Linear(1, 1, bias=False).double()
    h, rate = 0.5, field.weight.item()
    y0, t = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, h], dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: field(y), y0, t, method=FLAG, options={"solver": "theta"})[-1]
    (gradient,) = torch.autograd.grad(y, field.weight)
    below = 1 - THETA * h * rate
    assert float(y.detach()) == pytest.approx((1 + (1 - THETA) * h * rate) / below, rel=1e-14)
    assert float(gradient) == pytest.approx(
        ((1 - THETA) * h * below + THETA * h * (1 + (1 - THETA) * h * rate)) / below**2
    )


def test_a_method_that_both_have_gives_the_same_as_ours(register) -> None:
    expected = outcome(f"{FLAG}:gl4")
    register("gl4", gauss(1 / 2 + ROOT))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        actual = outcome(f"{FLAG}:gl4")
    assert max(errors(actual, expected).values()) <= 1e-13


def test_coefficients_that_contradict_each_other_are_replaced_with_a_warning(register) -> None:
    expected = outcome(f"{FLAG}:gl4")
    register("gl4", gauss(1 / 2 - ROOT))  # as they are on torchdiffeq's main branch
    with pytest.warns(UserWarning, match=r"gl4 has wrong coefficients.*row 1 of a sums to 0\.78"):
        actual = outcome(f"{FLAG}:gl4")
    assert torch.equal(actual.values, expected.values)
    assert max(errors(actual, expected).values()) == 0


def test_those_of_a_method_that_is_not_known_here_are_refused(register) -> None:
    register("another", gauss(1 / 2 - ROOT))
    with pytest.raises(ValueError, match="coefficients of another: ButcherTableau: row 1"):
        outcome(f"{FLAG}:another")


def test_a_step_of_ones_own_is_refused(register) -> None:
    class Own(gauss(1 / 2 + ROOT)):
        def _step_func(self, func, t0, dt, t1, y0):
            return dt * func(t1, y0 + dt * func(t1, y0 + dt * func(t0, y0)) ** 2), func(t0, y0)

    register("own", Own)
    with pytest.raises(ValueError, match="not an explicit Runge-Kutta step"):
        outcome(f"{FLAG}:own")


def test_methods_that_torchdiffeq_has_are_left_to_it() -> None:
    theirs = type("Gl4", (), {})
    variants = REGISTRY[FLAG].variants(FLAG, {"gl4": theirs})
    assert "gl4" not in variants
    assert {"radauIIA5", "kencarp3", f"{FLAG}:radauIIA5"} <= variants.keys()
