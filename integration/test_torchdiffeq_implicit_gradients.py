"""Gradients of implicit methods through torchdiffeq's odeint are the discrete solution's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import symplectic_plugin
from benchmarks.stiff import TIMES, Learned
from symplectic_plugin.record.store import POLICIES

from .exactness import Outcome, assert_exact, errors
from .fields import StiffField, output_times
from .hosts import ADDITIVE, FLAG, IMPLICIT, IMPLICIT_ADAPTIVE, IMPLICIT_FIXED, given_steps, least_budget

pytestmark = pytest.mark.usefixtures("implicit_references")

EXACT = 1e-10
AS_EXACT = {"bound": EXACT, "values": 1e-11}


class Pair(nn.Module):
    """Vector field for two states of different shapes, each of which acts on the other."""

    def __init__(self, field: StiffField) -> None:
        super().__init__()
        self.field = field

    def stiff(self, t, xs):
        return self.field.stiff(t, xs[0]), -5 * xs[1] * self.field.wt[0]

    def nonstiff(self, t, xs):
        return self.field.nonstiff(t, xs[0] * xs[1].mean()), torch.sin(xs[0].sum() + xs[1])

    def forward(self, t, xs):
        return tuple(a + b for a, b in zip(self.stiff(t, xs), self.nonstiff(t, xs), strict=True))


problems = st.tuples(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([(), (2,)]), st.floats(1, 300))


def make(problem, t: Tensor) -> tuple[StiffField, Tensor]:
    seed, size, batch, stiffness = problem
    y0 = torch.randn(*batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return StiffField(size, seed, stiffness, t), y0


@pytest.mark.parametrize("method", IMPLICIT_FIXED)
@settings(max_examples=3)
@given(problems, st.data())
def test_fixed_grids(method, problem, data) -> None:
    t = data.draw(output_times(0.7))
    field, y0 = make(problem, t)
    options = {
        "interp": data.draw(st.sampled_from(["linear", "cubic"])),
        "perturb": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        options["step_size"] = data.draw(st.floats(0.1, 0.5))
    expected = Outcome(field, y0, t, method=f"reference_{method}", options=options)
    options["checkpoint"] = data.draw(st.sampled_from(POLICIES))
    options["linear_solver"] = data.draw(st.sampled_from(["dense", "gmres"]))
    assert_exact(Outcome(field, y0, t, method=f"{FLAG}:{method}", options=options), expected, **AS_EXACT)


@pytest.mark.parametrize("method", IMPLICIT_ADAPTIVE)
@settings(max_examples=3)
@given(problems, st.data())
def test_adaptive_steps(method, problem, data) -> None:
    t = data.draw(output_times(0.7))
    field, y0 = make(problem, t)
    options = {"first_step": data.draw(st.floats(0.01, 0.3))}
    if data.draw(st.booleans()):
        options["jump_t"] = t.min() + 0.7 * torch.tensor([0.313, 0.612], dtype=torch.float64)
    if data.draw(st.booleans()) and method not in ADDITIVE:
        options["step_t"] = t.min() + 0.7 * torch.tensor([0.441], dtype=torch.float64)
    solve = {"rtol": 1e-3, "atol": 1e-3}
    expected = Outcome(field, y0, t, method=f"reference_{method}", options=options, **solve)
    options["checkpoint"] = data.draw(st.sampled_from(POLICIES))
    options["linear_solver"] = data.draw(st.sampled_from(["dense", "gmres"]))
    assert_exact(Outcome(field, y0, t, method=f"{FLAG}:{method}", options=options, **solve), expected, **AS_EXACT)


def test_robertsons_kinetics() -> None:
    """Rates that differ by nine orders of magnitude."""
    t, problem = TIMES[:25], Learned()  # to t = 5.6
    y0, scale = problem.y0, torch.tensor([1.0, 3e-5, 1.0], dtype=torch.float64)

    def odeint(field, y0, t, **keywords):
        return torchdiffeq.odeint(field, y0, t, **keywords) / scale

    solve = {"rtol": 1e-3, "atol": 1e-9, "options": {"first_step": 1e-6}, "odeint": odeint}
    expected = Outcome(problem, y0, t, method="reference_kencarp3", **solve)
    assert_exact(Outcome(problem, y0, t, method=f"{FLAG}:kencarp3", **solve), expected, **AS_EXACT)


@pytest.mark.parametrize("method", ["implicit_midpoint", "trbdf2", "gl4", "kencarp3", "kencarp5_imex"])
def test_tuples_of_states(method) -> None:
    field, y0, t = Pair(StiffField(3, 0)), torch.randn(7, dtype=torch.float64), torch.linspace(0, 0.5, 4)
    options = {"step_size": 0.11} if method in IMPLICIT_FIXED else {"first_step": 0.1}

    def odeint(field, y0, t, **keywords):
        states = torchdiffeq.odeint(field, (y0[:6].view(2, 3), y0[6]), t, **keywords)
        return torch.cat([states[0].flatten(1), states[1][:, None]], 1)

    solve = {"rtol": 1e-3, "atol": 1e-3, "options": options, "odeint": odeint}
    expected = Outcome(field, y0, t.double(), method=f"reference_{method}", **solve)
    assert_exact(Outcome(field, y0, t.double(), method=f"{FLAG}:{method}", **solve), expected, **AS_EXACT)


@pytest.mark.parametrize("method", ["trapezoid", "sdirk2", "gl4", "kencarp3", "kencarp5"])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_events(method, interp) -> None:
    field, y0 = StiffField(2, 1, 20.0), torch.tensor([1.0, 0.5], dtype=torch.float64)
    options = {"step_size": 0.11, "interp": interp} if method in IMPLICIT_FIXED else {"first_step": 0.1}
    # Where the second component is on its way to what it decays to.
    level = float(y0[1]) - 0.2

    def gradients(name: str) -> list[Tensor]:
        start, t0 = y0.clone().requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        event_t, y = torchdiffeq.odeint_event(
            field, start, t0, event_fn=lambda t, y: y[1] - level, method=name, options=options, rtol=1e-6, atol=1e-9
        )
        assert 0.15 < float(event_t) < 2
        inputs = [start, t0, *field.parameters()]
        return [event_t.detach(), *torch.autograd.grad(event_t + y[-1, 0], inputs, allow_unused=True)]

    for ours, theirs in zip(gradients(f"{FLAG}:{method}"), gradients(f"reference_{method}"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)  # what the reference's root is off by


@pytest.mark.parametrize("method", IMPLICIT)
def test_the_product_of_adjoint_and_variation_is_conserved(method) -> None:
    """The variation is a part of the state of a solve of its own, by the same steps."""
    field = StiffField(2, 2, 50.0)
    y0, delta, adjoint = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    steps = {"step_size": 0.2} if method in IMPLICIT_FIXED else {"first_step": 0.2, "max_step": 0.2}
    solve = {"method": f"{FLAG}:{method}", "options": steps, "rtol": 1e6, "atol": 1e6}

    class Varied(nn.Module):
        def varied(self, part, t, z):
            return torch.cat(torch.func.jvp(lambda x: part(t, x), (z[:2],), (z[2:],)))

        def stiff(self, t, z):
            return self.varied(field.stiff, t, z)

        def nonstiff(self, t, z):
            return self.varied(field.nonstiff, t, z)

        def forward(self, t, z):
            return self.varied(field, t, z)

    with torch.no_grad():
        end = torchdiffeq.odeint(Varied(), torch.cat([y0, delta]), t, **solve)[-1]
    y0.requires_grad_()
    y = torchdiffeq.odeint(field, y0, t, **solve)[-1]
    torch.testing.assert_close(y.detach(), end[:2], rtol=1e-12, atol=1e-12)
    (before,) = torch.autograd.grad(y, y0, adjoint)
    scale = before.norm() * delta.norm() + adjoint.norm() * end[2:].norm()
    assert abs(before @ delta - adjoint @ end[2:]) <= 1e-12 * scale


def test_a_callback_that_changes_the_state_whatever_is_kept() -> None:
    class Scaling(StiffField):
        steps = 0

        def callback_step(self, t0, y0, dt):
            self.steps += 1
            if self.steps in (3, 7):
                with torch.no_grad():
                    y0.mul_(0.7)

    y0 = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    stages, *others = (
        Outcome(
            Scaling(3, 3), y0, torch.linspace(0, 1, 6, dtype=torch.float64), method=f"{FLAG}:implicit_midpoint",
            options={"step_size": 0.1, "checkpoint": policy},
        )
        for policy in ("stages", "steps", "binomial")
    )  # fmt: skip
    for other in others:
        assert max(errors(other, stages).values()) <= 1e-12


@pytest.mark.parametrize("method", ["gl4", "kencarp3", "kencarp3_imex"])
def test_every_policy_and_budget_gives_the_same_gradient(method, tmp_path) -> None:
    field, y0 = StiffField(3, 3), torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    size = {"step_size": 0.1} if method in IMPLICIT_FIXED else {"first_step": 0.1, "max_step": 0.1}

    def outcome(**options) -> tuple[Outcome, Any]:
        with symplectic_plugin.profile() as solves:
            result = Outcome(field, y0, t, method=f"{FLAG}:{method}", options=size | options, rtol=1e-2, atol=1e-2)
        return result, solves[0]

    expected, steps = outcome(checkpoint="steps")
    _, stages = outcome(checkpoint="stages")
    # The field at the stages, the Newton iteration left out.
    assert stages.recomputed < steps.recomputed / 2
    assert stages.checkpoint_bytes > steps.checkpoint_bytes
    least = least_budget(lambda budget: outcome(checkpoint="binomial", memory_budget=budget))
    for options in (
        {"checkpoint": "stages"},
        {"checkpoint": "binomial", "memory_budget": least + 1000},
        {"checkpoint": "auto", "memory_budget": least},
        {"checkpoint": "auto", "memory_budget": least + 10_000},
        {"checkpoint": "auto", "offload": str(tmp_path)},
    ):
        actual, report = outcome(**options)
        found = errors(actual, expected)
        assert max(found.values()) <= 1e-11, (options, found)
        assert report.graph_bytes == 0
        assert report.checkpoint_bytes <= report.budget_bytes


@pytest.mark.parametrize("method", ["sdirk2", "radauIIA3"])
def test_complex_states_are_pairs_of_real_ones(method) -> None:
    z0 = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(4))
    w = torch.randn(3, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(5)).requires_grad_()
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    solve = {"others": (w,), "options": {"step_size": 0.1}}

    def field(t, z):
        return torch.tanh(w @ z.conj()) * torch.exp(1j * t) - 10 * z

    class Real(nn.Module):
        def forward(self, t, x):
            return torch.view_as_real(field(t, torch.view_as_complex(x.view(3, 2)))).flatten()

    def odeint(real, z0, t, **keywords):
        x = torchdiffeq.odeint(real, torch.view_as_real(z0).flatten(), t, **keywords)
        return torch.view_as_complex(x.view(-1, 3, 2))

    expected = Outcome(Real(), z0, t, method=f"reference_{method}", odeint=odeint, **solve)
    actual = Outcome(field, z0, t, method=f"{FLAG}:{method}", **solve)
    assert_exact(actual, expected, **AS_EXACT)


@pytest.mark.parametrize("method", ["implicit_euler", "gl4", "kencarp5"])
def test_single_precision(method) -> None:
    field, y0 = StiffField(3, 6), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    options = {"step_size": 0.1} if method in IMPLICIT_FIXED else {"first_step": 0.05, "max_step": 0.05}
    solve = {"method": f"{FLAG}:{method}", "options": options, "rtol": 1e-2, "atol": 1e-2}
    expected = Outcome(field, y0, t, **solve)
    found = errors(Outcome(field.float(), y0.float(), t.float(), **solve), expected)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("method", ["trbdf2", "kencarp3"])
def test_odeint_adjoint_gives_the_same_by_either_flag(method) -> None:
    field, y0, t = (
        StiffField(2, 7),
        torch.randn(3, 2, dtype=torch.float64),
        torch.linspace(0, 1, 3, dtype=torch.float64),
    )
    options = {"step_size": 0.2} if method in IMPLICIT_FIXED else {"first_step": 0.1}
    tolerance = {"rtol": 1e-2, "atol": 1e-2}
    expected = Outcome(field, y0, t, method=f"reference_{method}", options=options, **tolerance)
    for flags in (
        {"method": FLAG, "options": {**options, "solver": method}},
        {"method": method, "adjoint_method": FLAG, "options": options, "adjoint_options": {}},
    ):
        assert_exact(
            Outcome(field, y0, t, odeint=torchdiffeq.odeint_adjoint, **flags, **tolerance), expected, **AS_EXACT
        )


METHODS_OF_EACH_KIND = ["sdirk2", "gl4", "kencarp3", "kencarp3_imex"]


def solve(field, method: str, **options) -> Tensor:
    y0 = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    options = given_steps(method) | options
    t = torch.tensor([0.0, 1.0])
    return torchdiffeq.odeint(field, y0, t, rtol=1e-3, atol=1e-3, method=f"{FLAG}:{method}", options=options)


class TestRefused:
    @pytest.mark.parametrize("method", ["sdirk2", "gl4", "kencarp3", "kencarp3_imex"])
    def test_a_loose_newton_iteration(self, method) -> None:
        with pytest.raises(ValueError, match="newton_tol"):
            solve(StiffField(2, 0), method, newton_tol=0.01)
        with torch.no_grad():
            solve(StiffField(2, 0), method, newton_tol=0.01)

    @pytest.mark.parametrize("method", ["sdirk2", "gl4"])
    def test_steps_without_a_solution(self, method) -> None:
        with pytest.raises(RuntimeError, match="did not solve the step"):
            solve(lambda t, x: 1 + 100 * x**2, method)

    def test_a_singular_matrix(self) -> None:
        # The stage's equation X = 1 + h 8 X has no solution.
        with pytest.raises(RuntimeError, match="singular"):
            solve(lambda t, x: 8 * x, "implicit_euler", step_size=0.125)

    def test_events_of_an_additive_method(self) -> None:
        y0, t0 = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.tensor(0.0, dtype=torch.float64)
        with pytest.raises(ValueError, match="there are no events"):
            torchdiffeq.odeint_event(
                StiffField(2, 0), y0, t0, event_fn=lambda t, y: y[0], method=f"{FLAG}:kencarp3_imex"
            )
