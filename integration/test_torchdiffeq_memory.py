"""Memory, exact: counted from the allocator's own events."""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn

from benchmarks.peak_memory import peak_bytes

BATCH, SIZE, HIDDEN = 256, 8, 512


def wide_field() -> nn.Module:
    """A field whose graph outweighs its state: 256 states of size 8, two hidden layers of 512."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(SIZE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, SIZE)
    )

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y)

    return Field()


def peak(method: str, steps: int, odeint=torchdiffeq.odeint, small: bool = False, **options) -> int:
    field = wide_field() if not small else nn.Linear(SIZE, SIZE)
    function = field if not small else lambda t, y: torch.tanh(field(y))
    y0 = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.tensor([0.0, 1.0])
    options |= {"checkpoint": "steps"} if method.startswith("symplectic_adjoint") else {}

    def work() -> None:
        y = odeint(function, y0, t, method=method, options={"step_size": 1 / steps, **options})
        y[-1].sum().backward()
        y0.grad = None
        field.zero_grad()

    work()
    return peak_bytes(work)


STATE = BATCH * SIZE * 4
GRID_POINT = 4
FEW = 1024
"""Bytes of tensors of a few numbers each."""


def test_growth_per_step_is_the_state_and_no_more() -> None:
    peaks = {steps: peak("symplectic_adjoint:rk4", steps, small=True) for steps in (10, 60, 300)}
    # The grid itself is a tensor of torchdiffeq's with one number a step, held four times over at most.
    assert peaks[60] - peaks[10] <= 50 * (STATE + 4 * GRID_POINT) + FEW
    assert peaks[300] - peaks[60] <= 240 * (STATE + 4 * GRID_POINT) + FEW


@pytest.mark.parametrize(
    ("method", "states_a_step"), [("dopri5", 1), ("dopri8", 1), ("bosh3", 1), ("adaptive_heun", 2)]
)
def test_the_slope_is_kept_only_where_it_can_not_be_evaluated_again(method, states_a_step) -> None:
    field = nn.Linear(SIZE, SIZE)
    y0 = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def work(steps: int) -> None:
        size = {"first_step": 1 / steps, "max_step": 1 / steps, "checkpoint": "steps"}
        y = torchdiffeq.odeint(
            lambda t, y: torch.tanh(field(y)), y0, torch.tensor([0.0, 1.0]), method=f"symplectic_adjoint:{method}",
            options=size, rtol=1e6, atol=1e6,
        )  # fmt: skip
        y[-1].sum().backward()

    work(10)
    growth = (peak_bytes(lambda: work(60)) - peak_bytes(lambda: work(20))) / 40
    assert states_a_step - 0.1 <= growth / STATE <= states_a_step + 0.01


def test_one_graph_at_a_time_is_alive() -> None:
    def graph_bytes() -> int:
        field = wide_field()
        y = torch.randn(BATCH, SIZE).requires_grad_()
        return peak_bytes(lambda: field(0, y).sum().backward())

    one_evaluation = graph_bytes()
    for steps in (5, 20):
        ours = peak("symplectic_adjoint:rk4", steps)
        # Beside one evaluation and its backward pass: checkpoints, stages, sums of the parameters' gradients.
        parameters = sum(p.numel() * 4 for p in wide_field().parameters())
        assert ours <= one_evaluation + (steps + 16) * STATE + 2 * parameters
        assert peak("rk4", steps) >= steps * 0.9 * 4 * 2 * BATCH * HIDDEN * 4  # every activation of every evaluation


def test_the_peak_is_below_the_continuous_adjoints() -> None:
    assert peak("symplectic_adjoint:rk4", 10) < peak("rk4", 10, odeint=torchdiffeq.odeint_adjoint)
