"""Newton's method for stages, its linear algebra and the check of f's derivative, in their failures too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symplectic_plugin.methods.check_derivative import check_derivative
from symplectic_plugin.methods.linear import Factors, gmres
from symplectic_plugin.methods.newton import Newton, NewtonOptions
from symplectic_plugin.methods.newton_iteration import StageSystem
from symplectic_plugin.methods.stage_field import GraphOf, Layout, Pushforward, StageField, jacobian


def _field(f) -> StageField:
    def value(x):
        with torch.no_grad():
            return f(x).detach()

    return StageField(value, f, lambda x: GraphOf(f, x))


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _solve(f, x: torch.Tensor, h: float, **options):
    system = StageSystem([_field(f)], x[:, None], x.new_full((1, 1), h))
    solution = Newton(NewtonOptions(**options)).solve(system, torch.zeros_like(x)[:, None], 1e-6 * (1 + x.abs()))
    return solution, system


class _NoRules(torch.autograd.Function):
    """Square without a rule for vmap or forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0] * cotangent


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 12), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_lu_and_gmres_solve_the_same_systems(seed: int, batch: int, n: int, s: int, transposed: bool) -> None:
    a, jacobians, right = _random(s, s, seed=seed), _random(batch, n, n, seed=seed), _random(batch, s * n, seed=seed)
    dense = torch.stack([torch.eye(s * n, dtype=torch.float64) - torch.kron(a, j) for j in jacobians])
    dense = dense.mT if transposed else dense
    direct = Factors(a, jacobians).solve(right, transposed=transposed)
    iterated = gmres(lambda v: torch.einsum("bij,bj->bi", dense, v), right, 1e-13)
    wanted = torch.linalg.solve(dense, right)
    condition = torch.linalg.cond(dense)
    for solution in (direct, iterated.x):
        off = torch.linalg.vector_norm(solution - wanted, dim=-1) / torch.linalg.vector_norm(wanted, dim=-1)
        assert (off <= 1e-12 * condition).all()
    assert iterated.converged.all()


def test_gmres_of_a_solved_row_beside_an_open_one() -> None:
    right = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    result = gmres(lambda v: v * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), right, 1e-14)
    torch.testing.assert_close(result.x, right / torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert result.converged.all()


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("independent", [True, False])
def test_layouts_are_inverted(shape, dtype, independent) -> None:
    x = torch.randn(5, *shape, dtype=dtype)
    layout = Layout(torch.Size(shape), dtype, independent)
    flat = layout.flat(x)
    assert flat.shape == (5, layout.batch, layout.size)
    assert not flat.is_complex()
    assert torch.equal(layout.shaped(flat), x)
    assert layout.batch == (shape[0] if len(shape) > 1 and independent else 1)


@pytest.mark.parametrize("square", [torch.square, _NoRules.apply])
def test_jacobians_and_products_with_and_without_rules(square) -> None:
    w, x, v = _random(3, 3), _random(2, 3, seed=1), _random(2, 3, seed=2)
    field = _field(lambda x: square(x) @ w.T)
    blocks = 2 * w * x[:, None, :]
    torch.testing.assert_close(jacobian(field.linearize(x)), blocks)
    push = Pushforward(field, x)
    for _ in range(2):
        torch.testing.assert_close(push(v), torch.einsum("bij,bj->bi", blocks, v))


@pytest.mark.parametrize("linear_solver", ["dense", "gmres"])
def test_a_solution_is_right_to_rounding_whatever_the_tolerances(linear_solver: str) -> None:
    w, x = _random(4, 4), _random(3, 4, seed=1)
    solution, system = _solve(lambda x: torch.sin(x @ w.T) - 50 * x**3, x, 0.4, linear_solver=linear_solver)
    assert not solution.failed.any()
    assert system.residual(solution.z).abs().max() <= 1e-13


def test_newton_tol_stops_earlier() -> None:
    w, x = _random(4, 4), _random(3, 4, seed=1)
    exact, _ = _solve(lambda x: torch.sin(x @ w.T) - 50 * x**3, x, 0.4)
    loose, _ = _solve(lambda x: torch.sin(x @ w.T) - 50 * x**3, x, 0.4, newton_tol=0.1)
    assert loose.iterations < exact.iterations
    assert (loose.z - exact.z).abs().max() <= 1e-6


@pytest.mark.parametrize("linear_solver", ["dense", "gmres"])
def test_a_singular_matrix_is_a_failure_of_its_batch_element(linear_solver: str) -> None:
    rates = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    x = torch.ones(2, 1, dtype=torch.float64)
    solution, _ = _solve(lambda x: rates * x + 1, x, 1.0, linear_solver=linear_solver)  # Z = (1 + Z) + 1
    assert solution.failed.tolist() == [True, False]
    assert "singular" in solution.reason
    assert float(solution.z[1]) == pytest.approx(0.0, abs=1e-15)


def test_equations_without_a_solution_fail() -> None:
    x = torch.full((1, 1), 1.0, dtype=torch.float64)
    solution, _ = _solve(lambda x: x**2 + 1, x, 1.0)  # Z = (1 + Z)^2 + 1 has no real root
    assert solution.failed.all()
    assert solution.reason


def test_values_that_are_not_finite_fail() -> None:
    x = torch.full((1, 1), 1.0, dtype=torch.float64)
    solution, _ = _solve(lambda x: torch.log(x - 2), x, 1.0)
    assert solution.failed.all()
    assert "not finite" in solution.reason


@pytest.mark.parametrize(
    "f",
    [
        lambda x: -3 * x.detach() + x.sin(),
        lambda x: torch.from_numpy(x.detach().numpy() ** 2) * 3,
        lambda x: x * (1e12 * x).long() / 1e12,
    ],
    ids=["detached", "numpy", "integers"],
)
def test_a_derivative_that_is_not_fs_is_noticed(f) -> None:
    with pytest.raises(RuntimeError, match="derivative of the vector field"):
        check_derivative(_field(f), _random(1, 3, seed=4))


@pytest.mark.parametrize(
    "f", [torch.relu, torch.sin, torch.abs, lambda x: torch.ones_like(x), lambda x: 1e8 * x**3, lambda x: x.round()]
)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-6), (torch.float32, 1.0), (torch.float64, 1e-6), (torch.float64, 1.0), (torch.float64, 1e6)],
)
def test_a_derivative_that_is_fs_is_not_complained_about(f, dtype, scale) -> None:
    for seed in range(5):
        check_derivative(_field(f), scale * _random(1, 3, seed=seed).to(dtype))


