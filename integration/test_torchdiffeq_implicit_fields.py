"""Vector fields and states of all kinds with the implicit methods: gradients are exact, or an error says why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peak_memory import peak_bytes

from . import exactness
from .exactness import Outcome, assert_same
from .fields import T, random
from .hosts import FLAG, given_steps, least_budget

OF_EACH_KIND = ["trapezoid", "gl4", "kencarp3"]
pytestmark = pytest.mark.usefixtures("implicit_references")


def assert_exact(field, y0: Tensor, method: str, others: tuple[Tensor, ...] = (), **options) -> None:
    solving = {"rtol": 1e-3, "atol": 1e-3, "others": others}
    steps = given_steps(method, 0.21)
    expected = Outcome(field, y0, T, method=f"reference_{method}", options=steps, **solving)
    actual = Outcome(field, y0, T, method=f"{FLAG}:{method}", options=steps | options, **solving)
    exactness.assert_exact(actual, expected, bound=1e-10, values=1e-11)


def solve(field, method: str, y0: Tensor, **options) -> Tensor:
    options = given_steps(method, 0.21) | options
    return torchdiffeq.odeint(field, y0, T.to(y0), rtol=1e-3, atol=1e-3, method=f"{FLAG}:{method}", options=options)


class Energy(nn.Module):
    """The gradient of an energy, by autograd inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        with torch.no_grad():
            self.inner.weight.copy_(0.5 * random(3, 3, seed=0))
            self.inner.bias.zero_()

    def forward(self, t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            energy = (torch.tanh(self.inner(y)) ** 2).sum() + (y**2).sum()
            return -torch.autograd.grad(energy, y, create_graph=True)[0]


class Normalized(nn.Module):
    """With a batch norm behind a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(3, 3, seed=0))
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, t, y):
        return self.norm(y @ self.weight) * torch.cos(t) - 2 * y


@pytest.mark.parametrize("method", OF_EACH_KIND)
@pytest.mark.parametrize("linear_solver", ["dense", "gmres"])
class TestFields:
    def test_that_differentiate(self, method, linear_solver) -> None:
        assert_exact(Energy(), random(2, 3, seed=0), method, linear_solver=linear_solver)

    def test_with_batch_norm(self, method, linear_solver) -> None:
        field = Normalized()
        assert_exact(field, random(4, 3, seed=0), method, independent_batch=False, linear_solver=linear_solver)
        assert_exact(field.eval(), random(4, 3, seed=0), method, linear_solver=linear_solver)

    def test_with_a_context_that_was_computed_before_and_has_hooks(self, method, linear_solver) -> None:
        source = random(2, 3, seed=1).requires_grad_()
        context = torch.tanh(source)
        twice, calls = 2 * context, []
        context.register_hook(calls.append)
        # Two of them with one history.
        field = lambda t, y: torch.sin(context * y) + twice - 3 * y  # noqa: E731
        found = []
        for name in (f"{FLAG}:{method}", f"reference_{method}"):
            y0 = random(2, 3, seed=0).requires_grad_()
            options = given_steps(method, 0.21) | ({"linear_solver": linear_solver} if FLAG in name else {})
            y = torchdiffeq.odeint(field, y0, T, rtol=1e-3, atol=1e-3, method=name, options=options)
            found.append(torch.autograd.grad((y**2).sum(), [y0, source], retain_graph=True))
        assert_same(found[0], found[1], 1e-10)
        assert calls

    @pytest.mark.parametrize(
        "field",
        [
            lambda t, y: torch.ones_like(y),
            lambda t, y: torch.cos(3 * t) * torch.ones_like(y),
            lambda t, y: torch.stack([-y[..., 0], torch.cos(t).expand(y.shape[:-1]), -3 * y[..., 2] * y[..., 0]], -1),
            lambda t, y: torch.relu(y) - 2 * y,
        ],
        ids=["constant", "of time alone", "in part of time alone", "with kinks"],
    )
    def test_whose_jacobian_is_singular_or_jumps(self, field, method, linear_solver) -> None:
        assert_exact(field, random(2, 3, seed=0), method, linear_solver=linear_solver)

    def test_that_recompute(self, method, linear_solver) -> None:
        w = random(3, 3, seed=0).requires_grad_()
        inner = lambda y: torch.tanh(y @ w) - 3 * y  # noqa: E731
        field = lambda t, y: checkpoint(inner, y, use_reentrant=False)  # noqa: E731
        y0, found = random(2, 3, seed=0), []
        for each in (field, lambda t, y: inner(y)):
            y = solve(each, method, y0.clone(), linear_solver=linear_solver)
            found.append(torch.autograd.grad((y**2).sum(), w)[0])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


class TestStates:
    @pytest.mark.parametrize("method", OF_EACH_KIND)
    def test_that_are_scalars(self, method) -> None:
        field = lambda t, y: torch.sin(3 * t) - 5 * torch.sin(y)  # noqa: E731
        options = {"method": f"{FLAG}:{method}", "options": given_steps(method, 0.21), "rtol": 1e-3, "atol": 1e-3}
        scalar = Outcome(field, torch.tensor(0.7, dtype=torch.float64), T, **options)
        vector = Outcome(field, torch.tensor([0.7], dtype=torch.float64), T, **options)
        assert torch.equal(scalar.values, vector.values[:, 0])
        for ours, theirs in zip(scalar.gradients, vector.gradients, strict=True):
            assert torch.equal(ours, theirs.view(ours.shape))

    @pytest.mark.parametrize("method", OF_EACH_KIND)
    @pytest.mark.parametrize("shape", [(1, 3), (2, 3, 2)])
    def test_of_one_batch_element_or_many_dimensions(self, method, shape) -> None:
        w = random(3).requires_grad_()
        field = lambda t, y: torch.sin(t) * y.flip(1) * (w if y.ndim == 2 else w[:, None]) - 3 * y  # noqa: E731
        assert_exact(field, random(*shape), method, others=(w,))


class TestTinySteps:
    @pytest.mark.parametrize("method", OF_EACH_KIND)
    @pytest.mark.parametrize("h", [1e-4, 1e-8, 1e-12, 1e-300])
    def test_gradients_of_times(self, method, h) -> None:
        t = torch.tensor([0, h, 2 * h], dtype=torch.float64, requires_grad=True)
        options = {"first_step": h} if method == "kencarp3" else {}
        field = lambda t, y: torch.sin(y) * torch.cos(t)  # noqa: E731
        y = torchdiffeq.odeint(field, random(2, 2), t, method=f"{FLAG}:{method}", options=options)
        (gradient,) = torch.autograd.grad((y**2).sum(), t)
        wanted = (2 * y * field(t[:, None, None], y)).sum((1, 2)).detach()
        torch.testing.assert_close(gradient[1:], wanted[1:], rtol=1e-7 if h == 1e-4 else 1e-11, atol=0)


class TestRefused:
    """Most of it goes wrong only some time after the solve has begun."""

    def refused(self, match: str, field: Callable, method: str, **options) -> None:
        with pytest.raises(RuntimeError, match=match):
            solve(field, method, random(4, 3, seed=0).requires_grad_(), **options)[-1].sum().backward()

    @pytest.mark.parametrize("method", OF_EACH_KIND)
    def test_random_numbers(self, method) -> None:
        self.refused("returns another value each time", lambda t, y: -3 * torch.dropout(y, 0.5, bool(t > 0.5)), method)

    @pytest.mark.parametrize("method", OF_EACH_KIND)
    def test_batch_elements_that_depend_on_each_other(self, method) -> None:
        self.refused("independent_batch", lambda t, y: -3 * (y - (y.mean(0) if t > 0.5 else 0)) - y**3, method)

    @pytest.mark.parametrize("method", OF_EACH_KIND)
    @pytest.mark.parametrize("after", [-1, 0.5])
    def test_a_field_that_detaches_its_state(self, method, after) -> None:
        self.refused("detaches", lambda t, y: -30 * (y.detach() if t > after else y), method)

    @pytest.mark.parametrize("method", OF_EACH_KIND)
    def test_a_hidden_tensor(self, method) -> None:
        w = torch.ones((), dtype=torch.float64, requires_grad=True)

        class Hiding:
            def __getattr__(self, name):
                return 2 * w

        hiding = Hiding()
        field = lambda t, y: -y * (hiding.it if t > 0.5 else 1.0)  # noqa: E731
        self.refused("neither held nor used at the first point", field, method)

    @pytest.mark.parametrize("method", OF_EACH_KIND)
    def test_a_parameter_changed_in_place_between_the_passes(self, method) -> None:
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        y = solve(lambda t, y: -w * y, method, random(2, 2))
        with torch.no_grad():
            w.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestMemory:
    def peak(self, method: str, shape: tuple[int, int], hidden: int, **options) -> int:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(shape[1], hidden), nn.Tanh(), nn.Linear(hidden, shape[1]))
        y0 = torch.randn(shape, requires_grad=True)
        size = given_steps(method, 0.2, held=True)

        def work() -> None:
            y = torchdiffeq.odeint(
                lambda t, y: net(y) - y, y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:{method}",
                rtol=1e6, atol=1e6, options=size | options,
            )  # fmt: skip
            y[-1].sum().backward()
            y0.grad = None
            net.zero_grad()

        work()
        return peak_bytes(work)

    @pytest.mark.parametrize(
        ("method", "shape", "hidden"),
        [
            ("sdirk2", (64, 16), 64),
            ("gl4", (32, 16), 64),
            ("kencarp5", (64, 4), 16),
            ("trbdf2", (4, 80), 32),  # by GMRES
        ],
    )
    def test_it_is_within_the_budget(self, method, shape, hidden) -> None:
        least = least_budget(lambda budget: self.peak(method, shape, hidden, memory_budget=budget))
        with pytest.raises(ValueError, match="is too small"):
            self.peak(method, shape, hidden, memory_budget=least - 1)
        assert self.peak(method, shape, hidden, memory_budget=least) <= least
