"""torchdyn's interface with the flag set: what NeuralODE does, solvers of other kinds, events, and errors."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

pytest.importorskip("torchdyn")

import attr
import torchdyn.numerics
from torchdyn.core import MultipleShootingLayer, NeuralODE, ODEProblem
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalConv2d, GalLinear
from torchdyn.numerics import odeint, odeint_mshooting, odeint_symplectic
from torchdyn.numerics.odeint import odeint_hybrid
from torchdyn.numerics.solvers.ode import (
    SOLVER_DICT,
    AsynchronousLeapfrog,
    DormandPrince45,
    Euler,
    RungeKutta4,
    SolverTemplate,
)
from torchdyn.numerics.utils import EventCallback

from . import exactness
from .exactness import EXACT
from .fields import T, random
from .hosts import FLAG, constant_first_step
from .test_torchdyn_gradients import ADAPTIVE, FIXED

SOLVERS = ("rk4", *ADAPTIVE)
pytestmark = pytest.mark.filterwarnings("ignore:Setting (tolerances|save_at) has no effect")


X = random(5, 3, seed=1)


@pytest.fixture
def double() -> Iterator[None]:
    """For layers that make tensors of the default type in every call."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def net(inputs: int = 3, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def solution(result: Any) -> Tensor:
    return result[1] if isinstance(result, tuple) else result


def gradients(model: Callable[..., Any], x: Tensor, t: Tensor = T, inputs: Any = (), **keywords: Any) -> list[Tensor]:
    """Return the solution, and the gradients of a loss of it in the state, the parameters, other inputs, and the times.

    What has no influence has zeros, as with torchdyn's adjoints.
    """
    found: list[Tensor] = []
    for of_times in (False, True):  # graphs are kept of solves whose times need no gradients
        x, t = x.detach().clone().requires_grad_(), t.detach().clone().requires_grad_(of_times)
        torch.manual_seed(1)
        sol = solution(model(x, t, **keywords))
        parameters = [p for p in getattr(model, "parameters", list)() if p.requires_grad]
        wanted = [x, *parameters, *inputs, *([t] if of_times else [])]
        loss = (sol**2).sum() + sol.sum()
        found += [sol.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]
    return [each.cpu() for each in found]


def assert_same(actual: Any, expected: Any, bound: float = EXACT) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-13, atol=1e-13)
    assert any(theirs.any() for theirs in expected[2:])
    exactness.assert_same(actual[1:], expected[1:], bound)


def assert_exact(build: Callable[[str], Any], x: Tensor = X, t: Tensor = T, **keywords: Any) -> None:
    """Compare a model built for the flag with one built for backpropagation."""
    with constant_first_step():
        expected = gradients(build("autograd"), x, t, **keywords)
    assert_same(gradients(build(FLAG), x, t, **keywords), expected)


