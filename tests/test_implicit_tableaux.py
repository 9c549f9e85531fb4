"""Order, stability and symplecticity of the implicit methods' coefficients."""

from __future__ import annotations

import itertools

import pytest
import torch

from symplectic_plugin import ButcherTableau
from symplectic_plugin.methods.implicit_tableaux import METHODS, ImplicitMethod
from symplectic_plugin.methods.midpoint_weights import midpoint_weights

from .rooted_trees import Tree, density, trees

PAIRS = [name for name, method in METHODS.items() if method.embedded is not None]
L_STABLE = ["implicit_euler", "sdirk2", "trbdf2", "radauIIA3", "radauIIA5", *PAIRS]


def _parts(method: ImplicitMethod) -> list[ButcherTableau]:
    return [method.tableau] if method.nonstiff is None else [method.tableau, method.nonstiff]


def _stage_weights(tree: Tree, parts: list[ButcherTableau]) -> list[torch.Tensor]:
    """List phi_i of a tree with each branch in each of the parts, as the order conditions of additive methods need."""
    branches = [[part.a @ w for part in parts for w in _stage_weights(branch, parts)] for branch in tree]
    one = torch.ones_like(parts[0].b)
    return [torch.stack([one, *choice]).prod(0) for choice in itertools.product(*branches)]


def _worst(weights: torch.Tensor, method: ImplicitMethod, order: int, theta: float = 1.0) -> float:
    return max(
        abs(float(weights @ phi) - theta**order / density(tree))
        for tree in trees(order)
        for phi in _stage_weights(tree, _parts(method))
    )


def _stability_function(tableau: ButcherTableau, z: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Compute R(z) = 1 + z b^T (I - z A)^{-1} 1, the solution after one step of dx/dt = lambda x from 1, z = lambda h.

    Args:
        tableau: coefficients of the method.
        z: complex numbers, any shape.
        weights: weights in place of b, shape (s,).

    Returns:
        R, complex128, of the shape of z.
    """
    z = z.to(torch.complex128)
    a = tableau.a.to(z)
    b = (tableau.b if weights is None else weights).to(z)
    identity, ones = torch.eye(tableau.stages, dtype=z.dtype), torch.ones(tableau.stages, 1, dtype=z.dtype)
    slopes = torch.linalg.solve(identity - z[..., None, None] * a, ones.expand(*z.shape, -1, 1))
    return 1 + z * (slopes[..., 0] @ b)


@pytest.mark.parametrize("name", METHODS)
def test_order_conditions_hold_up_to_the_order_and_no_further(name: str) -> None:
    method = METHODS[name]
    for order in range(1, method.order + 1):
        assert _worst(method.tableau.b, method, order) <= 2e-15
    assert _worst(method.tableau.b, method, method.order + 1) > 1e-4


@pytest.mark.parametrize("name", PAIRS)
def test_the_embedded_method_is_one_order_lower(name: str) -> None:
    method = METHODS[name]
    for order in range(1, method.order):
        assert _worst(method.embedded, method, order) <= 2e-15
    assert _worst(method.embedded, method, method.order) > 1e-4


@pytest.mark.parametrize(
    ("name", "order"), [("kencarp3", 3), ("kencarp3_imex", 2), ("kencarp5", 4), ("kencarp5_imex", 3)]
)
def test_the_midpoint_has_its_order(name: str, order: int) -> None:
    method = METHODS[name]
    for low in range(1, order + 1):
        assert _worst(method.midpoint, method, low, 0.5) <= 2e-15
    at_infinity = _stability_function(method.tableau, torch.tensor([-1e8]), method.midpoint).abs()
    assert at_infinity < (0.75 if name == "kencarp3" else 1e-4)


def test_a_midpoint_that_can_not_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match="no weights of order 4"):
        midpoint_weights([METHODS["kencarp3"].tableau], 4, 0)


@pytest.mark.parametrize("name", METHODS)
def test_the_method_is_a_stable(name: str) -> None:
    z = 1j * torch.logspace(-3, 6, 2000, dtype=torch.float64)
    assert _stability_function(METHODS[name].tableau, z).abs().max() <= 1 + 1e-12
    left = -torch.logspace(-3, 6, 200, dtype=torch.float64)[:, None] * torch.exp(
        1j * torch.linspace(-torch.pi / 2, torch.pi / 2, 51, dtype=torch.float64)
    )
    assert _stability_function(METHODS[name].tableau, left).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("name", L_STABLE)
def test_l_stable_methods_are_and_are_stiffly_accurate(name: str) -> None:
    tableau = METHODS[name].tableau
    assert _stability_function(tableau, torch.tensor([-1e7])).abs() < 1e-5
    if name != "sdirk2":
        assert tableau.first_same_as_last
    assert torch.equal(tableau.a[-1], tableau.b)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(L_STABLE)))
def test_the_others_are_not(name: str) -> None:
    assert _stability_function(METHODS[name].tableau, torch.tensor([-1e7])).abs() > 0.99


@pytest.mark.parametrize("name", ["implicit_midpoint", "gl4", "gl6"])
def test_symplectic_methods_are(name: str) -> None:
    a, b = METHODS[name].tableau.a, METHODS[name].tableau.b
    assert (b[:, None] * a + b * a.T - b[:, None] * b).abs().max() <= 1e-16


@pytest.mark.parametrize("name", METHODS)
def test_no_stage_is_beyond_the_step(name: str) -> None:
    c = METHODS[name].tableau.c
    assert c.min() >= 0
    assert c.max() <= 1


def test_what_is_not_an_implicit_method_is_refused() -> None:
    singular = ButcherTableau(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.5, 0.5]), torch.zeros(2))
    full = ButcherTableau(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0.5, 0.5]), torch.ones(2))
    with pytest.raises(ValueError, match="invertible"):
        ImplicitMethod("it", 1, full)
    with pytest.raises(ValueError, match="same weights and times"):
        ImplicitMethod("it", 1, METHODS["trapezoid"].tableau, nonstiff=singular)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        ImplicitMethod("it", 1, METHODS["trapezoid"].tableau, embedded=torch.ones(3))
