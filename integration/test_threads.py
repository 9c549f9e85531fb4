"""Threads that solve with one module at the same time: nothing of it is touched in a backward pass."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

D = torch.float64
T = torch.linspace(0, 0.3, 4, dtype=D)
Y0 = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=D)


def by_torchdiffeq(field: Any, y0: Tensor, method: str = "symplectic_adjoint:rk4") -> Tensor:
    options = {"step_size": 0.1} | ({"checkpoint": "steps"} if ":" in method else {})
    return torchdiffeq.odeint(field, y0, T, method=method, options=options)[-1]


def by_torchdyn(field: Any, y0: Tensor, method: str = "symplectic_adjoint:rk4") -> Tensor:
    core = pytest.importorskip("torchdyn.core")
    if ":" not in method:
        return core.NeuralODE(field, solver="rk4", sensitivity="autograd", return_t_eval=False)(y0, T)[-1]
    ode = core.NeuralODE(field, solver="rk4", sensitivity="symplectic_adjoint", return_t_eval=False)
    ode.solver.checkpoint = "steps"
    return ode(y0, T)[-1]


hosts = pytest.mark.parametrize("solve", [by_torchdiffeq, by_torchdyn])


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Have threads switch often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Field(nn.Module):
    """A vector field with a batch norm and a context, which may say when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.context: Any = None

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        slope = self.net(y)
        return slope if self.context is None else torch.tanh(slope + self.context)

    @property
    def statistics(self) -> dict[str, Tensor]:
        return dict(self.net[1]._buffers)