@pytest.mark.parametrize("solver", SOLVERS)
class TestNeuralODE:
    @pytest.mark.usefixtures("kept")
    def test_reversed_time(self, solver) -> None:
        assert_exact(lambda way: NeuralODE(net(), solver=solver, sensitivity=way), t=T.flip(0))

    @pytest.mark.usefixtures("kept")
    def test_data_control(self, solver) -> None:
        assert_exact(lambda way: NeuralODE(nn.Sequential(DataControl(), *net(6, 3)), solver=solver, sensitivity=way))

    @pytest.mark.usefixtures("kept")
    def test_second_order(self, solver) -> None:
        assert_exact(lambda way: NeuralODE(net(4, 2), order=2, solver=solver, sensitivity=way), random(5, 4))

    @pytest.mark.usefixtures("kept")
    @pytest.mark.usefixtures("double")
    def test_depth_varying_layers(self, solver) -> None:
        def build(way: str) -> NeuralODE:
            torch.manual_seed(0)
            galerkin = GalLinear(3, 3).double()
            nn.init.normal_(galerkin.coeffs, std=0.3)
            layers = DepthCat(1), galerkin, nn.Tanh(), DepthCat(1), nn.Linear(4, 3).double()
            return NeuralODE(nn.Sequential(*layers), solver=solver, sensitivity=way)

        assert_exact(build)

    @pytest.mark.usefixtures("kept")
    @pytest.mark.usefixtures("double")
    def test_depth_varying_convolutions(self, solver) -> None:
        def build(way: str) -> NeuralODE:
            torch.manual_seed(0)
            galerkin = GalConv2d(2, 2, padding=1).double()
            nn.init.normal_(galerkin.coeffs, std=0.1)
            return NeuralODE(nn.Sequential(DepthCat(1), galerkin, nn.Tanh()), solver=solver, sensitivity=way)

        assert_exact(build, random(2, 2, 4, 4))

    @pytest.mark.usefixtures("kept")
    def test_flow_with_autograd_trace(self, solver) -> None:
        assert_exact(lambda way: NeuralODE(CNF(net()), solver=solver, sensitivity=way), random(5, 4))

    @pytest.mark.usefixtures("kept")
    def test_flow_with_hutchinson_trace_takes_the_noise_it_was_given(self, solver) -> None:
        noise = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
        models = []

        def build(way: str) -> NeuralODE:
            models.append(NeuralODE(CNF(net(), hutch_trace, noise), solver=solver, sensitivity=way))
            return models[-1]

        assert_exact(build, random(5, 4))
        torch.manual_seed(1)  # as in `gradients`: one sample a solve, and none in the backward pass
        assert all(torch.equal(model.vf.vf.vf.noise, noise.sample((5,))) for model in models[-1:])

    @pytest.mark.usefixtures("kept")
    def test_in_a_chain_of_modules(self, solver) -> None:
        def build(way: str) -> nn.Sequential:
            torch.manual_seed(0)
            first, last = nn.Linear(3, 2).double(), nn.Linear(3, 1).double()
            ode = NeuralODE(net(), solver=solver, sensitivity=way, return_t_eval=False)
            return nn.Sequential(first, Augmenter(1, 1), ode, last)

        def chained(model: nn.Sequential) -> Any:
            x = X.clone().requires_grad_()
            y = model(x)
            return [y.detach(), *torch.autograd.grad((y**2).sum(), [x, *model.parameters()])]

        with constant_first_step():
            expected = chained(build("autograd"))
        assert_same(chained(build(FLAG)), expected)

    @pytest.mark.usefixtures("kept")
    def test_optimizable_params(self, solver) -> None:
        w = nn.Parameter(random(3, 3))

        def build(way: str) -> NeuralODE:
            field = lambda t, x, args=None: torch.tanh(x @ w)  # noqa: E731
            return NeuralODE(field, solver=solver, sensitivity=way, optimizable_params=(w,))

        assert_exact(build, inputs=(w,))

    @pytest.mark.usefixtures("kept")
    def test_tensors_that_are_no_parameters(self, solver) -> None:
        w = random(3, 3).requires_grad_()
        assert_exact(
            lambda way: NeuralODE(lambda t, x, args=None: torch.tanh(x @ w), solver=solver, sensitivity=way),
            inputs=(w,),
        )

    def test_times_it_returns_and_a_solution_without_them(self, solver) -> None:
        models = [
            NeuralODE(net(), solver=solver, sensitivity=FLAG, return_t_eval=with_times) for with_times in (True, False)
        ]
        times, sol = models[0](X, T)
        assert torch.equal(times, T)
        assert torch.equal(models[1](X, T), sol)
        assert torch.equal(models[0].trajectory(X, T), sol)

    @pytest.mark.usefixtures("kept")
    def test_a_model_that_is_moved_after_construction(self, solver) -> None:
        def build(way: str) -> NeuralODE:
            return NeuralODE(net().float(), solver=solver, sensitivity=way).double()

        assert_exact(build)

    @pytest.mark.usefixtures("kept")
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no other device")
    def test_a_model_that_is_moved_to_another_device(self, solver) -> None:
        def build(way: str) -> NeuralODE:
            return NeuralODE(net(), solver=solver, sensitivity=way).cuda()

        assert_exact(build, X.cuda(), T.cuda())

    @pytest.mark.usefixtures("kept")
    def test_parameters_that_change_between_construction_and_call(self, solver) -> None:
        def build(way: str) -> NeuralODE:
            model = NeuralODE(net(), solver=solver, sensitivity=way)
            model(X, T)[1].sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            with torch.no_grad():
                next(iter(model.parameters())).copy_(random(8, 3))
            return model

        assert_exact(build)

    @pytest.mark.usefixtures("kept")
    def test_parameters_that_change_between_the_passes_are_an_error(self, solver) -> None:
        model = NeuralODE(net(), solver=solver, sensitivity=FLAG)
        loss = model(X, T)[1].sum()
        with torch.no_grad():
            next(iter(model.parameters())).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.usefixtures("kept")
    def test_a_saved_model(self, solver) -> None:
        model = NeuralODE(net(), solver=solver, sensitivity=FLAG)
        expected = gradients(model, X)
        other = NeuralODE(net().apply(lambda module: [p.data.zero_() for p in module.parameters(recurse=False)]))
        other = NeuralODE(other.vf.vf.vf, solver=solver, sensitivity=FLAG)
        other.load_state_dict(model.state_dict())
        plain = NeuralODE(net(), solver=solver)
        assert model.state_dict().keys() == plain.state_dict().keys()
        for way in (model, NeuralODE(net(), solver=f"{FLAG}:{solver}")):
            gradients(way, X)  # a solver in use
            stream = io.BytesIO()
            torch.save(way, stream)
            stream.seek(0)
            for loaded in (torch.load(stream, weights_only=False), pickle.loads(pickle.dumps(way)), other):
                assert_same(gradients(loaded, X), expected)

    def test_repr_is_torchdyns(self, solver) -> None:
        theirs = repr(NeuralODE(net(), solver=solver))
        assert repr(NeuralODE(net(), solver=solver, sensitivity=FLAG)) == theirs
        assert repr(NeuralODE(net(), solver=f"{FLAG}:{solver}")) == theirs

    def test_no_graph_without_gradients(self, solver) -> None:
        model = NeuralODE(net(), solver=solver, sensitivity=FLAG)
        with torch.no_grad():
            assert not model(X, T)[1].requires_grad
        model.requires_grad_(False)
        assert not model(X, T)[1].requires_grad

    def test_the_fields_evaluations_forward_are_torchdyns(self, solver) -> None:
        counts = []
        for way in ("autograd", FLAG):
            model = NeuralODE(net(), solver=solver, sensitivity=way)
            model(X, T)
            counts.append(model.vf.nfe)
        assert counts[0] == counts[1] > 0

    @pytest.mark.usefixtures("kept")
    def test_random_numbers_are_drawn_again_in_the_backward_pass(self, solver) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, t, x, args=None):
                return torch.dropout(self.net(x), 0.3, train=True)

        assert_exact(lambda way: NeuralODE(Noisy(), solver=solver, sensitivity=way, atol=1, rtol=1))


