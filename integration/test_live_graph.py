"""A small solve is one live graph, autograd's own; and a solve that had to give it up on the way is as exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import symplectic_plugin

from .exactness import assert_same
from .fields import MLP, T, mlp, random
from .hosts import ADAPTIVE, EXPLICIT, FLAG, given_steps, least_budget


def is_live(y: Tensor) -> bool:
    """Tell whether autograd's own graph of all steps hangs on a solution, instead of one node for the solve."""
    return not hasattr(y.grad_fn, "_forward_cls")  # as nodes of functions have that are written in Python


class Conditional(nn.Module):
    """A field of a context, both the context and the initial state made by one encoder."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(3, 3).double()
        self.field = MLP(3, 8, torch.Generator().manual_seed(seed))

    def gradients(self, x: Tensor, t: Tensor, entangled: bool, **keywords: Any) -> tuple[list[Tensor], Tensor]:
        context = torch.tanh(self.encoder(x))
        start = 2 * context if entangled else x
        bias = self.encoder.bias if entangled else 0
        f = lambda t, y: self.field(t, y) + torch.sin(t) * context * y + bias  # noqa: E731
        y = torchdiffeq.odeint(f, start, t, rtol=1e-3, atol=1e-3, **keywords)
        loss = (y**2 * torch.arange(1.0, len(t) + 1, dtype=t.dtype).view(-1, 1, 1)).sum() + start.sum()
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad and "unused" not in name]
        return [y.detach(), *torch.autograd.grad(loss, [p for _, p in named])], y


@pytest.mark.parametrize("method", EXPLICIT)
@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(2, 7), st.booleans(), st.one_of(st.none(), st.floats(-1.0, 4.0)))
def test_exact_wherever_it_is_given_up(method, seed, outputs, entangled, exponent) -> None:
    model, x = Conditional(seed), torch.randn(4, 3, dtype=torch.float64)
    t = torch.linspace(0, 3, outputs, dtype=torch.float64)
    options: dict[str, Any] = given_steps(method, 0.1 if method in ADAPTIVE else 1 / 9)
    expected, _ = model.gradients(x, t, entangled, method=method, options=options)
    if exponent is not None:
        least = least_budget(
            lambda budget: model.gradients(
                x, t, entangled, method=f"{FLAG}:{method}", options={**options, "memory_budget": budget}
            )
        )
        options["memory_budget"] = int(least * (1 + 2**exponent))
    actual, y = model.gradients(x, t, entangled, method=f"{FLAG}:{method}", options=options)
    assert exponent is not None or is_live(y)
    assert_same(actual, expected)


@pytest.mark.parametrize("method", EXPLICIT)
def test_all_that_autograd_can_do(method) -> None:
    field, found = mlp(size=3), []
    options = given_steps(method, 0.15)
    for flag in ("", f"{FLAG}:"):
        y0 = random(2, 3, seed=1).requires_grad_()
        y = torchdiffeq.odeint(field, y0, T, method=flag + method, rtol=1e-2, atol=1e-2, options=options)
        (first,) = torch.autograd.grad((y**3).sum(), y0, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), y0, create_graph=True)
        (third,) = torch.autograd.grad((second**2).sum(), field.w1, retain_graph=True)
        rows = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
        found.append([first, second, third, *torch.autograd.grad(y[-1], (y0, field.w1), rows, is_grads_batched=True)])
    assert is_live(y)
    assert_same(found[1], found[0], 1e-11)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
class TestLive:
    def test_a_solution_that_the_model_keeps_is_not_taken_for_what_the_next_one_depends_on(self, method) -> None:
        field = mlp(size=3)
        kept: list[Tensor] = []
        f = lambda t, y: field(t, y) if kept is not None else y  # noqa: E731
        first = torchdiffeq.odeint(f, random(2, 3, seed=1), T, method=f"{FLAG}:{method}")
        kept.append(first * 2)
        assert is_live(first)
        second = torchdiffeq.odeint(
            f, random(2, 3, seed=1), T, method=f"{FLAG}:{method}", options={"checkpoint": "steps"}
        )
        assert not is_live(second)
        ours = torch.autograd.grad(second.sum(), field.w1)
        assert torch.allclose(torch.autograd.grad(first.sum(), field.w1)[0], ours[0], rtol=1e-12)

    @pytest.mark.parametrize("inputs", ["parameters", "all"])
    def test_its_profile(self, method, inputs) -> None:
        field, y0 = mlp(size=3), random(2, 3, seed=1).requires_grad_()
        with symplectic_plugin.profile() as solves:
            y = torchdiffeq.odeint(field, y0, T, method=f"{FLAG}:{method}")
        torch.autograd.grad(y.sum(), (field.w1, field.w2) if inputs == "parameters" else (field.w1, y0))
        (solve,) = solves
        assert is_live(y)
        assert f"graphs of {solve.accepted} of {solve.accepted} steps" in solve.kept
        assert solve.recomputed == 0
        # dopri5's choice of its first step takes another evaluation; what is rejected has no backward pass.
        assert solve.vjps == (4 * solve.accepted if method == "rk4" else 6 * solve.accepted + 1) <= solve.evaluations
        assert solve.backward_seconds > 0

    def test_a_graph_that_grows_beyond_the_budget(self, method) -> None:
        """After some time f keeps some fifty times as much."""
        found = []
        for flag in ("", f"{FLAG}:"):
            field, y0 = mlp(size=3), random(2, 3, seed=1).requires_grad_()

            def f(t, y, field=field):
                slope = field(t, y)
                for _ in range(200 if t > 0.4 else 1):
                    slope = slope + 1e-3 * torch.sin(slope)
                return slope

            options = given_steps(method)
            if flag:
                options["memory_budget"] = 150_000
            y = torchdiffeq.odeint(f, y0, T, method=flag + method, options=options)
            found.append(torch.autograd.grad(y.sum(), (y0, field.w1)))
        assert not is_live(y)
        assert_same(found[1], found[0])

    def test_solves_of_what_solves_before_them_gave_count_their_own_graphs_alone(self, method) -> None:
        field, context = mlp(size=3), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        with symplectic_plugin.profile() as solves:
            for _ in range(5):
                y = torchdiffeq.odeint(
                    lambda t, y, c=context: field(t, y) + c,
                    random(2, 3, seed=1) + context,
                    T,
                    method=f"{FLAG}:{method}",
                )
                context = y[-1]
        assert len({solve.evaluation_bytes for solve in list(solves)[1:]}) == 1
