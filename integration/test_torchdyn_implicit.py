"""The implicit methods by torchdyn's flags: gradients are those of the implicit function theorem."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem
from torchdyn.numerics import odeint, odeint_hybrid
from torchdyn.numerics.solvers.ode import SOLVER_DICT, MSZero
from torchdyn.numerics.solvers.templates import DiffEqSolver

from symplectic_plugin.record.store import POLICIES

from . import exactness
from .exactness import Outcome
from .fields import MLP, problems
from .hosts import ADDITIVE, FLAG, IMPLICIT_ADAPTIVE, IMPLICIT_FIXED, by_function, by_problem, outcomes
from .implicit_reference import METHODS, slopes_of_step
from .test_torchdyn_gradients import spans

ADAPTIVE = [name for name in IMPLICIT_ADAPTIVE if name not in ADDITIVE]
OF_EACH_KIND = ["trapezoid", "gl4", "kencarp3"]
pytestmark = pytest.mark.filterwarnings("ignore:Setting (tolerances|save_at) has no effect")


class Reference(DiffEqSolver):
    """Implicit method by dense linear algebra that autograd goes through."""

    def __init__(self, name: str) -> None:
        self.method = METHODS[name]
        embedded = self.method.embedded
        super().__init__(order=self.method.order, stepping_class="fixed" if embedded is None else "adaptive")

    def step(self, f, x, t, dt, k1=None, args=None) -> Any:
        s, b = self.method.tableau.stages, self.method.tableau.b
        shape = x.shape
        # torchdyn's implicit Euler method evaluates f at the step's start.
        end_of_step = t if self.method.name == "implicit_euler" else t + dt
        slopes = slopes_of_step(self.method, [f], x, t, dt.reshape(()), end_of_step, [{}] * s, k1)[0]
        end = (x + dt * torch.einsum("i,i...->...", b, slopes)).view(shape)
        if self.method.embedded is None:
            return None, end, None
        error = dt * torch.einsum("i,i...->...", b - self.method.embedded, slopes)
        return slopes[-1], end, error, slopes


def assert_exact(actual: Outcome, expected: Outcome) -> None:
    exactness.assert_exact(actual, expected, bound=1e-10, values=1e-12)


class Plain(nn.Module):
    """A field as NeuralODE calls it."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t, x, args=None):
        return self.field(t, x)


