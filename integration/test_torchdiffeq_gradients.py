"""Every gradient is full backpropagation's, through torchdiffeq's odeint, with the same steps."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st

from symplectic_plugin.record.store import POLICIES

from .exactness import EXACT, Outcome, assert_exact, errors
from .fields import MLP, output_times, problems
from .hosts import ADAPTIVE, EXPLICIT, FIXED, REGISTRY, complex_states, given_steps


@pytest.mark.parametrize("method", ADAPTIVE)
@settings(max_examples=25)
@given(problems(), st.floats(2, 10), st.data())
def test_adaptive_methods(method, problem, digits, data) -> None:
    field, y0, generator = problem
    tolerance = 10.0**-digits
    # So long that a method of this order takes at most some hundred steps.
    order = REGISTRY[method].order
    duration = min(1.0, 40 * tolerance ** (1 / order))
    t = data.draw(output_times(duration))
    options = {"first_step": data.draw(st.floats(0.01, 0.3)) * duration}
    if data.draw(st.booleans()):
        cuts = t.min() + duration * torch.rand(3, generator=generator, dtype=torch.float64)
        options |= {"jump_t": cuts[:2], "step_t": cuts[2:]}
    if data.draw(st.booleans()):
        options |= {"max_step": duration / 5}
    policy = {"checkpoint": data.draw(st.sampled_from(POLICIES))}
    solve = {"rtol": tolerance, "atol": tolerance, "of_times": data.draw(st.booleans())}
    expected = Outcome(field, y0, t, method=method, options=options, **solve)
    actual = Outcome(field, y0, t, method=f"symplectic_adjoint:{method}", options=options | policy, **solve)
    # The reference itself is no better in t: it differentiates an interpolant whose coefficients are differences of
    # states, rounded, over a step that is small beside them.
    assert_exact(actual, expected, of_times=max(EXACT, 1e-13 / duration / tolerance ** (1 / order)))


@pytest.mark.parametrize("method", FIXED)
@settings(max_examples=25)
@given(problems(), st.data())
def test_fixed_grid_methods(method, problem, data) -> None:
    field, y0, _ = problem
    t = data.draw(output_times(1.0))
    options: dict[str, object] = {
        "interp": data.draw(st.sampled_from(["linear", "cubic"])),
        "perturb": data.draw(st.booleans()),
    }
    grid = data.draw(st.sampled_from(["t", "step_size", "grid_constructor"]))
    if grid == "step_size":
        options["step_size"] = data.draw(st.floats(0.03, 0.5))
    elif grid == "grid_constructor":

        def grid_constructor(func, y0, t):
            inner = torch.linspace(0, 1, 6, dtype=t.dtype)[1:-1] ** 2
            return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * inner, t[-1:]]) if len(t) > 1 else t

        options["grid_constructor"] = grid_constructor
    solve = {"of_times": data.draw(st.booleans())}
    expected = Outcome(field, y0, t, method=method, options=options, **solve)
    options["checkpoint"] = data.draw(st.sampled_from(POLICIES))
    assert_exact(Outcome(field, y0, t, method=f"symplectic_adjoint:{method}", options=options, **solve), expected)


@pytest.mark.parametrize("method", EXPLICIT)
def test_odeint_adjoint_gives_the_same_by_either_flag(method) -> None:
    generator = torch.Generator().manual_seed(0)
    field = MLP(3, 8, generator)
    y0 = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    options = given_steps(method)
    solve = {"rtol": 1e-3, "atol": 1e-3}
    expected = Outcome(field, y0, t, method=method, options=options, **solve)
    for flags in (
        {"method": f"symplectic_adjoint:{method}", "options": options},
        {"method": "symplectic_adjoint", "options": {**options, "solver": method}},
        {"method": method, "adjoint_method": "symplectic_adjoint", "options": options, "adjoint_options": {}},
        {"method": method, "adjoint_method": f"symplectic_adjoint:{method}", "options": options, "adjoint_options": {}},
    ):
        assert_exact(Outcome(field, y0, t, odeint=torchdiffeq.odeint_adjoint, **flags, **solve), expected)


def test_it_is_exact_at_a_loose_tolerance_where_the_continuous_adjoint_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    field = MLP(3, 16, generator)
    y0 = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 3.0], dtype=torch.float64)
    solve = {"rtol": 1e-2, "atol": 1e-2, "options": {"first_step": 0.1}}
    expected = Outcome(field, y0, t, method="dopri5", **solve)
    exact = errors(Outcome(field, y0, t, method="symplectic_adjoint", **solve), expected)
    continuous = errors(Outcome(field, y0, t, odeint=torchdiffeq.odeint_adjoint, method="dopri5", **solve), expected)
    assert max(exact.values()) <= EXACT
    assert max(continuous.values()) >= 1e-3  # measured: 0.02


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("policy", ["auto", "steps"])
def test_single_precision_is_exact_to_its_rounding(method, policy) -> None:
    generator = torch.Generator().manual_seed(0)
    field = MLP(3, 8, generator, dtype=torch.float32)
    y0 = torch.randn(4, 3, generator=generator)
    t = torch.linspace(0, 1, 5)
    options = given_steps(method)
    solve = {"rtol": 1e-3, "atol": 1e-3, "options": options}
    expected = Outcome(field, y0, t, method=method, **solve)
    solve["options"] = options | {"checkpoint": policy}
    actual = Outcome(field, y0, t, method=f"symplectic_adjoint:{method}", **solve)
    if method in ADAPTIVE:  # what steps are accepted hangs on the last bit
        assert torch.equal(actual.values, expected.values)
    assert torch.allclose(actual.values, expected.values, rtol=1e-6, atol=1e-6)
    found = errors(actual, expected)
    # The reference differentiates an interpolant whose coefficients are rounded differences of states.
    assert found.pop("t") <= 1e-4
    assert max(found.values()) <= 3e-6


@complex_states
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("of_times", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_complex_state(method, of_times) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 3, generator=generator, dtype=torch.complex128).requires_grad_()
    y0 = torch.randn(3, generator=generator, dtype=torch.complex128)
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    options = given_steps(method)

    def field(t, y):
        assert not t.is_complex()  # adaptive solvers keep it as a complex number
        return torch.tanh(w @ y) * torch.exp(1j * t)

    def real(t, y):
        return torch.sin(w @ y).real

    for f in (field,) if method in ADAPTIVE else (field, real):  # torchdiffeq's adaptive methods have no gradient then
        expected = Outcome(f, y0, t, method=method, options=options, others=(w,), of_times=of_times)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = Outcome(
                f, y0, t, method=f"symplectic_adjoint:{method}", options=options, others=(w,), of_times=of_times
            )
        assert_exact(actual, expected)
