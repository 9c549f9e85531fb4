"""Gradients of implicit methods through torchdiffeq's odeint are the discrete solution's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import symplectic_plugin
from benchmarks.stiff import TIMES, Learned
from symplectic_plugin.hosts.torchdiffeq.methods import solvers
from symplectic_plugin.methods.implicit_tableaux import METHODS
from symplectic_plugin.record.checkpoints import POLICIES

from .fields import Outcome, errors, output_times
from .implicit_reference import references

FLAG = "symplectic_adjoint"
FIXED = [name for name, method in METHODS.items() if method.embedded is None]
ADAPTIVE = [name for name in METHODS if name not in FIXED]
IMEX = [name for name in ADAPTIVE if name.endswith("_imex")]
EXACT = 1e-10


@pytest.fixture(autouse=True, scope="module")
def _references():
    with pytest.MonkeyPatch.context() as patch:
        for name, solver in references().items():
            patch.setitem(solvers(), f"reference_{name}", solver)
        yield


class Field(nn.Module):
    """A stiff linear part with rates up to `stiffness`, and a nonlinear one; both depend on time.

    It decays in the direction of time that `t`, if given, goes in.
    """

    def __init__(self, size: int, seed: int, stiffness: float = 100.0, t: Tensor | None = None) -> None:
        super().__init__()
        sign = -1 if t is not None and t[-1] < t[0] else 1
        random = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))

        rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
        rates = -(stiffness ** torch.linspace(0, 1, size, dtype=torch.float64))
        self.linear = nn.Parameter(sign * rotation * rates @ rotation.T)
        self.w1, self.wt, self.w2 = parameter(4, size), parameter(4), parameter(size, 4)
        self.w2.data *= 0.3

    def stiff(self, t: Tensor, x: Tensor) -> Tensor:
        return (x - torch.cos(3 * t)) @ self.linear.T + 0.1 * torch.sin(x) * t

    def nonstiff(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w1.T + t * self.wt) @ self.w2.T

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.stiff(t, x) + self.nonstiff(t, x)


class Pair(nn.Module):
    """The same for two states of different shapes, each of which acts on the other."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def stiff(self, t, xs):
        return self.field.stiff(t, xs[0]), -5 * xs[1] * self.field.wt[0]

    def nonstiff(self, t, xs):
        return self.field.nonstiff(t, xs[0] * xs[1].mean()), torch.sin(xs[0].sum() + xs[1])

    def forward(self, t, xs):
        return tuple(a + b for a, b in zip(self.stiff(t, xs), self.nonstiff(t, xs), strict=True))


