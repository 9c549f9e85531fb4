"""Tableaux: reading them off step functions, order conditions, and symplectic partners."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symplectic_plugin import ButcherTableau, partner_tableau, read_tableau
from symplectic_plugin.hosts.torchdiffeq._compat import solver_table
from symplectic_plugin.hosts.torchdiffeq.methods import is_one_step, read_method
from symplectic_plugin.hosts.torchdiffeq.recorded_solver import recorded_solver
from symplectic_plugin.methods.implicit_tableaux import METHODS

from .rooted_trees import density, elementary_weight, trees
from .strategies import tableaux


def _own_solver_table() -> list[str]:
    return [name for name, solver in solver_table().items() if is_one_step(solver) and name not in METHODS]


def _tableau(name: str) -> ButcherTableau:
    """Read the tableau of a torchdiffeq method."""
    options = {"rtol": 1e-3, "atol": 1e-3, "norm": torch.linalg.vector_norm}
    solver = recorded_solver(solver_table()[name])(func=None, y0=torch.zeros(2, dtype=torch.float64), **options)
    return read_method(solver)[0]


def _step(tableau: ButcherTableau):
    """Build the step function of an explicit tableau."""

    def step(f, t, x, h):
        k = []
        for i in range(tableau.stages):
            k.append(f(t + tableau.c[i] * h, x + h * sum((tableau.a[i, j] * k[j] for j in range(i)), 0 * x)))
        return x + h * sum(b * slope for b, slope in zip(tableau.b, k, strict=True))

    return step


def test_a_tableau_can_not_be_changed() -> None:
    tableau = ButcherTableau(torch.zeros(1, 1), torch.ones(1), torch.zeros(1))
    with pytest.raises(AttributeError):
        tableau.b = torch.zeros(1)


@pytest.mark.parametrize(
    ("a", "b", "c", "complaint"),
    [
        ([[0.0, 0.0], [0.5, 0.0]], [0.0, 1.0], [0.0, 0.6], r"row 1 of a sums to 0\.5, but c\[1\] is 0\.6"),
        ([[0.0, 0.0]], [0.0, 1.0], [0.0, 0.5], r"a must have shape \(2, 2\)"),
        ([[0.0]], [1.0], [0.0, 0.0], r"c \(1,\)"),
        ([[0.0]], [[1.0]], [0.0], r"b must have shape \(s,\)"),
        ([[float("nan")]], [1.0], [0.0], "finite"),
    ],
)
def test_a_tableau_that_does_not_fit_together_is_refused(a, b, c, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        ButcherTableau(torch.tensor(a), torch.tensor(b), torch.tensor(c))


@given(tableaux())
def test_a_tableau_is_read_off_a_step_as_it_was(tableau: ButcherTableau) -> None:
    read = read_tableau(_step(tableau))
    assert read.explicit
    torch.testing.assert_close(read.a, tableau.a, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(read.b, tableau.b, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(read.c, tableau.c, rtol=1e-14, atol=1e-14)


def _adams_bashforth():
    previous = []

    def step(f, t, x, h):
        previous.append(f(t, x))
        return x + h * previous[-1] if len(previous) < 4 else x + h * (1.5 * previous[-1] - 0.5 * previous[-2])

    return step


def _backward_euler(f, t, x, h):
    y = x
    for _ in range(100):
        y, before = x + h * f(t + h, y), y
        if (y - before).norm() < 1e-12:
            break
    return y


@pytest.mark.parametrize(
    "step",
    [
        _adams_bashforth(),
        _backward_euler,
        lambda f, t, x, h: x + h * f(t, x) ** 2,
        lambda f, t, x, h: x + h * f(t, x).clamp(-0.1, 1),
        lambda f, t, x, h: x + h * f(t, x[: len(x) // 2 + 1].mean() + 0 * x),
        lambda f, t, x, h: x + h * f(t, x) + h**2 * torch.ones_like(x),
        lambda f, t, x, h: x,
    ],
    ids=["multistep", "iterated", "squared", "clamped", "projected", "with a source", "without f"],
)
def test_what_is_not_a_runge_kutta_step_is_refused(step) -> None:
    with pytest.raises(ValueError, match="not an explicit Runge-Kutta step"):
        read_tableau(step)


@pytest.mark.parametrize("name", _own_solver_table())
def test_order_conditions_hold_up_to_the_order_torchdiffeq_gives(name: str) -> None:
    tableau = _tableau(name)
    for order in range(1, solver_table()[name].order + 1):
        for tree in trees(order):
            assert elementary_weight(tree, tableau) == pytest.approx(1 / density(tree), abs=1e-12)


def test_there_are_as_many_rooted_trees_as_there_should_be() -> None:
    assert [len(trees(order)) for order in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]  # OEIS A000081


@pytest.mark.parametrize("name", ["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"])
def test_an_adaptive_methods_tableau_is_torchdiffeqs_own(name: str) -> None:
    tableau, theirs = _tableau(name), solver_table()[name].tableau
    assert tableau.c[1:].tolist() == theirs.alpha.tolist()
    assert tableau.b.tolist() == theirs.c_sol.tolist()
    for i, beta in enumerate(theirs.beta):
        assert tableau.a[i + 1, : i + 1].tolist() == beta.tolist()


def test_methods_whose_last_stage_is_the_solution_are_told_apart() -> None:
    assert {name for name in _own_solver_table() if _tableau(name).first_same_as_last} >= {"dopri5", "dopri8", "bosh3"}
    assert not any(_tableau(name).first_same_as_last for name in ("fehlberg2", "adaptive_heun", "rk4", "euler"))


@given(tableaux())
def test_the_partner_meets_the_symplecticity_condition(tableau: ButcherTableau) -> None:
    partner = partner_tableau(tableau)
    defect = partner.b[:, None] * partner.a + partner.b[None, :] * tableau.a.T - tableau.b[:, None] * partner.b[None, :]
    assert defect.abs().max() <= 1e-14 * (1 + partner.a.abs().max() * partner.b.abs().max())
    assert torch.equal(partner.c, tableau.c)


@given(tableaux(zero_weights=False))
def test_the_partner_has_the_methods_own_weights_where_none_is_zero(tableau: ButcherTableau) -> None:
    partner = partner_tableau(tableau)
    assert torch.equal(partner.b, tableau.b)
    assert partner.e.eq(1).all()
    expected = tableau.b[None, :] - tableau.b[None, :] * tableau.a.T / tableau.b[:, None]
    torch.testing.assert_close(partner.a, expected, rtol=1e-14, atol=1e-14)


def test_the_implicit_midpoint_method_is_its_own_partner() -> None:
    tableau = ButcherTableau(torch.tensor([[0.5]]), torch.tensor([1.0]), torch.tensor([0.5]))
    partner = partner_tableau(tableau)
    assert torch.equal(partner.a, tableau.a)
    assert not tableau.explicit


@given(tableaux(), st.integers(0, 2**31), st.floats(0.01, 0.5))
def test_the_partner_conserves_the_product_of_adjoint_and_variation(
    tableau: ButcherTableau, seed: int, h: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w1, w2, x, delta, adjoint = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 4), (3, 5), (3,), (3,), (3,))
    )

    def f(t, x):
        return w2 @ torch.tanh(w1 @ torch.cat([x, t.reshape(1)]))

    t = torch.tensor(0.3, dtype=torch.float64)
    stages: list[tuple[torch.Tensor, torch.Tensor]] = []

    def noted(t, x):
        stages.append((t, x))
        return f(t, x)

    step = _step(tableau)
    step(noted, t, x, h)
    _, delta_after = torch.func.jvp(lambda x: step(f, t, x, h), (x,), (delta,))

    # Lambda_i = e_i lambda_{n+1} + h sum_j (e_i b_j - a_ij) l_j, from the last stage to the first.
    partner = partner_tableau(tableau)
    coefficients = partner.e[:, None] * partner.b[None, :] - partner.a
    slopes = torch.zeros(tableau.stages, 3, dtype=torch.float64)
    for i in reversed(range(tableau.stages)):
        stage = partner.e[i] * adjoint + h * (coefficients[i] @ slopes)
        _, vjp = torch.func.vjp(lambda x, i=i: f(stages[i][0], x), stages[i][1])
        slopes[i] = vjp(stage)[0]
    adjoint_before = adjoint + h * (partner.b @ slopes)

    scale = adjoint.norm() * delta_after.norm() + adjoint_before.norm() * delta.norm()
    assert abs(adjoint_before @ delta - adjoint @ delta_after) <= 1e-13 * scale


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, symplectic_plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
