"""The option `compile`: f is compiled, the gradient stays what it is, and where that fails nothing is lost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE
from torchdyn.numerics import odeint
from torchdyn.numerics.solvers.ode import SOLVER_DICT

import symplectic_plugin
from benchmarks.peak_memory import peak_bytes

from .exactness import assert_same
from .fields import Y0, T, mlp
from .hosts import ADAPTIVE, SOLVERS, solver_of

AOT = {"backend": "aot_eager"}
"""All of torch.compile but the kernels, which take long to make."""


def gradients(solver: str, **options: Any) -> tuple[Tensor, ...]:
    """With options the flag's; without the host's own."""
    field, context, y0 = mlp(), Y0.clone().requires_grad_(), Y0.clone().requires_grad_()
    host, method = solver.split()
    name = f"symplectic_adjoint:{method}" if options else method
    if host == "torchdiffeq":
        options = {"first_step": 0.1, **options} if method in ADAPTIVE else options
        f = lambda t, y: (field(t, y[0]) * torch.cos(t) + context, y[1])  # noqa: E731
        y, _ = torchdiffeq.odeint(f, (y0, y0), T, method=name, rtol=1e-4, atol=1e-4, options=options)
    else:
        chosen = SOLVER_DICT[name](Y0.dtype, **options) if options else name
        y = odeint(lambda t, y: field(t, y) * torch.cos(t) + context, y0, T, solver=chosen)[1]
    return torch.autograd.grad((y**2).sum(), (y0, context, field.w1, field.w2))


@pytest.mark.parametrize(
    ("solver", "policy"),
    [*((solver, "auto") for solver in SOLVERS), ("torchdiffeq rk4", "steps"), ("torchdyn rk4", "steps")],
)
def test_the_gradient_is_that_of_backpropagation(solver, policy) -> None:
    if solver == "torchdyn tsit5":  # its backpropagation includes the control of step sizes
        assert_same(gradients(solver, checkpoint=policy, compile=AOT), gradients(solver, checkpoint=policy))
    else:
        assert_same(gradients(solver, checkpoint=policy, compile=AOT), gradients(solver))


class Field(nn.Module):
    """A vector field that torch.compile makes one graph of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.layer(y)) * t


class Counting:
    """A backend that counts how often what it has made is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            return module(*args)

        return call


def test_the_memory_stays_within_a_budget() -> None:
    field, y0 = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).double(), torch.ones(64, 16).double()
    t = torch.linspace(0, 1, 31, dtype=torch.float64)

    def work(budget: int) -> None:
        options = {"compile": AOT, "memory_budget": budget}
        y = torchdiffeq.odeint(
            lambda t, y: field(y), y0.clone().requires_grad_(), t, method="symplectic_adjoint:rk4", options=options
        )
        (y[-1] ** 2).sum().backward()

    for budget in (1_100_000, 8_000_000):
        work(budget)  # compiles
        assert peak_bytes(lambda budget=budget: work(budget)) <= budget


class CountingField(Field):
    """Vector field that counts its evaluations, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        return super().forward(t, y)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "allow_unspec_int_on_nn_module"), reason="torch compiles anew for each number"
)
@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdiffeq dopri5", "torchdyn rk4"])
def test_a_field_that_counts_its_evaluations_is_not_compiled_for_each_count(solver) -> None:
    torch._dynamo.reset()
    host, method = solver.split()
    y0, t = torch.ones(4, 3, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, 9, dtype=torch.float64)
    if host == "torchdiffeq":
        solve = functools.partial(
            torchdiffeq.odeint, CountingField(), method=f"symplectic_adjoint:{method}", options={"compile": AOT}
        )
    else:
        chosen = SOLVER_DICT[f"symplectic_adjoint:{method}"](y0.dtype, compile=AOT)
        model = NeuralODE(Field().layer, solver=chosen, sensitivity="symplectic_adjoint")  # which counts
        solve = lambda y0, t: model(y0, t)[1]  # noqa: E731
    graphs = []
    for _ in range(5):
        before = counters["stats"]["unique_graphs"]
        solve(y0, t).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert 1 <= sum(graphs) <= 5
    assert graphs[2:] == [0, 0, 0]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_under_autocast_evaluations_are_made_and_counted_once(method) -> None:
    field, y0 = CountingField().float(), torch.ones(4, 3)
    with symplectic_plugin.profile() as solves, torch.autocast("cpu", torch.bfloat16):
        torchdiffeq.odeint(
            field, y0, torch.linspace(0, 1, 5), method=f"symplectic_adjoint:{method}", rtol=1e-2, atol=1e-2,
            options={"compile": {"backend": "eager"}},
        )  # fmt: skip
    assert field.nfe == solves[0].evaluations


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_state_that_is_a_number(method, dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1, 1, dtype=dtype)  # takes no state of more precision
    first = {"first_step": 0.1} if method in ADAPTIVE else {}  # torchdiffeq's choice of it is made with such states

    def gradient(**options: Any) -> tuple[Tensor, ...]:
        y0 = torch.ones((), dtype=dtype, requires_grad=True)
        y = torchdiffeq.odeint(
            lambda t, y: layer(y.view(1, 1)).view(()), y0, torch.linspace(0, 1, 5),
            method=f"symplectic_adjoint:{method}", rtol=1e-3, atol=1e-3, options=options | first,
        )  # fmt: skip
        return torch.autograd.grad(y.abs().sum(), (y0, layer.weight))

    assert_same(gradient(compile=AOT), gradient(), 1e-5)