def gradient(field: Field, solve: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    y0 = Y0.clone().requires_grad_()
    return list(torch.autograd.grad(solve(field, y0, **options).pow(2).sum(), [y0, *field.parameters()]))


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-13


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """The results of works that begin at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))


@hosts
class TestStatistics:
    def test_two_backward_passes_at_the_same_time_count_nothing(self, solve) -> None:
        field, plain = Field(), Field()
        expected = [gradient(plain, solve, method="rk4") for _ in range(2)]
        buffers = field.statistics
        for k in range(15):
            losses = [solve(field, Y0.clone().requires_grad_()).pow(2).sum() for _ in range(2)]
            values = {name: x.clone() for name, x in buffers.items()}
            parameters = list(field.parameters())
            found = in_threads(*(functools.partial(torch.autograd.grad, loss, parameters) for loss in losses))
            for of_thread in found:
                assert_same(of_thread, expected[0][1:])
            assert all(field.statistics[name] is x for name, x in buffers.items())
            assert all(torch.equal(x, values[name]) for name, x in buffers.items())
            if k == 0:
                assert_same([x.double() for x in buffers.values()], [x.double() for x in plain.statistics.values()])

    def test_a_forward_pass_during_a_backward_pass_loses_none(self, solve) -> None:
        field, plain = Field(), Field()
        buffers = field.statistics
        for _ in range(15):
            loss = solve(field, Y0.clone().requires_grad_()).pow(2).sum()
            solve(plain, Y0.clone().requires_grad_(), method="rk4")

            def forward() -> None:
                for _ in range(3):
                    solve(field, Y0.clone().requires_grad_())

            in_threads(loss.backward, forward)
            for _ in range(3):
                solve(plain, Y0.clone().requires_grad_(), method="rk4")
            assert all(field.statistics[name] is x for name, x in buffers.items())
        assert_same([x.double() for x in buffers.values()], [x.double() for x in plain.statistics.values()])


class Watched(Field):
    """A field whose attributes only one thread may set, whatever others do with it."""

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self.__dict__.setdefault("owner", threading.get_ident())
        assert owner == threading.get_ident(), name
        super().__setattr__(name, value)


@hosts
@pytest.mark.parametrize("computed", [False, True])
def test_a_context_set_anew_for_each_solve_while_another_thread_goes_back(solve, computed) -> None:
    field, encoder = Watched().eval(), nn.Linear(1, 2).double()
    values = [torch.full((1,), float(i), dtype=D) for i in range(6)]

    def solved(i: int, method: str) -> tuple[Tensor, Tensor]:
        field.context = encoder(values[i]) if computed else encoder(values[i]).detach()
        return solve(field, Y0.clone().requires_grad_(), method=method).pow(2).sum()

    parameters = [*field.parameters(), *(encoder.parameters() if computed else ())]
    expected = [torch.autograd.grad(solved(i, "rk4"), parameters) for i in range(len(values))]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            losses = (solved(i, "symplectic_adjoint:rk4") for i in range(len(values)))  # while others go back
            found = [pool.submit(torch.autograd.grad, loss, parameters) for loss in losses]
        assert field.context is not None
        for of_solve, theirs in zip(found, expected, strict=True):
            assert_same(of_solve.result(), theirs)


@hosts
def test_nobody_sees_what_a_backward_pass_works_with(solve) -> None:
    cell, items, names = [torch.zeros(2, dtype=D) for _ in range(3)], [1.0], {"scale": 1.0}
    field, value = Field(), 1.0

    def f(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return field(t, y) * items[0] * names["scale"] * value + cell[0]

    loss = solve(f, Y0.clone().requires_grad_()).pow(2).sum()
    field.eval()
    field.context = torch.ones(2, dtype=D)
    items[0] = names["scale"] = value = 2.0
    expected = field.context, field.training, items[0], names["scale"], f.__closure__
    statistics = field.statistics
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            now = field.context, field.training, items[0], names["scale"], f.__closure__
            buffers = field.statistics
            seen.append(
                now[0] is expected[0]
                and now[1:] == expected[1:]
                and value == 2.0
                and all(buffers[name] is x for name, x in statistics.items())
            )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        ours = torch.autograd.grad(loss, list(field.parameters()))
    finally:
        done.set()
        thread.join()
    assert all(seen)
    items[0] = names["scale"] = value = 1.0
    field.context = None
    field.train()
    reference = solve(f, Y0.clone().requires_grad_(), method="rk4").pow(2).sum()
    assert_same(list(ours), list(torch.autograd.grad(reference, list(field.parameters()))))


class TestRandomNumbers:
    @hosts
    def test_threads_that_draw_get_a_right_gradient_or_an_error(self, solve) -> None:
        """Each gradient is checked against autograd's, of a field that draws the same."""
        dropout, w = nn.Dropout(0.5), torch.randn(2, 2, dtype=D, requires_grad=True)
        outcomes: list[str] = []

        def work(seed: int) -> None:
            masks: list[Tensor] = []

            def f(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
                mask = dropout(torch.ones_like(y))
                if recording[0]:
                    masks.append(mask.detach())
                return torch.tanh(y @ w) * mask

            for _ in range(4):
                masks.clear()
                recording = [True]
                loss = solve(f, Y0.clone().requires_grad_()).pow(2).sum()
                recording = [False]
                used = itertools.count()
                fixed = lambda t, y, args=None: torch.tanh(y @ w) * masks[next(used)]  # noqa: E731, B023
                expected = torch.autograd.grad(solve(fixed, Y0, method="rk4").pow(2).sum(), w)
                try:
                    assert_same(list(torch.autograd.grad(loss, w)), list(expected))
                    outcomes.append("right")
                except RuntimeError as error:
                    outcomes.append(str(error))

        in_threads(*(lambda seed=seed: work(seed) for seed in range(3)))
        assert len(outcomes) == 12
        assert "right" in outcomes
        assert all(outcome == "right" or "returned other values" in outcome for outcome in outcomes)

    def test_f_that_draws_and_waits_for_a_thread_that_draws(self) -> None:
        dropout, w = nn.Dropout(0.5), torch.eye(2, dtype=D).requires_grad_()
        with ThreadPoolExecutor(1) as pool:

            def inner(y: Tensor) -> Tensor:
                with torch.enable_grad():
                    y = y.detach().requires_grad_()
                    energy = by_torchdiffeq(lambda t, z: dropout(torch.tanh(z @ w)), y).pow(2).sum()
                    return torch.autograd.grad(energy, y)[0]

            def f(t: Tensor, y: Tensor) -> Tensor:
                return dropout(torch.tanh(y @ w)) - pool.submit(inner, y).result()

            def gradient(method: str) -> Tensor:
                torch.manual_seed(0)
                return torch.autograd.grad(by_torchdiffeq(f, Y0, method).pow(2).sum(), w)[0]

            found: list[Tensor] = []
            thread = threading.Thread(target=lambda: found.append(gradient("symplectic_adjoint:rk4")), daemon=True)
            thread.start()
            thread.join(60)
            assert found
            assert_same(found, [gradient("rk4")])

    @hosts
    def test_what_is_drawn_between_evaluations_in_a_backward_pass_is_not_drawn_again(self, solve) -> None:
        dropout, w, drawn = nn.Dropout(0.5), torch.eye(2, dtype=D).requires_grad_(), []

        def f(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            slope = torch.tanh(dropout(y @ w))
            if slope.requires_grad:
                slope.register_hook(lambda g: drawn.append(torch.rand(4)))
            return slope

        loss = solve(f, Y0).pow(2).sum()
        before = torch.get_rng_state()
        torch.autograd.grad(loss, w)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        assert len(drawn) == 12
        assert all(torch.equal(torch.rand(4), x) for x in drawn)
        assert torch.equal(torch.get_rng_state(), after)


def test_an_f_that_waits_for_threads_which_go_back_through_solves_comes_to_an_end() -> None:
    w, y0 = torch.randn(2, 2, dtype=D, requires_grad=True), Y0.clone().requires_grad_()
    contexts = [1.0, 1.0]

    def force(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            contexts[0] = 1.0
            inner = torchdiffeq.odeint(
                lambda t, y: torch.tanh(y @ w) * contexts[0], z, T[:2], method="symplectic_adjoint:rk4",
                options={"checkpoint": "stages"},
            )  # fmt: skip
            contexts[0] = 2.0
            return torch.autograd.grad(inner[-1].pow(2).sum(), z)[0]

    with ThreadPoolExecutor(2) as pool:
        f = lambda t, y: -pool.submit(force, y).result() * contexts[1] + torch.tanh(y @ w)  # noqa: E731
        y = torchdiffeq.odeint(f, y0, T, method="symplectic_adjoint:rk4", options={"checkpoint": "steps"})
        contexts[1] = 7.0
        y.sum().backward()
