"""Solves whose graphs are all kept are one graph, autograd's own; and those that had to give that up are as exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import symplectic_plugin

from .fields import ADAPTIVE, FIXED, MLP, complex_states

FLAG = "symplectic_adjoint"
T = torch.linspace(0, 1, 4, dtype=torch.float64)


def is_whole(y: Tensor) -> bool:
    """Whether a solution is no solve of ours for autograd."""
    return "Recorded" not in y.grad_fn.name()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mlp(size: int = 3, hidden: int = 8) -> MLP:
    return MLP(size, hidden, torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("method", ADAPTIVE + FIXED)
@settings(max_examples=12)
@given(st.integers(0, 2**31), st.integers(2, 7), st.booleans(), st.one_of(st.none(), st.floats(-1.0, 4.0)))
def test_exact_wherever_it_is_given_up(method, seed, outputs, entangled, exponent) -> None:
    model, x = Conditional(seed), torch.randn(4, 3, dtype=torch.float64)
    t = torch.linspace(0, 3, outputs, dtype=torch.float64)
    options: dict[str, Any] = {"first_step": 0.1} if method in ADAPTIVE else {"step_size": 1 / 9}
    expected, _ = model.gradients(x, t, entangled, method=method, options=options)
    if exponent is not None:
        with pytest.raises(ValueError, match="needs at least") as error:
            model.gradients(x, t, entangled, method=f"{FLAG}:{method}", options={**options, "memory_budget": 1})
        least = int(str(error.value).split("needs at least ")[1].split()[0])
        options["memory_budget"] = int(least * (1 + 2**exponent))
    actual, y = model.gradients(x, t, entangled, method=f"{FLAG}:{method}", options=options)
    assert exponent is not None or is_whole(y)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_all_that_autograd_can_do(method) -> None:
    field, found = mlp(), []
    options = {"first_step": 0.1} if method in ADAPTIVE else {"step_size": 0.15}
    for flag in ("", f"{FLAG}:"):
        y0 = random(2, 3).requires_grad_()
        y = torchdiffeq.odeint(field, y0, T, method=flag + method, rtol=1e-2, atol=1e-2, options=options)
        (first,) = torch.autograd.grad((y**3).sum(), y0, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), y0, create_graph=True)
        (third,) = torch.autograd.grad((second**2).sum(), field.w1, retain_graph=True)
        rows = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
        found.append([first, second, third, *torch.autograd.grad(y[-1], (y0, field.w1), rows, is_grads_batched=True)])
    assert is_whole(y)
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
class TestWhole:
    def test_events(self, method) -> None:
        field, found = mlp(), []
        for flag in ("", f"{FLAG}:"):
            y0 = random(3).requires_grad_()
            options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.1}
            event_t, y = torchdiffeq.odeint_event(
                lambda t, y: field(t, y) + 1, y0, T[0], event_fn=lambda t, y: y[0] - 1.7, method=flag + method,
                options=options,
            )  # fmt: skip
            found.append([event_t.detach(), *torch.autograd.grad(event_t + y[-1].sum(), (y0, field.w1))])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()

    def test_a_solution_that_the_model_keeps_is_not_taken_for_what_the_next_one_depends_on(self, method) -> None:
        field = mlp()
        kept: list[Tensor] = []
        f = lambda t, y: field(t, y) if kept is not None else y  # noqa: E731
        first = torchdiffeq.odeint(f, random(2, 3), T, method=f"{FLAG}:{method}")
        kept.append(first * 2)
        assert is_whole(first)
        second = torchdiffeq.odeint(f, random(2, 3), T, method=f"{FLAG}:{method}", options={"checkpoint": "steps"})
        assert not is_whole(second)
        ours = torch.autograd.grad(second.sum(), field.w1)
        assert torch.allclose(torch.autograd.grad(first.sum(), field.w1)[0], ours[0], rtol=1e-12)

    def test_hooks_run_once_and_see_the_sum(self, method) -> None:
        found = []
        for flag in ("", f"{FLAG}:"):
            field, seen = mlp(), []
            field.w1.register_hook(lambda g, seen=seen: seen.append(g) or 2 * g)
            field.w2.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad))
            options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.1}
            y = torchdiffeq.odeint(field, random(2, 3), T, method=flag + method, options=options)
            y.sum().backward()
            assert len(seen) == 2
            found.append([*sorted(seen, key=lambda g: g.shape[0]), field.w1.grad])
        assert is_whole(y)
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()

    @pytest.mark.parametrize("inputs", ["parameters", "all"])
    def test_its_profile(self, method, inputs) -> None:
        field, y0 = mlp(), random(2, 3).requires_grad_()
        with symplectic_plugin.profile() as solves:
            y = torchdiffeq.odeint(field, y0, T, method=f"{FLAG}:{method}")
        torch.autograd.grad(y.sum(), (field.w1, field.w2) if inputs == "parameters" else (field.w1, y0))
        (solve,) = solves
        assert is_whole(y)
        assert f"graphs of {solve.accepted} of {solve.accepted} steps" in solve.kept
        assert solve.recomputed == 0
        # dopri5's choice of its first step takes another evaluation; what is rejected has no backward pass.
        assert solve.vjps == (4 * solve.accepted if method == "rk4" else 6 * solve.accepted + 1) <= solve.evaluations
        assert solve.backward_seconds > 0

    def test_a_graph_that_grows_beyond_the_budget(self, method) -> None:
        """After some time f keeps a hundred times as much."""
        found = []
        for flag in ("", f"{FLAG}:"):
            field, y0 = mlp(), random(2, 3).requires_grad_()

            def f(t, y, field=field):
                slope = field(t, y)
                for _ in range(400 if t > 0.4 else 1):
                    slope = slope + 1e-3 * torch.sin(slope)
                return slope

            options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.1}
            if flag:
                options["memory_budget"] = 150_000
            y = torchdiffeq.odeint(f, y0, T, method=flag + method, options=options)
            found.append(torch.autograd.grad(y.sum(), (y0, field.w1)))
        assert not is_whole(y)
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()

    def test_states_and_times_between_outputs_in_single_and_mixed_precision(self, method) -> None:
        for state, time in ((torch.float32, torch.float32), (torch.float32, torch.float64)):
            found = []
            for flag in ("", f"{FLAG}:"):
                field, y0 = mlp().to(state), random(2, 3).to(state).requires_grad_()
                options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.13}
                f = lambda t, y, field=field: field(t.to(y.dtype), y)  # noqa: E731
                y = torchdiffeq.odeint(f, y0, T.to(time), method=flag + method, rtol=1e-4, atol=1e-4, options=options)
                found.append([y, *torch.autograd.grad(y.sum(), (y0, field.w1))])
            assert is_whole(y)
            for ours, theirs in zip(*found, strict=True):
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm()

    @complex_states
    def test_complex_states(self, method) -> None:
        found = []
        for flag in ("", f"{FLAG}:"):
            w = torch.complex(random(3, 3), random(3, 3)).requires_grad_()
            y0 = torch.complex(random(2, 3), 2 * random(2, 3)).requires_grad_()
            options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.13}
            f = lambda t, y, w=w: torch.tanh(y @ w / 3)  # noqa: E731
            y = torchdiffeq.odeint(f, y0, T, method=flag + method, options=options)
            found.append([y, *torch.autograd.grad((y * y.conj()).real.sum(), (y0, w))])
        assert is_whole(y)
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_long_sum_in_half_precision(dtype) -> None:
    """Autograd sums in the parameters' precision, in which such a sum would lose what is small."""
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    y = torchdiffeq.odeint(
        lambda t, y: (scale * torch.ones(3)).to(y.dtype), torch.zeros(3), torch.tensor([0.0, 1.0]),
        method=f"{FLAG}:euler", options={"step_size": 1 / 4096},
    )  # fmt: skip
    assert not is_whole(y)
    (gradient,) = torch.autograd.grad(y[-1].mean(), scale)
    assert abs(float(gradient) - 1) < 1e-2


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
class TestWhatIsAround:
    def test_a_parameter_that_is_held_and_not_used_may_move(self, method) -> None:
        field = mlp()
        y = torchdiffeq.odeint(field, random(2, 3), T, method=f"{FLAG}:{method}")
        field.unused.data = torch.zeros(3, dtype=torch.float64)
        y.sum().backward()
        assert is_whole(y)

    def test_the_one_that_is_used_may_not(self, method) -> None:
        field = mlp()
        y = torchdiffeq.odeint(field, random(2, 3), T, method=f"{FLAG}:{method}")
        field.w1.data = torch.zeros_like(field.w1)
        with pytest.raises(RuntimeError, match="was given other memory"):
            y.sum().backward()

    def test_solves_of_what_solves_before_them_gave_count_their_own_graphs_alone(self, method) -> None:
        field, context = mlp(), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        with symplectic_plugin.profile() as solves:
            for _ in range(5):
                y = torchdiffeq.odeint(
                    lambda t, y, c=context: field(t, y) + c, random(2, 3) + context, T, method=f"{FLAG}:{method}"
                )
                context = y[-1]
        assert len({solve.evaluation_bytes for solve in list(solves)[1:]}) == 1

    def test_one_time_alone_is_the_initial_state(self, method) -> None:
        field, y0 = mlp(), random(2, 3).requires_grad_()
        field.w1.register_hook(lambda g: 2 * g)  # which fails where there is no gradient
        y = torchdiffeq.odeint(field, y0, T[:1], method=f"{FLAG}:{method}", options={"checkpoint": "steps"})
        y.sum().backward()
        assert torch.equal(y, y0[None])
        assert torch.equal(y0.grad, torch.ones_like(y0))


def test_states_of_no_elements_with_outputs_inside_steps() -> None:
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    y0 = torch.zeros(0, 2, dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: w * y, y0, T, method=f"{FLAG}:rk4", options={"step_size": 0.25})
    y.sum().backward()
    assert y.shape == (4, 0, 2)
    assert w.grad == 0


def test_a_grid_that_goes_back() -> None:
    found = []
    for flag in ("", f"{FLAG}:"):
        field, y0 = mlp(), random(2, 3).requires_grad_()
        grid = torch.tensor([0, 0.5, 0.3, 1.0], dtype=torch.float64)
        y = torchdiffeq.odeint(field, y0, T, method=f"{flag}rk4", options={"grid_constructor": lambda *_, g=grid: g})
        found.append([y.detach(), *torch.autograd.grad((y * random(4, 2, 3)).sum(), (y0, field.w1))])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