@pytest.mark.usefixtures("kept")
def test_a_dense_output_between_steps() -> None:
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    assert_exact(lambda way: NeuralODE(net(), solver="dopri5", sensitivity=way, interpolator="4th"), t=t)


class TestIntegralLoss:
    """torchdyn's backpropagation carries it as one more state, its adjoints add its gradient: here, exactly."""

    @staticmethod
    def loss(t: Tensor, x: Tensor) -> Tensor:
        return (x**2).sum(-1) * torch.cos(t)

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("solver", FIXED + ADAPTIVE)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_gradient_of_the_methods_own_quadrature(self, solver, reverse) -> None:
        field, x = net(), X.clone().requires_grad_()
        inputs = [x, *field.parameters()]
        t, sign = (T.flip(0), -1) if reverse else (T, 1)
        model = NeuralODE(field, solver=solver, sensitivity=FLAG, integral_loss=self.loss)
        sol = model(x, t)[1]
        actual = torch.autograd.grad((sol**2).sum(), inputs)

        # The same steps with the integral as one more component, by torchdyn's own step.
        plain = NeuralODE(field, solver=solver)
        with torch.no_grad():
            times, _ = odeint(plain.vf, x, t, plain.solver, return_all_eval=True)
        times = times if solver in ADAPTIVE else sign * t

        def augmented(s: Tensor, z: Tensor) -> Tensor:
            state = z[:-1].view(X.shape)
            return sign * torch.cat([field(state).flatten(), self.loss(sign * s, state).sum().reshape(1)])

        z, states = torch.cat([x.flatten(), x.new_zeros(1)]), [x]
        for start, end in itertools.pairwise(times):
            z = plain.solver.step(augmented, z, start, end - start)[1]
            if torch.isclose(end, sign * t).any():
                states.append(z[:-1].view(X.shape))
        expected_sol = torch.stack(states)
        expected = torch.autograd.grad((expected_sol**2).sum() + z[-1], inputs)
        without = torch.autograd.grad((expected_sol.detach() * plain(x, t)[1]).sum() * 2, inputs)
        # The steps' sizes are differences of the times here, and the slopes are not handed on.
        torch.testing.assert_close(sol, expected_sol, rtol=1e-12, atol=1e-12)
        for ours, theirs, less in zip(actual, expected, without, strict=True):
            assert (ours - theirs).norm() <= EXACT * theirs.norm()
            assert (ours - less).norm() >= 1e-2 * theirs.norm()

    @pytest.mark.usefixtures("kept")
    def test_a_gradient_that_depends_on_the_solution_is_not_differentiated_again(self) -> None:
        x = X.clone().requires_grad_()
        model = NeuralODE(net(), solver="rk4", sensitivity=FLAG, integral_loss=self.loss)
        (first,) = torch.autograd.grad((model(x, T)[1] ** 2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated again.*integral_loss"):
            first.sum().backward()


class Extragradient(SolverTemplate):
    """A user's own Runge-Kutta solver: not torchdyn's, and it hands `args` to f."""

    def __init__(self) -> None:
        super().__init__(order=2)
        self.stepping_class = "fixed"

    def step(self, f, x, t, dt, k1=None, args=None):
        given = (args,) if args else ()
        ahead = x + dt * f(t, x, *given)
        return None, x + dt * f(t + dt, ahead, *given), None


class Scaled(Extragradient):
    """As args say: another method each time."""

    def step(self, f, x, t, dt, k1=None, args=None):
        return None, x + (args or {"scale": 1.0})["scale"] * dt * f(t, x), None


class EulerOfDicts(Euler):
    """torchdyn has dictionaries as states, but no solver that can take a step of one."""

    def step(self, f, x, t, dt, k1=None, args=None):
        slopes = f(t, x)
        return None, {name: x[name] + dt * slopes[name] for name in x}, None


class LearnedEuler(Euler):
    """With a parameter of its own in the step."""

    def __init__(self) -> None:
        super().__init__(torch.float64)
        self.factor = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def step(self, f, x, t, dt, k1=None, args=None):
        return None, x + self.factor * dt * f(t, x), None


class TestSolvers:
    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("args", [{}, {"scale": 0.5}])
    @pytest.mark.parametrize("solver", [Extragradient, Scaled])
    def test_a_users_own_and_args(self, solver, args) -> None:
        class Field(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, t, x, args=None):
                return self.net(x) * (args or {"scale": 1.0})["scale"]

        assert_exact(lambda way: NeuralODE(Field(), solver=solver(), sensitivity=way), args=args)

    @pytest.mark.usefixtures("kept")
    def test_a_users_own_with_a_parameter(self) -> None:
        solver = LearnedEuler()
        assert_exact(lambda way: NeuralODE(net(), solver=solver, sensitivity=way), inputs=tuple(solver.parameters()))
        model = NeuralODE(net(), solver=solver, sensitivity=FLAG)
        assert any(p is solver.factor for p in model.parameters())

    @pytest.mark.usefixtures("kept")
    def test_a_state_that_is_a_dictionary(self) -> None:
        w = random(3, 3).requires_grad_()
        x = {"a": X, "b": 2 * X}

        def field(t, x, args=None):
            return {"a": torch.tanh(x["b"] @ w), "b": torch.sin(x["a"]) * t}

        found = []
        for way in ("autograd", FLAG):
            model = ODEProblem(field, EulerOfDicts(), sensitivity=way, optimizable_params=())
            times, sol = model.odeint(x, T)
            assert torch.equal(times, T)
            (gradient,) = torch.autograd.grad((sol["a"] ** 2).sum() + sol["b"].sum(), w)
            found.append([sol["a"].detach(), sol["b"].detach(), gradient])
        assert_same(found[1], found[0])

    @pytest.mark.usefixtures("kept")
    def test_an_instance_is_left_as_it_was(self) -> None:
        solver = RungeKutta4(torch.float64)
        before = dict(vars(solver))
        NeuralODE(net(), solver=solver, sensitivity=FLAG)(X, T)[1].sum().backward()
        assert type(solver) is RungeKutta4
        assert vars(solver) == before

    @pytest.mark.usefixtures("kept")
    def test_a_copy_of_a_solver_in_use(self) -> None:
        model = NeuralODE(net(), solver=f"{FLAG}:dopri5")
        expected = gradients(model, X)
        model.solver = copy.deepcopy(model.solver)
        assert_same(gradients(model, X), expected, 0)
        assert isinstance(model.solver, DormandPrince45)

    @pytest.mark.usefixtures("kept")
    def test_one_solver_in_two_models_at_once(self) -> None:
        solver = NeuralODE(net(), solver=f"{FLAG}:tsit5").solver

        def both(first: Any, second: Any) -> Any:
            return lambda x, t: second(first(x, t)[1][-1], t)[1] + first(x, t)[1]

        fields = net(), net()
        inputs = tuple(p for field in fields for p in field.parameters())
        with constant_first_step():
            expected = gradients(both(*(NeuralODE(field, solver="tsit5") for field in fields)), X, inputs=inputs)
        assert_same(gradients(both(*(NeuralODE(f, solver=solver) for f in fields)), X, inputs=inputs), expected)

    @pytest.mark.usefixtures("kept")
    def test_symplectic_integration_of_a_first_order_system(self) -> None:
        field = net()

        class System(nn.Module):
            order = 1

            def forward(self, t, x):
                return field(x)

        def solve(solver: Any) -> Any:
            return lambda x, t: odeint_symplectic(System(), x, t, solver)

        inputs, x = tuple(field.parameters()), random(5, 6)
        for flag in (f"{FLAG}:alf", f"{FLAG}:AsynchronousLeapfrog"):
            assert_same(gradients(solve(flag), x, inputs=inputs), gradients(solve("alf"), x, inputs=inputs))

    @pytest.mark.usefixtures("kept")
    def test_multiple_shooting_layer(self) -> None:
        t = torch.linspace(0, 1, 7, dtype=torch.float64)  # more than its iterations
        assert_exact(lambda way: MultipleShootingLayer(net(), "zero", sensitivity=way), t=t)

    @pytest.mark.usefixtures("kept")
    def test_odeint_mshooting_with_given_shooting_parameters(self) -> None:
        field, guess = net(), random(len(T), *X.shape).requires_grad_()

        def solve(solver: str) -> Any:
            return lambda x, t: odeint_mshooting(lambda t, x: field(x), x, t, solver, guess, maxiter=2)

        inputs = (*field.parameters(), guess)
        expected = gradients(solve("parareal"), X, inputs=inputs)
        assert_same(gradients(solve(f"{FLAG}:parareal"), X, inputs=inputs), expected)


@attr.s
class Floor(EventCallback):
    """A ball that hits the floor, and what it has left after."""

    restitution = attr.ib()

    def check_event(self, t, x):
        return bool(x[0] <= 0)

    def jump_map(self, t, x):
        return torch.stack([x[0].abs() + 1e-6, -self.restitution * x[1]])


class TestEvents:
    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("solver", ADAPTIVE)
    def test_jumps(self, solver) -> None:
        gravity = torch.tensor(9.81, dtype=torch.float64, requires_grad=True)
        restitution = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        x0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
        t = torch.linspace(0, 1.5, 4, dtype=torch.float64)

        def solve(name: str) -> Any:
            def fall(t, x):
                return torch.stack([x[1], -gravity - 0.1 * x[1] * torch.cos(x[0])])

            def run(x, t):
                times, sol = odeint_hybrid(fall, x, t, 10, name, [Floor(restitution)], atol=1e-5, rtol=1e-5)
                assert ((sol[1:, 1] > 0) & (sol[:-1, 1] < 0)).sum() >= 2  # it bounced
                return times, sol

            return run

        inputs = gravity, restitution
        with constant_first_step():
            expected = gradients(solve(solver), x0, t, inputs=inputs)
        assert_same(gradients(solve(f"{FLAG}:{solver}"), x0, t, inputs=inputs), expected)
        assert all(part.any() for part in expected[2:4])


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("interpolator", [None, "4th"])
def test_second_derivatives(solver, reverse, interpolator) -> None:
    field, encoder = net(), random(3).requires_grad_()
    shift = torch.sin(encoder)  # entangled with what it is computed from
    x, t = X.clone().requires_grad_(), (T.flip(0) if reverse else T).clone().requires_grad_()
    inputs = [x, t, encoder, field[0].weight]
    found = []
    with constant_first_step():
        for way in ("autograd", FLAG):
            model = NeuralODE(
                lambda t, x, args=None: field(x) + shift * torch.cos(t) + encoder * x,
                solver=solver,
                sensitivity=way,
                interpolator=interpolator,
            )
            solution = model(x, t)[1]
            first = torch.autograd.grad((solution**3).sum(), inputs, create_graph=True)
            penalty = sum((g**2).sum() for g in first) + solution.sum()
            found.append(torch.autograd.grad(penalty, [*inputs, field[0].bias], retain_graph=True))
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()


class TestErrors:
    def test_a_step_that_returns_a_leaf(self) -> None:
        class Leaf(Euler):
            def step(self, f, x, t, dt, k1=None, args=None):
                return None, nn.Parameter(torch.sin(super().step(f, x, t, dt)[1].data)), None

        with pytest.raises(ValueError, match=r"step of Leaf returns a new leaf.*Use another solver"):
            NeuralODE(net(), solver=Leaf(), sensitivity=FLAG)(X, T)


def test_warnings_are_torchdyns_and_no_more() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = T.clone().requires_grad_()
        for solver in SOLVERS:
            odeint(net_field, X.clone().requires_grad_(), t, f"{FLAG}:{solver}")[1].sum().backward()


def net_field(t: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x) * t


def test_the_names_are_torchdyns_own_objects() -> None:
    module: Any = sys.modules["torchdyn.numerics.odeint"]
    assert torchdyn.numerics.odeint is module.odeint
    assert module.odeint.__module__ == "torchdyn.numerics.odeint"
    assert isinstance(NeuralODE(net(), solver=f"{FLAG}:alf").solver, AsynchronousLeapfrog)


class TestSteps:
    @pytest.mark.usefixtures("kept")
    def test_in_a_loop_of_ones_own_with_parameters_that_move_in_between(self) -> None:
        found = []
        for name in ("rk4", f"{FLAG}:rk4"):
            field, solver = net(), SOLVER_DICT[name](torch.float64)
            f = lambda t, x, field=field: field(x)  # noqa: E731
            for _ in range(3):
                x, t, dt = X, torch.zeros((), dtype=torch.float64), torch.full((), 0.1, dtype=torch.float64)
                for _ in range(4):
                    _, x, _ = solver.step(f, x, t, dt)
                x.sum().backward()
                for p in field.parameters():
                    p.data = p.data - 0.01 * p.grad
            found.append([p.detach() for p in field.parameters()])
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12)
