"""Steps of implicit methods and of their partners, without a host."""

from __future__ import annotations

import functools
import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symplectic_plugin import partner_tableau
from symplectic_plugin.methods.implicit_step import ImplicitSteps
from symplectic_plugin.methods.implicit_tableaux import METHODS
from symplectic_plugin.methods.newton import NewtonOptions
from symplectic_plugin.methods.transposed_step import TransposedSteps

from .implicit_problems import Linearization, OneStep, RandomField

NAMES = list(METHODS)


@pytest.mark.parametrize("linear_solver", ["dense", "gmres"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.floats(0.01, 0.5), st.floats(1, 300))
def test_the_adjoint_is_that_of_the_implicit_function_theorem(
    name: str, linear_solver: str, seed: int, batch: int, n: int, h: float, stiffness: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    x, cotangent = (torch.randn(batch, n, dtype=torch.float64, generator=random) for _ in range(2))
    step = OneStep(METHODS[name], RandomField(n, seed, stiffness), 0.3, h, NewtonOptions(linear_solver))
    taken, *ours = step.back(x, cotangent)
    end, theirs = step.by_the_implicit_function_theorem(x, taken.stages, cotangent)
    ours = [*ours[:3], *ours[3]]
    assert (x + taken.increment - end).norm() <= 1e-12 * end.norm()
    scale = max(float(g.norm()) for g in theirs)
    for actual, wanted in zip(ours, theirs, strict=True):
        assert (actual - wanted).norm() <= 1e-10 * max(float(wanted.norm()), 1e-2 * scale)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.5))
def test_the_product_of_adjoint_and_variation_is_conserved(name: str, seed: int, h: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x, delta, adjoint = (torch.randn(2, 3, dtype=torch.float64, generator=random) for _ in range(3))
    step = OneStep(METHODS[name], RandomField(3, seed), 0.3, h)
    taken, before, *_ = step.back(x, adjoint)
    # The variational equations (I - h a J) k' = J (delta + ...), for all stages and parts at once.
    method, s = step.method, step.method.tableau.stages
    tableaux = [method.tableau] if method.nonstiff is None else [method.tableau, method.nonstiff]
    times = [torch.tensor(0.3 + c * h, dtype=torch.float64) for c in method.tableau.c.tolist()]
    after = []
    for row in range(2):
        jacobians = [
            [
                torch.func.jacrev(lambda z, f=f, t=t: f(t, z))(x_i[row].detach())
                for t, x_i in zip(times, taken.stages, strict=True)
            ]
            for f in step.functions
        ]
        size = len(tableaux) * s * 3
        matrix, right = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        block = lambda p, i: slice((p * s + i) * 3, (p * s + i + 1) * 3)  # noqa: E731
        for p in range(len(tableaux)):
            for i in range(s):
                right[block(p, i)] = jacobians[p][i] @ delta[row]
                for q, tableau in enumerate(tableaux):
                    for j in range(s):
                        matrix[block(p, i), block(q, j)] -= h * tableau.a[i, j] * jacobians[p][i]
        slopes = torch.linalg.solve(matrix, right).view(len(tableaux), s, 3)
        after.append(delta[row] + h * torch.einsum("i,pin->n", method.tableau.b, slopes))
    after = torch.stack(after)
    scale = before.norm() * delta.norm() + adjoint.norm() * after.norm()
    assert abs((before * delta).sum() - (adjoint * after).sum()) <= 1e-13 * scale


@functools.cache
def _solution(name: str, steps: int) -> torch.Tensor:
    """Compute the solution at t = 1 by this many steps."""
    field, x = RandomField(2, 3, stiffness=2.0), torch.tensor([[0.5, -0.3], [1.0, 0.7]], dtype=torch.float64)
    for i in range(steps):
        x = x + OneStep(METHODS[name], field, i / steps, 1 / steps).take(x).increment
    return x


@pytest.mark.parametrize("name", NAMES)
def test_the_method_has_its_order(name: str) -> None:
    method = METHODS[name]
    coarse = 8 if method.order >= 5 else 16
    errors = [float((_solution(name, n) - _solution("gl6", 64)).norm()) for n in (coarse, 2 * coarse)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(method.order, abs=0.3)


@pytest.mark.parametrize("name", ["implicit_midpoint", "gl4", "gl6"])
def test_symplectic_methods_are_their_own_partners(name: str) -> None:
    tableau = METHODS[name].tableau
    partner = partner_tableau(tableau)
    torch.testing.assert_close(partner.a, tableau.a, rtol=0, atol=2e-16)
    assert torch.equal(partner.b, tableau.b)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"implicit_midpoint", "gl4", "gl6"}))
def test_other_methods_are_not(name: str) -> None:
    tableau = METHODS[name].tableau
    assert (partner_tableau(tableau).a - tableau.a).abs().max() > 0.1


