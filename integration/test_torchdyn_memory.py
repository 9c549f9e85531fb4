"""Memory of torchdyn's models with each of its sensitivities, exact: counted from the allocator's own events."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.ode import str_to_solver

from benchmarks.peak_memory import peak_bytes

from .hosts import FLAG

BATCH, SIZE, HIDDEN = 256, 8, 256
STATE = BATCH * SIZE * 4
# Of a step's own scalars: its time, size, and what torchdyn computes them from.
SCALARS = 64

# With the states of steps alone: the least memory that does not depend on the number of steps but by a state each.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting tolerances has no effect"),
    pytest.mark.usefixtures("states_alone"),
]


def network(hidden: int) -> nn.Module:
    """Without hidden units, a field whose graph is no larger than a few states."""
    torch.manual_seed(0)
    if not hidden:
        return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())
    return nn.Sequential(
        nn.Linear(SIZE, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, SIZE)
    )


class Measured(NamedTuple):
    peak: int
    steps: int


def measured(sensitivity: str, solver: str, steps: int, hidden: int = HIDDEN) -> Measured:
    """A forward and a backward pass that keep the state at the end only, with about so many steps."""
    taken = 0
    field = network(hidden)
    size = 2 * SIZE if solver == "alf" else SIZE
    x = torch.randn(BATCH, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    instance = str_to_solver(solver)
    # Adaptive solvers are held at their first step size, so that their number of steps is the duration's.
    instance.max_factor = torch.ones(1)
    model = NeuralODE(field, solver=instance, sensitivity=sensitivity, return_t_eval=False)
    if instance.stepping_class == "fixed":
        t_span = torch.linspace(0, 1, steps + 1)
        keywords = {"save_at": t_span[[0, -1]]}
    else:
        t_span, keywords = torch.tensor([0.0, 0.12 * steps]), {}

    def work() -> None:
        model(x, t_span, **keywords)[-1].sum().backward()
        x.grad = None
        field.zero_grad()

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1

    with torch.no_grad(), field.register_forward_hook(count):
        model(x, t_span, **keywords)
    taken = (taken - 2) // 6 if instance.stepping_class == "adaptive" else steps
    work()
    return Measured(peak_bytes(work), taken)


def growth(sensitivity: str, solver: str, fewer: int, more: int) -> float:
    """Bytes a step."""
    low, high = (measured(sensitivity, solver, steps, hidden=0) for steps in (fewer, more))
    assert high.steps > 1.5 * low.steps
    return (high.peak - low.peak) / (high.steps - low.steps)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
def test_growth_per_step_is_the_state_and_no_more(solver) -> None:
    assert growth(FLAG, solver, 10, 30) <= STATE + SCALARS
    assert growth(FLAG, solver, 30, 90) <= STATE + SCALARS


def test_growth_per_step_that_is_recomputed_as_a_whole() -> None:
    assert growth(FLAG, "alf", 10, 30) <= 2 * STATE + SCALARS  # this solver's state is twice as long


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_one_graph_at_a_time_is_alive(solver) -> None:
    field = network(HIDDEN)
    x = torch.randn(BATCH, SIZE).requires_grad_()
    one_evaluation = peak_bytes(lambda: field(x).sum().backward())
    parameters = sum(p.numel() * 4 for p in field.parameters())
    for steps in (4, 12):
        ours, taken = measured(FLAG, solver, steps)
        # Beside one evaluation and its backward pass: checkpoints, stages, sums of the parameters' gradients.
        assert ours <= one_evaluation + (taken + 24) * STATE + 3 * parameters
        # Every activation of every evaluation.
        all_graphs, taken = measured("autograd", solver, steps)
        assert all_graphs >= taken * (6 if solver == "dopri5" else 4) * 0.9 * 2 * BATCH * HIDDEN * 4


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_peak_is_below_that_of_torchdyns_adjoints(solver) -> None:
    ours = measured(FLAG, solver, 10).peak
    assert ours < measured("adjoint", solver, 2).peak
    assert ours < measured("interpolated_adjoint", solver, 2).peak