def test_random_fields_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="draws random numbers"):
        check_derivative(_field(lambda x: x.cos() * torch.rand(x.shape, dtype=x.dtype)), _random(1, 3))


@pytest.mark.parametrize("f", [lambda x: x - x.mean(0), lambda x: x.cumsum(0)])
def test_batch_elements_that_are_not_independent_are_noticed(f) -> None:
    with pytest.raises(RuntimeError, match="independent_batch"):
        check_derivative(_field(f), _random(4, 3))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"linear_solver": "lu"}, "linear_solver"),
        ({"max_iterations": 1}, "max_iterations"),
        ({"newton_tol": 2.0}, "newton_tol"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        NewtonOptions(**options)


def test_a_correction_that_overshoots_is_taken_in_part() -> None:
    """Newton's method for the arctangent diverges, with alternating signs, from any guess beyond 1.39."""
    x = torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    solution, system = _solve(lambda z: -50 * torch.atan(3 * z) + x, x, 1.0)
    assert not solution.failed.any()
    assert system.residual(solution.z).abs().max() <= 1e-13


@pytest.mark.parametrize("linear_solver", ["dense", "gmres"])
def test_a_field_that_differentiates_is_differentiated_right(linear_solver: str) -> None:
    def energys(x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()  # a copy without a tangent
            return -torch.autograd.grad((torch.sin(x) ** 2).sum(), x, create_graph=True)[0]

    x, v = _random(2, 3), _random(2, 3, seed=1)
    field = _field(energys)
    wanted = -2 * torch.cos(2 * x) * v
    torch.testing.assert_close(Pushforward(field, x)(v), wanted)
    solution, _ = _solve(energys, x, 0.3, linear_solver=linear_solver)
    assert solution.iterations <= 20


def test_damping_from_a_guess_where_f_is_not_finite_leads_to_a_solution() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    system = StageSystem([_field(lambda x: torch.sqrt(3 - x))], x[:, None], torch.ones_like(x))
    solution = Newton(NewtonOptions()).solve(system, torch.full_like(x, 4.0)[:, None], torch.ones_like(x))
    assert not solution.failed.any()
    assert system.residual(solution.z).abs().max() <= 1e-15


def test_a_batch_of_another_size_gets_a_matrix_of_its_own() -> None:
    newton = Newton(NewtonOptions())
    for x in (_random(2, 3), _random(4, 3), _random(4, 2)):
        system = StageSystem([_field(lambda x: -x)], x[:, None], x.new_full((1, 1), 0.5))
        solution = newton.solve(system, torch.zeros_like(x)[:, None], torch.ones_like(x))
        torch.testing.assert_close(solution.z[:, 0], -x / 3)
