"""Threads that share a module: what one thread's backward pass needs is never seen by another, nor lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from .exactness import assert_same
from .fields import random
from .hosts import every_solver, solve

T = torch.linspace(0, 1, 3, dtype=torch.float64)
ROUNDS = 15


def in_threads(*works: Callable[[], Any]) -> None:
    """Run functions at the same time, and raise what one of them raises."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Normed(nn.Module):
    """A field with batch norm, whose statistics count its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


@pytest.mark.usefixtures("states_alone")
@every_solver
def test_backward_passes_in_threads_count_in_no_statistics(solver) -> None:
    field = Normed()
    norm, evaluated = field.net[1], 0
    buffers = dict(norm.named_buffers())
    field.register_forward_hook(lambda *_: None)
    for _ in range(ROUNDS):
        losses = [solve(solver, True, field, random(6, 3).requires_grad_(), T).sum() for _ in range(2)]
        values = {name: buffer.clone() for name, buffer in buffers.items()}
        assert int(values["num_batches_tracked"]) > evaluated
        evaluated = int(values["num_batches_tracked"])
        in_threads(*(loss.backward for loss in losses))
        for name, buffer in norm.named_buffers():
            assert buffer is buffers[name]
            assert torch.equal(buffer, values[name])


@pytest.mark.usefixtures("states_alone")
@every_solver
def test_a_forward_pass_during_a_backward_pass_loses_no_statistics(solver) -> None:
    field, alone = Normed(), Normed()
    y0 = random(6, 3)
    solve(solver, True, alone, y0, T)
    each = int(alone.net[1].num_batches_tracked)
    for done in range(1, ROUNDS + 1):
        loss = solve(solver, True, field, y0.clone().requires_grad_(), T).sum()
        in_threads(loss.backward, lambda: solve(solver, True, field, y0, T))
        assert int(field.net[1].num_batches_tracked) == 2 * done * each


class Controlled(nn.Module):
    """A field with a context that is set anew for each solve."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(3, 3).double()
        self.context = torch.zeros(3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y) + self.context)


@pytest.mark.usefixtures("states_alone")
@every_solver
@pytest.mark.parametrize("flag", [True, False])
def test_a_context_set_anew_is_seen_by_other_threads_during_a_backward_pass(solver, flag) -> None:
    field, y0 = Controlled(), random(6, 3)
    first, second = random(3), -random(3)

    def gradients(context: Tensor) -> tuple[Tensor, ...]:
        field.context = context
        return torch.autograd.grad(solve(solver, flag, field, y0, T).sum(), list(field.parameters()))

    expected = [gradients(context) for context in (first, second)]
    for _ in range(ROUNDS):
        field.context = first
        loss, found = solve(solver, True, field, y0, T).sum(), {}
        field.context = second

        def backward(loss: Tensor = loss, found: dict[int, Any] = found) -> None:
            found[0] = torch.autograd.grad(loss, list(field.parameters()))

        def another(found: dict[int, Any] = found) -> None:
            for _ in range(3):
                found[1] = torch.autograd.grad(solve(solver, flag, field, y0, T).sum(), list(field.parameters()))

        in_threads(backward, another)
        assert field.context is second
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])


@pytest.mark.usefixtures("states_alone")
@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdyn rk4"])
def test_random_numbers_drawn_in_threads_give_the_right_gradient_or_an_error(solver) -> None:
    w, right = random(3).requires_grad_(), []

    def work() -> None:
        y0 = random(3)
        for _ in range(5 * ROUNDS):
            y = solve(solver, True, lambda t, y: w * torch.rand(3, dtype=torch.float64), y0, T)[-1]
            try:
                (gradient,) = torch.autograd.grad(y.sum(), w)
            except RuntimeError as error:  # the other thread drew while it was not known yet that f does
                if "returned other values" not in str(error):
                    raise
                continue
            # The solution is linear in w, whatever was drawn.
            assert_same([gradient], [(y.detach() - y0) / w.detach()], 1e-11)
            right.append(gradient)

    in_threads(work, work)
    assert len(right) > ROUNDS


def test_an_f_that_waits_for_threads_which_go_back_through_solves_comes_to_an_end() -> None:
    from concurrent.futures import ThreadPoolExecutor

    w, y0 = random(3, 3).requires_grad_(), random(2, 3).requires_grad_()
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