def assert_exact(actual: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(actual.values, expected.values, rtol=1e-11, atol=1e-11)
    found = errors(actual, expected)
    assert max(found.values()) <= EXACT, found


problems = st.tuples(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([(), (2,)]), st.floats(1, 300))


def make(problem, t: Tensor) -> tuple[Field, Tensor]:
    seed, size, batch, stiffness = problem
    y0 = torch.randn(*batch, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Field(size, seed, stiffness, t), y0


@pytest.mark.parametrize("method", FIXED)
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
    assert_exact(Outcome(field, y0, t, method=f"{FLAG}:{method}", options=options), expected)


@pytest.mark.parametrize("method", ADAPTIVE)
@settings(max_examples=3)
@given(problems, st.data())
def test_adaptive_steps(method, problem, data) -> None:
    t = data.draw(output_times(0.7))
    field, y0 = make(problem, t)
    options = {"first_step": data.draw(st.floats(0.01, 0.3))}
    if data.draw(st.booleans()):
        options["jump_t"] = t.min() + 0.7 * torch.tensor([0.313, 0.612], dtype=torch.float64)
    if data.draw(st.booleans()) and method not in IMEX:
        options["step_t"] = t.min() + 0.7 * torch.tensor([0.441], dtype=torch.float64)
    solve = {"rtol": 1e-3, "atol": 1e-3}
    expected = Outcome(field, y0, t, method=f"reference_{method}", options=options, **solve)
    options["checkpoint"] = data.draw(st.sampled_from(POLICIES))
    options["linear_solver"] = data.draw(st.sampled_from(["dense", "gmres"]))
    assert_exact(Outcome(field, y0, t, method=f"{FLAG}:{method}", options=options, **solve), expected)


def test_robertsons_kinetics() -> None:
    """Rates that differ by nine orders of magnitude."""
    t, problem = TIMES[:25], Learned()  # to t = 5.6
    y0, scale = problem.y0, torch.tensor([1.0, 3e-5, 1.0], dtype=torch.float64)

    def odeint(field, y0, t, **keywords):
        return torchdiffeq.odeint(field, y0, t, **keywords) / scale

    solve = {"rtol": 1e-3, "atol": 1e-9, "options": {"first_step": 1e-6}, "odeint": odeint}
    expected = Outcome(problem, y0, t, method="reference_kencarp3", **solve)
    assert_exact(Outcome(problem, y0, t, method=f"{FLAG}:kencarp3", **solve), expected)


@pytest.mark.parametrize("method", ["implicit_midpoint", "trbdf2", "gl4", "kencarp3", "kencarp5_imex"])
def test_tuples_of_states(method) -> None:
    field, y0, t = Pair(Field(3, 0)), torch.randn(7, dtype=torch.float64), torch.linspace(0, 0.5, 4)
    options = {"step_size": 0.11} if method in FIXED else {"first_step": 0.1}

    def odeint(field, y0, t, **keywords):
        states = torchdiffeq.odeint(field, (y0[:6].view(2, 3), y0[6]), t, **keywords)
        return torch.cat([states[0].flatten(1), states[1][:, None]], 1)

    solve = {"rtol": 1e-3, "atol": 1e-3, "options": options, "odeint": odeint}
    expected = Outcome(field, y0, t.double(), method=f"reference_{method}", **solve)
    assert_exact(Outcome(field, y0, t.double(), method=f"{FLAG}:{method}", **solve), expected)


@pytest.mark.parametrize("method", ["trapezoid", "sdirk2", "gl4", "kencarp3", "kencarp5"])
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_events(method, interp) -> None:
    field, y0 = Field(2, 1, 20.0), torch.tensor([1.0, 0.5], dtype=torch.float64)
    options = {"step_size": 0.11, "interp": interp} if method in FIXED else {"first_step": 0.1}
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


@pytest.mark.parametrize("method", METHODS)
def test_the_product_of_adjoint_and_variation_is_conserved(method) -> None:
    """The variation is a part of the state of a solve of its own, by the same steps."""
    field = Field(2, 2, 50.0)
    y0, delta, adjoint = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    steps = {"step_size": 0.2} if method in FIXED else {"first_step": 0.2, "max_step": 0.2}
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
    class Scaling(Field):
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
    field, y0 = Field(3, 3), torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    size = {"step_size": 0.1} if method in FIXED else {"first_step": 0.1, "max_step": 0.1}

    def outcome(**options) -> tuple[Outcome, symplectic_plugin.field.report.SolveReport]:
        with symplectic_plugin.profile() as solves:
            result = Outcome(field, y0, t, method=f"{FLAG}:{method}", options=size | options, rtol=1e-2, atol=1e-2)
        return result, solves[0]

    expected, steps = outcome(checkpoint="steps")
    _, stages = outcome(checkpoint="stages")
    # The field at the stages, the Newton iteration left out.
    assert stages.recomputed < steps.recomputed / 2
    assert stages.checkpoint_bytes > steps.checkpoint_bytes
    with pytest.raises(ValueError, match="needs at least") as error:
        outcome(checkpoint="binomial", memory_budget=1)
    least = int(str(error.value).split("needs at least ")[1].split()[0])
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
    assert_exact(actual, expected)


@pytest.mark.parametrize("method", ["implicit_euler", "gl4", "kencarp5"])
def test_single_precision(method) -> None:
    field, y0 = Field(3, 6), torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    options = {"step_size": 0.1} if method in FIXED else {"first_step": 0.05, "max_step": 0.05}
    solve = {"method": f"{FLAG}:{method}", "options": options, "rtol": 1e-2, "atol": 1e-2}
    expected = Outcome(field, y0, t, **solve)
    found = errors(Outcome(field.float(), y0.float(), t.float(), **solve), expected)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("method", ["trbdf2", "kencarp3"])
def test_odeint_adjoint_gives_the_same_by_either_flag(method) -> None:
    field, y0, t = Field(2, 7), torch.randn(3, 2, dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64)
    options = {"step_size": 0.2} if method in FIXED else {"first_step": 0.1}
    tolerance = {"rtol": 1e-2, "atol": 1e-2}
    expected = Outcome(field, y0, t, method=f"reference_{method}", options=options, **tolerance)
    for flags in (
        {"method": FLAG, "options": {**options, "solver": method}},
        {"method": method, "adjoint_method": FLAG, "options": options, "adjoint_options": {}},
    ):
        assert_exact(Outcome(field, y0, t, odeint=torchdiffeq.odeint_adjoint, **flags, **tolerance), expected)


def solve(field, method: str, y0: Tensor | None = None, **options) -> Tensor:
    y0 = torch.ones(2, 2, dtype=torch.float64, requires_grad=True) if y0 is None else y0
    options = ({"step_size": 0.1} if method in FIXED else {"first_step": 0.1}) | options
    t = torch.tensor([0.0, 1.0])
    return torchdiffeq.odeint(field, y0, t, rtol=1e-3, atol=1e-3, method=f"{FLAG}:{method}", options=options)


METHODS_OF_EACH_KIND = ["sdirk2", "gl4", "kencarp3", "kencarp3_imex"]


class TestRefused:
    @pytest.mark.parametrize("method", METHODS_OF_EACH_KIND)
    def test_second_derivatives(self, method) -> None:
        y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(solve(Field(2, 0), method, y0)[-1].sum(), y0, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            first.sum().backward()

    @pytest.mark.parametrize("method", METHODS_OF_EACH_KIND)
    def test_a_loose_newton_iteration(self, method) -> None:
        with pytest.raises(ValueError, match="newton_tol"):
            solve(Field(2, 0), method, newton_tol=0.01)
        with torch.no_grad():
            solve(Field(2, 0), method, newton_tol=0.01)

    @pytest.mark.parametrize("method", METHODS_OF_EACH_KIND)
    def test_random_numbers(self, method) -> None:
        field = Field(2, 0)
        field.register_forward_hook(lambda _, args, slope: torch.dropout(slope, 0.5, True))
        with pytest.raises(ValueError, match="draws random numbers"):
            solve(field, method)

    def test_autocast(self) -> None:
        field = Field(2, 0).float()
        with torch.autocast("cpu"), pytest.raises(ValueError, match="leave autocast off"):
            solve(lambda t, x: field.linear @ x, "sdirk2", torch.ones(2, 2, requires_grad=True))

    @pytest.mark.parametrize("method", ["sdirk2", "gl4", "kencarp3"])
    def test_a_field_that_detaches_its_state(self, method) -> None:
        with pytest.raises(RuntimeError, match="detaches"):
            solve(lambda t, x: -3 * x.detach(), method)

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
            torchdiffeq.odeint_event(Field(2, 0), y0, t0, event_fn=lambda t, y: y[0], method=f"{FLAG}:kencarp3_imex")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
    def test_half_precision_and_integers(self, dtype) -> None:
        for method in ("gl4", f"{FLAG}:gl4"):
            with pytest.raises(ValueError, match="single or double precision"):
                torchdiffeq.odeint(lambda t, x: -x, torch.ones(2, dtype=dtype), torch.tensor([0.0, 1.0]), method=method)

    @pytest.mark.parametrize("method", METHODS_OF_EACH_KIND)
    @pytest.mark.parametrize("policy", ["steps", "stages"])
    def test_another_field_in_the_backward_pass(self, method, policy) -> None:
        factor = np.ones(())

        class Changing(Field):
            def nonstiff(self, t, x):
                return float(factor) * super().nonstiff(t, x)

        y = solve(Changing(2, 0), method, checkpoint=policy)
        factor += 1
        with pytest.raises(RuntimeError, match="returned other values in the backward pass"):
            y[-1].sum().backward()


@pytest.mark.parametrize("method", METHODS_OF_EACH_KIND)
@pytest.mark.parametrize("policy", POLICIES)
def test_backward_twice(method, policy) -> None:
    field = Field(2, 0)
    y = solve(field, method, checkpoint=policy)
    first, second = (torch.autograd.grad(y[-1].sum(), field.w1, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-13, atol=0)


def test_methods_that_torchdiffeq_has_are_left_to_it() -> None:
    flag = solvers()[FLAG]
    theirs = type("Gl4", (), {})
    variants = flag.variants(FLAG, {"gl4": theirs})
    assert "gl4" not in variants
    assert {"radauIIA5", "kencarp3", f"{FLAG}:radauIIA5"} <= variants.keys()
