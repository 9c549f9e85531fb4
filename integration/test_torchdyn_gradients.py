"""Every gradient is that of torchdyn's sensitivity="autograd" with the same steps, the first one's size a constant."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import MultipleShootingProblem, NeuralODE
from torchdyn.numerics.solvers.hyper import HyperEuler, HyperMidpoint, HyperRungeKutta4
from torchdyn.numerics.solvers.ode import MS_SOLVER_DICT, SOLVER_DICT, ImplicitEuler

from symplectic_plugin.record import defaults
from symplectic_plugin.record.store import POLICIES

from .exactness import EXACT, assert_exact, errors
from .fields import MLP, problems, random
from .hosts import FLAG, KEPT, by_function, by_problem, constant_first_step, outcomes

FIXED = ("euler", "midpoint", "rk4")
ADAPTIVE = ("dopri5", "tsit5")
EXPLICIT = [
    name
    for name, solver in SOLVER_DICT.items()
    if FLAG not in name and solver.__module__.startswith("torchdyn.") and solver is not ImplicitEuler
]
HYPERSOLVERS = (HyperEuler, HyperMidpoint, HyperRungeKutta4)
# With so few snapshots that steps have to be taken again.
WHAT = KEPT | {policy: {"checkpoint": policy, "snapshots": 10} for policy in POLICIES}
whats = st.sampled_from(list(WHAT))
# Fixed-step methods take no tolerances and say so whenever they are given other ones than odeint's defaults.
pytestmark = pytest.mark.filterwarnings("ignore:Setting (tolerances|save_at) has no effect")


@st.composite
def spans(draw: st.DrawFn) -> Tensor:
    """Two to seven times, evenly spaced or not, increasing or decreasing; in 64ths, so that there are no tiny ones."""
    gaps = draw(st.lists(st.integers(4, 40), min_size=1, max_size=6))
    t = torch.tensor([draw(st.integers(-64, 64)), *gaps], dtype=torch.float64).cumsum(0) / 64
    return t if draw(st.booleans()) else t.flip(0)


@pytest.mark.parametrize("solver", FIXED)
@settings(max_examples=30)
@given(problems(), spans(), whats, st.booleans(), st.data())
def test_fixed_step_solvers(solver, problem, t_span, what, of_times, data) -> None:
    field, x, _ = problem
    kept = data.draw(st.sets(st.integers(0, len(t_span) - 1), min_size=1))
    # torchdyn turns reversed time around before it looks for the times to save at.
    turned = t_span if t_span[1] > t_span[0] else -t_span
    keywords = {"solver": solver, "save_at": turned[sorted(kept)] if data.draw(st.booleans()) else ()}
    ours, theirs = (by_problem(way, **keywords) for way in (FLAG, "autograd"))
    with defaults.override(**WHAT[what]):
        assert_exact(*outcomes(field, x, t_span, ours, theirs, of_times=of_times))


@pytest.mark.parametrize("solver", ADAPTIVE)
@settings(max_examples=24)
@given(problems(), spans(), st.floats(2, 5), st.sampled_from([None, "4th"]), whats, st.booleans())
def test_adaptive_solvers(solver, problem, t_span, digits, interpolator, what, of_times) -> None:
    field, x, _ = problem
    calls = itertools.count()
    field.register_forward_pre_hook(lambda *_: reject() if next(calls) > 3_000 else None)
    keywords = {"solver": solver, "atol": 10.0**-digits, "rtol": 10.0**-digits, "interpolator": interpolator}
    # Where rounding keeps its sum of step sizes from an output time, torchdyn takes steps of size zero for ever, or
    # looks for an output time after the last.
    try:
        by_problem("autograd", **keywords)(field, x, t_span)
    except IndexError:
        reject()
    ours, theirs = (by_problem(way, **keywords) for way in (FLAG, "autograd"))
    with defaults.override(**WHAT[what]):
        assert_exact(*outcomes(field, x, t_span, ours, theirs, of_times=of_times))


@pytest.mark.parametrize("solver", HYPERSOLVERS)
@settings(max_examples=20)
@given(problems(), spans(), st.integers(0, 2**31), whats, st.booleans())
def test_hypersolvers_and_their_networks(solver, problem, t_span, seed, what, of_times) -> None:
    field, x, _ = problem
    network = MLP(x.shape[-1], 4, torch.Generator().manual_seed(seed))
    used = tuple(p for name, p in network.named_parameters() if p.requires_grad and name != "unused")
    ours, theirs = (by_problem(way, solver=solver(network, torch.float64)) for way in (FLAG, "autograd"))
    with defaults.override(**WHAT[what]):
        assert_exact(*outcomes(field, x, t_span, ours, theirs, others=used, of_times=of_times))


@settings(max_examples=25)
@given(problems(), spans(), whats, st.booleans())
def test_asynchronous_leapfrog(problem, t_span, what, of_times) -> None:
    field, x, generator = problem
    xv = torch.cat([x, torch.randn(x.shape, generator=generator, dtype=x.dtype)], -1)
    ours, theirs = (by_problem(way, solver="alf") for way in (FLAG, "autograd"))
    with defaults.override(**WHAT[what]):
        assert_exact(*outcomes(field, xv, t_span, ours, theirs, of_times=of_times))


@pytest.mark.parametrize("solver", sorted(EXPLICIT))
def test_every_name_in_the_registry_by_every_flag(solver, kept) -> None:
    generator = torch.Generator().manual_seed(0)
    field, x = MLP(3, 8, generator), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x.cos()], -1) if solver in ("alf", "AsynchronousLeapfrog") else x
    t_span = torch.linspace(0, 1, 5, dtype=torch.float64)
    flags = by_problem(FLAG, solver=solver), by_function(solver=f"{FLAG}:{solver}")
    for flag, reference in zip(flags, (by_problem("autograd", solver=solver), by_function(solver=solver)), strict=True):
        assert_exact(*outcomes(field, x, t_span, flag, reference, of_times=kept == "states"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [*sorted(EXPLICIT), *HYPERSOLVERS])
def test_an_integral_loss_is_taken_by_runge_kutta_methods_alone(solver, dtype) -> None:
    layer, network = nn.Linear(4, 4).to(dtype), nn.Linear(4, 4).to(dtype)
    chosen = solver if isinstance(solver, str) else solver(lambda t, x: network(x), dtype)
    model = NeuralODE(layer, solver=chosen, sensitivity=FLAG, integral_loss=lambda t, x: (x**2).sum(-1))
    x, t_span = random(2, 4).to(dtype), torch.linspace(0, 1, 3, dtype=dtype)
    if SOLVER_DICT.get(solver) in [SOLVER_DICT[name] for name in FIXED + ADAPTIVE]:
        model(x, t_span)[1].sum().backward()
        assert layer.weight.grad.any()
    else:
        with pytest.raises(ValueError, match=r"integral_loss needs a Runge-Kutta method.*autograd"):
            model(x, t_span)


def test_the_flag_alone_is_tsit5() -> None:
    generator = torch.Generator().manual_seed(0)
    field, x = MLP(3, 8, generator), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t_span = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert_exact(*outcomes(field, x, t_span, by_function(solver=FLAG), by_function(solver="tsit5")))


@pytest.mark.parametrize("solver", sorted(name for name in MS_SOLVER_DICT if FLAG not in name))
def test_multiple_shooting(solver, kept) -> None:
    generator = torch.Generator().manual_seed(0)

    class Autonomous(MLP):  # parallel-in-time solvers take f to be one
        def forward(self, t, y):
            return super().forward(torch.zeros(1, dtype=y.dtype), y)

    field, x = Autonomous(3, 8, generator), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t_span = torch.linspace(0, 1, 4, dtype=torch.float64)
    # With more than one iteration the "backward" ones index out of bounds, with any sensitivity.
    keywords = {"problem": MultipleShootingProblem, "maxiter": 2 if "zero" in solver or solver == "parareal" else 0}
    ours, theirs = (by_problem(way, solver=solver, **keywords) for way in (FLAG, "autograd"))
    if "ieuler" in solver or "implicit" in solver:
        with pytest.raises(ValueError, match=r"ParallelImplicitEuler.* no gradient"):
            ours(field, x, t_span)
        return
    assert_exact(*outcomes(field, x, t_span, ours, theirs, of_times=kept == "states"))


def test_it_is_exact_where_torchdyns_adjoints_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    used = MLP(3, 16, generator)
    field = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        field[0].weight.copy_(used.w1)
        field[2].weight.copy_(used.w2)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t_span = torch.tensor([0.0, 3.0], dtype=torch.float64)

    def gradient(sensitivity: str) -> Tensor:
        model = NeuralODE(field, sensitivity=sensitivity, solver="dopri5", atol=1e-2, rtol=1e-2)
        loss = (model(x, t_span)[1][-1] ** 2).sum()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(field.parameters()))])

    with constant_first_step():
        exact = gradient("autograd")
    found = {way: float((gradient(way) - exact).norm() / exact.norm()) for way in (FLAG, "adjoint")}
    assert found[FLAG] <= EXACT
    assert found["adjoint"] >= 1e-5, found


@pytest.mark.parametrize("solver", FIXED + ADAPTIVE)
def test_single_precision_is_exact_to_its_rounding(solver, kept) -> None:
    generator = torch.Generator().manual_seed(0)
    field = MLP(3, 8, generator, dtype=torch.float32)
    x, t_span = torch.randn(4, 3, generator=generator), torch.linspace(0, 1, 5)
    ours, theirs = (by_problem(way, solver=solver) for way in (FLAG, "autograd"))
    actual, expected = outcomes(field, x, t_span, ours, theirs, of_times=kept == "states")
    assert torch.equal(actual.values, expected.values)
    found = errors(actual, expected)
    assert found.pop("t", 0.0) <= 1e-5  # what remains of larger terms that cancel
    assert max(found.values()) <= 3e-6, found
