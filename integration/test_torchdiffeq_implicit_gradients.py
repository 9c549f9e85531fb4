"""Gradients of implicit methods through torchdiffeq's odeint are the discrete solution's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from symplectic_plugin.checkpoints import POLICIES
from symplectic_plugin.hosts.torchdiffeq.methods import solvers
from symplectic_plugin.implicit.tableaux import METHODS

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
@settings(max_examples=6)
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
@settings(max_examples=6)
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