def test_half_precision_is_summed_as_without_compilation() -> None:
    field, y0 = Field().to(torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True)

    def gradient(**options: Any) -> tuple[Tensor, ...]:
        y = torchdiffeq.odeint(
            field, y0, torch.linspace(0, 1, 4), method="symplectic_adjoint:rk4",
            options={"step_size": 1 / 11, **options},
        )  # fmt: skip
        return torch.autograd.grad((y.float() ** 2).sum(), (y0, *field.parameters()))

    for actual, expected in zip(gradient(compile=AOT), gradient(), strict=True):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.abs().max()))


def without_compiler(*_: Any) -> Any:
    """A backend that does not work."""
    raise RuntimeError("there is no compiler here")


def failing_when_called(module: Any, inputs: Any) -> Callable[..., Any]:
    """A backend whose programs do not work."""
    return without_compiler


@pytest.mark.parametrize("backend", [without_compiler, failing_when_called])
@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdiffeq dopri5", "torchdyn rk4"])
def test_where_compilation_fails_a_warning_says_so_and_nothing_is_lost(solver, backend) -> None:
    with pytest.warns(UserWarning, match="torch.compile failed.*there is no compiler"):
        actual = gradients(solver, compile={"backend": backend})
    assert_same(actual, gradients(solver))


@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdiffeq dopri5", "torchdyn rk4"])
def test_errors_of_f_are_its_own(solver) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise KeyError("a key")
        return y * t

    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    with pytest.raises(KeyError, match="a key"):
        solver_of(solver, compile=AOT)(f, Y0, t)


SLOPES = {
    "must return a tensor of the state's shape": lambda z: z.mean(0, keepdim=True),  # could be broadcast
    "must return numbers, got booleans": lambda z: z > 0,
    "got NoneType": lambda z: None,
}


@pytest.mark.parametrize("message", SLOPES)
@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdyn rk4"])
def test_what_is_no_slope_is_refused_also_later_on(solver, message) -> None:
    def f(t: Tensor, y: Tensor) -> Any:
        return SLOPES[message](y) if t > 0.3 else torch.sin(y)

    t, y0 = torch.linspace(0, 1, 9, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        solver_of(solver, compile=AOT)(f, y0, t)


@pytest.mark.parametrize(
    ("solver", "with_dropout"),
    [("torchdiffeq rk4", False), ("torchdiffeq rk4", True), ("torchdiffeq dopri5", False), ("torchdyn rk4", True)],
)
def test_statistics_of_batch_norms_are_as_without_compilation(solver, with_dropout) -> None:
    def run(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        norm, dropout = nn.BatchNorm1d(8), nn.Dropout(0.5 if with_dropout else 0)
        field = nn.Sequential(nn.Linear(3, 8), norm, nn.Tanh(), dropout, nn.Linear(8, 3)).double()
        y0, t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.linspace(0, 1, 5).double()
        y = solver_of(solver, **options)(lambda t, y: field(y), y0, t)
        gradients = torch.autograd.grad((y**2).sum(), (y0, field[-1].weight))
        return [*gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked.double()]

    with pytest.warns(UserWarning, match="not compiled: a batch norm in training mode"):
        actual = run(compile=AOT)
    assert_same(actual, run())


@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdyn rk4"])
def test_a_batch_norm_that_f_only_holds_is_no_reason_not_to_compile(solver) -> None:
    model, backend = nn.ModuleDict({"encoder": nn.BatchNorm1d(3), "field": Field()}).double(), Counting()
    y0 = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    solve = solver_of(solver, compile={"backend": backend})
    solve(lambda t, y: model["field"](t, y), model["encoder"](y0), torch.linspace(0, 1, 5, dtype=torch.float64))
    assert backend.calls > 0


@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdyn rk4"])
def test_what_is_no_way_to_compile_is_refused(solver) -> None:
    with pytest.raises(ValueError, match="compile must be"):
        gradients(solver, compile=3)


def test_random_numbers_are_the_same_in_the_backward_pass() -> None:
    field, t = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double(), torch.linspace(0, 1, 5)

    def gradient(method: str, **options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        y0 = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        y = torchdiffeq.odeint(lambda t, y: field(y), y0, t.double(), method=method, options=options)
        return torch.autograd.grad((y**2).sum(), (y0, *field.parameters()))

    assert_same(gradient("symplectic_adjoint:rk4", compile=AOT), gradient("rk4"))