def small(seed: int = 0) -> tuple[MLP, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    field, x = MLP(2, 4, generator), torch.randn(3, 2, generator=generator, dtype=torch.float64)
    return field, x, torch.linspace(0, 1, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", IMPLICIT_FIXED)
@settings(max_examples=2)
@given(problems(), spans(), st.sampled_from(POLICIES), st.sampled_from(["dense", "gmres"]))
def test_fixed_steps(name, problem, t_span, policy, linear_solver) -> None:
    field, x, _ = problem
    ours = by_problem(FLAG, solver=SOLVER_DICT[f"{FLAG}:{name}"](checkpoint=policy, linear_solver=linear_solver))
    assert_exact(*outcomes(field, x, t_span, ours, by_problem("autograd", solver=Reference(name))))


@pytest.mark.parametrize("name", ADAPTIVE)
@settings(max_examples=3)
@given(problems(), spans(), st.sampled_from(POLICIES))
def test_steps_by_tolerance(name, problem, t_span, policy) -> None:
    field, x, _ = problem
    keywords = {"atol": 1e-3, "rtol": 1e-3}
    ours = by_problem(FLAG, solver=SOLVER_DICT[f"{FLAG}:{name}"](checkpoint=policy), **keywords)
    assert_exact(*outcomes(field, x, t_span, ours, by_problem("autograd", solver=Reference(name), **keywords)))


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_every_flag(name) -> None:
    field, x, t_span = small()

    def model(field, x, t_span) -> Tensor:
        return NeuralODE(Plain(field), solver=name, sensitivity=FLAG)(x, t_span)[1]

    def reference(field, x, t_span) -> Tensor:
        return NeuralODE(Plain(field), solver=Reference(name), sensitivity="autograd")(x, t_span)[1]

    for ours, theirs in (
        (by_function(solver=f"{FLAG}:{name}"), by_function(solver=Reference(name))),
        (by_problem(FLAG, solver=name), by_problem("autograd", solver=Reference(name))),
        (model, reference),
    ):
        assert_exact(*outcomes(field, x, t_span, ours, theirs))


@pytest.mark.parametrize("name", ["ieuler", "implicit_euler"])
def test_torchdyns_own_implicit_euler_method_has_a_gradient(name) -> None:
    field, x, t_span = small()
    assert_exact(
        *outcomes(
            field, x, t_span, by_problem(FLAG, solver=name), by_problem("autograd", solver=Reference("implicit_euler"))
        )
    )
    # And it is what torchdyn's own minimisation arrives at.
    theirs = odeint(field, x, t_span, solver=name)[1]
    ours = odeint(field, x, t_span, solver=f"{FLAG}:{name}")[1]
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_stiff_system_takes_few_steps(name) -> None:
    calls = []

    def field(t, x):
        calls.append(t)
        return -1e5 * (x - torch.cos(t)) - torch.sin(t)

    t_span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    end = odeint(field, x, t_span, solver=f"{FLAG}:{name}", atol=1e-5, rtol=1e-5)[1][-1]
    assert float((end - torch.cos(t_span[-1])).abs()) < 1e-4
    assert len(calls) < 4000
    (gradient,) = torch.autograd.grad(end, x)
    assert float(gradient.abs()) < 1e-10  # what was is forgotten


def test_a_step_that_newton_can_not_take_is_made_smaller_or_raises() -> None:
    def field(t, x):
        return -(x**3) + torch.where(x < 0.2, float("nan"), 0.0)

    x, t_span = torch.full((1, 1), 3.0, dtype=torch.float64), torch.tensor([0.0, 8.0], dtype=torch.float64)
    x.requires_grad_()
    end = odeint(field, x, t_span, solver=f"{FLAG}:kencarp3", atol=1e-2, rtol=1e-2)[1][-1]
    assert float(end.detach()) == pytest.approx((1 / 9 + 16) ** -0.5, rel=0.1)
    for solver in (f"{FLAG}:implicit_euler", "sdirk2"):
        with pytest.raises(RuntimeError, match=r"Newton's method did not solve the step from t = 0"):
            odeint(lambda t, x: torch.log(x - 4), x, t_span, solver=solver)
    with pytest.raises(RuntimeError, match=r"did not solve the step|finite"):
        odeint(lambda t, x: torch.where(t > 1, float("nan"), -x), x, t_span, solver=f"{FLAG}:kencarp3")


def test_events_and_jumps() -> None:
    class Callback:
        def check_event(self, t, x):
            return bool(x[0, 0] > 1.5)

        def jump_map(self, t, x):
            return 0.5 * x

    field = nn.Linear(1, 1).double()
    x = torch.ones(1, 1, dtype=torch.float64)
    with torch.no_grad():
        field.weight.fill_(0.9)
        field.bias.fill_(0.1)
    t_span, found = torch.linspace(0, 2, 3, dtype=torch.float64), []
    for solver in (SOLVER_DICT[f"{FLAG}:kencarp3"](), Reference("kencarp3")):
        _, solution = odeint_hybrid(lambda t, x: field(x), x, t_span, 3, solver, [Callback()], 1e-3, 1e-3)
        found.append([solution, *torch.autograd.grad(solution[-1].sum(), list(field.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # torchdyn's first step depends on parameters


def test_multiple_shooting() -> None:
    field, x, t_span = small()
    still = type("Still", (MLP,), {"forward": lambda self, t, y: MLP.forward(self, torch.zeros_like(y[..., :1]), y)})
    field.__class__ = still

    def solver(kind) -> Any:
        result = MSZero()
        result.coarse_method, result.fine_method = kind("implicit_midpoint"), kind("trapezoid")
        return result

    keywords = {"problem": MultipleShootingProblem, "maxiter": 2}
    ours = by_problem(FLAG, solver=solver(lambda name: SOLVER_DICT[name](torch.float64)), **keywords)
    assert_exact(*outcomes(field, x, t_span, ours, by_problem("autograd", solver=solver(Reference), **keywords)))


def test_models_are_copied_and_pickled() -> None:
    field, x, t_span = small()
    model = NeuralODE(Plain(field), solver=SOLVER_DICT[f"{FLAG}:gl4"](checkpoint="steps"), sensitivity=FLAG)
    expected = model(x, t_span)[1]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for solver in (again.solver, copy.deepcopy(model.solver)):
        assert solver.checkpoint == "steps"
        assert torch.equal(odeint(field, x, t_span, solver)[1], expected)
    assert torch.equal(again(x, t_span)[1], expected)


@pytest.mark.parametrize("name", IMPLICIT_FIXED)
def test_steps_of_no_size(name) -> None:
    x, t = torch.ones(2, 2, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64)
    solver = SOLVER_DICT[f"{FLAG}:{name}"]()
    solver.sync_device_dtype(x, t[None])
    end = solver.step(lambda t, x: -x, x, t, t)[1]
    assert torch.equal(end, x)
    assert torch.equal(torch.autograd.grad(end.sum(), x)[0], torch.ones_like(x))


class TestRefused:
    def test_step_sizes_that_are_none(self) -> None:
        x, t_span = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, 3).double()
        with pytest.raises(ValueError, match="is to have the size nan"):
            odeint(lambda t, x: -x, x, t_span, solver=f"{FLAG}:kencarp3")

    @pytest.mark.parametrize("name", OF_EACH_KIND)
    def test_a_plain_solver_has_no_gradient(self, name) -> None:
        field, x, t_span = small()
        solution = ODEProblem(field, solver=name, sensitivity="autograd").odeint(x, t_span)[1]
        with pytest.raises(RuntimeError, match='use sensitivity="symplectic_adjoint"'):
            solution.sum().backward()

    def test_an_integral_loss(self) -> None:
        field, x, t_span = small()
        model = NeuralODE(Plain(field), solver="gl4", sensitivity=FLAG, integral_loss=lambda t, x: (x**2).sum(-1))
        with pytest.raises(ValueError, match="no integral_loss"):
            model(x, t_span)

    def test_interpolators(self) -> None:
        field, x, t_span = small()
        with pytest.raises(ValueError, match="leave interpolator away"):
            odeint(field, x, t_span, solver=f"{FLAG}:kencarp3", interpolator="4th")

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"linear_solver": "lu"}, "linear_solver"),
            ({"newton_tol": 0.1}, "newton_tol"),
            ({"tol": 1}, "unknown options"),
        ],
    )
    def test_options(self, options, complaint) -> None:
        field, x, t_span = small()
        with pytest.raises((TypeError, ValueError), match=complaint):
            odeint(field, x, t_span, solver=SOLVER_DICT[f"{FLAG}:gl4"](**options))

    def test_states_that_are_no_tensors_or_in_half_precision(self) -> None:
        _, x, t_span = small()
        with pytest.raises(ValueError, match="must be a tensor"):
            odeint(lambda t, x: x, {"a": x}, t_span, solver=SOLVER_DICT[f"{FLAG}:gl4"]())
        with pytest.raises(ValueError, match="single or double precision"):
            odeint(lambda t, x: -x, x.bfloat16(), t_span.bfloat16(), solver=f"{FLAG}:gl4")