@pytest.mark.parametrize("name", ["kencarp5", "kencarp5_imex", "sdirk2"])
def test_one_graph_of_f_is_alive_at_a_time(name: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Linearization.most_alive = Linearization.alive = 0
    OneStep(METHODS[name], RandomField(3, 0), 0.0, 0.1).back(x, x)
    assert Linearization.most_alive <= 2  # a variable holds one graph while the next one is built


@pytest.mark.parametrize("name", ["kencarp3", "kencarp5"])
def test_a_slope_that_is_handed_on_is_used_and_has_no_product(name: str) -> None:
    x, slope = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    step = OneStep(METHODS[name], RandomField(3, 1), 0.0, 0.1)
    taken = step.take(x, slope)
    assert torch.equal(taken.slopes[0], slope)
    cotangents = torch.randn(taken.slopes.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    adjoint = step.transposed.take(step.fields, taken.stages, step.h, cotangents, first_slope_given=True)
    assert not adjoint.stages[0].any()
    assert adjoint.slopes[0].any()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_batch_elements_are_solved_as_if_alone(seed: int) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    field = RandomField(3, seed)
    together = OneStep(METHODS["kencarp3"], field, 0.0, 0.3).take(x).increment
    for row in range(4):
        alone = OneStep(METHODS["kencarp3"], field, 0.0, 0.3).take(x[row : row + 1]).increment
        torch.testing.assert_close(together[row], alone[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"kencarp3_imex", "kencarp5_imex"}))
def test_stiffness_magnifies_rounding_no_more_than_it_must(name: str) -> None:
    h, rates = 0.5, [1.0, 1e3, 1e6]
    field = RandomField(3, 0, stiffness=rates[-1])
    field.w2 = torch.zeros(3, 5, dtype=torch.float64).requires_grad_()
    field.stiff = lambda t, x: x @ field.linear.T
    random = torch.Generator().manual_seed(1)
    x, cotangent = (torch.randn(1, 3, dtype=torch.float64, generator=random) for _ in range(2))
    _, ours, *_ = OneStep(METHODS[name], field, 0.0, h).back(x, cotangent)
    # The gradient is R(h L)^T lambda, in 50 digits.
    with mpmath.workdps(50):
        tableau, size = METHODS[name].tableau, METHODS[name].tableau.stages
        matrix, a, b = (mpmath.matrix(z.tolist()) for z in (field.linear, tableau.a, tableau.b))
        kron = mpmath.matrix(3 * size, 3 * size)
        right = mpmath.matrix(3 * size, 3)
        for i, p, q in itertools.product(range(size), range(3), range(3)):
            right[3 * i + p, q] = matrix[p, q]
            for j in range(size):
                kron[3 * i + p, 3 * j + q] = (i == j and p == q) - mpmath.mpf(h) * a[i, j] * matrix[p, q]
        slopes = mpmath.inverse(kron) * right
        exact = mpmath.eye(3)
        for i, p, q in itertools.product(range(size), range(3), range(3)):
            exact[p, q] += mpmath.mpf(h) * b[i] * slopes[3 * i + p, q]
        wanted = torch.tensor([float(v) for v in exact.T * mpmath.matrix(cotangent[0].tolist())], dtype=torch.float64)
    assert (ours[0] - wanted).norm() <= 10 * 2.2e-16 * h * rates[-1] * wanted.norm()


@pytest.mark.parametrize("name", ["implicit_euler", "trbdf2", "kencarp3", "kencarp5_imex"])
def test_factors_are_kept_over_many_steps_forward_and_back(name: str) -> None:
    count, h, method = 20, 0.01, METHODS[name]
    steps, transposed = ImplicitSteps(method, NewtonOptions()), TransposedSteps(method, NewtonOptions())
    field, x = RandomField(4, 0), torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = [x]
    for n in range(count):
        states.append(states[-1] + OneStep(method, field, n * h, h, steps=steps).take(states[-1]).increment)
    assert steps.newton.counts.jacobians <= 3
    assert steps.newton.counts.factorisations <= 3
    adjoint = torch.ones_like(x)
    for n in reversed(range(count)):
        step = OneStep(method, field, n * h, h, steps=steps)
        cotangents = h * method.tableau.b[:, None, None] * adjoint
        taken = step.take(states[n])
        adjoint = adjoint + transposed.take(step.fields, taken.stages, h, cotangents).stages.sum(0)
    assert transposed.factorisations <= 3


def test_factors_of_another_step_are_replaced_where_many_products_would_be_needed() -> None:
    method, n, fields = METHODS["implicit_euler"], 24, 3
    steps, transposed = ImplicitSteps(method, NewtonOptions()), TransposedSteps(method, NewtonOptions())
    x, cotangent = torch.randn(2, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for seed in range(fields):  # fields with nothing in common
        field = RandomField(n, seed, 10.0 ** (seed + 1))
        step = OneStep(method, field, 0.3, 0.2, steps=steps, transposed=transposed)
        taken, ours, *_ = step.back(x, cotangent)
        _, theirs = step.by_the_implicit_function_theorem(x, taken.stages, cotangent)
        assert (ours - theirs[0]).norm() <= 1e-10 * theirs[0].norm()
    assert transposed.factorisations == fields


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_no_size_is_the_identity(name: str) -> None:
    x, cotangent = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    field = RandomField(3, 0)
    step = OneStep(METHODS[name], field, 0.3, 0.0)
    taken = step.take(x)
    assert not taken.increment.any()
    torch.testing.assert_close(taken.slopes[0], field(torch.tensor(0.3, dtype=torch.float64), x).detach())
    cotangents = cotangent.expand(METHODS[name].tableau.stages, -1, -1)
    adjoint = step.transposed.take(step.fields, taken.stages, 0.0, cotangents)
    assert torch.equal(adjoint.slopes, cotangents)
    assert adjoint.stages.isfinite().all()
