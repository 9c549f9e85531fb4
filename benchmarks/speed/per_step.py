"""Does a step cost the same however many there are, and however many outputs? rk4, with a tiny field."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torchdiffeq

from benchmarks.speed.passes import TorchPass
from benchmarks.speed.problems import DTYPE, Field

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "torchdiffeq, backpropagation": ("rk4", {}),
    "ours, default": ("symplectic_adjoint:rk4", {}),
    'ours, "steps"': ("symplectic_adjoint:rk4", {"checkpoint": "steps"}),
}
STEPS = (100, 1000, 10_000)
OUTPUTS = (10, 100, 1000)
STEPS_BESIDE_OUTPUTS = 1000


def cells(longest: int) -> list[tuple[str, int, int]]:
    """Of each: the policy, the number of steps, that of output times; none with more than `longest` steps."""
    sizes = [(steps, 1) for steps in STEPS if steps <= longest]
    several = min(STEPS_BESIDE_OUTPUTS, longest)
    sizes += [(several, outputs) for outputs in OUTPUTS if outputs <= several]
    return [(policy, *size) for size in sizes for policy in POLICIES]


def per_step(policy: str, steps: int, outputs: int, device: str = "cpu", repetitions: int = 5) -> dict[str, Any]:
    """Seconds a step of the forward and the backward pass; fewer repetitions the more steps there are."""
    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    field = Field(2, 8, 1).to(where, DTYPE)
    y0 = torch.randn(4, 2, dtype=DTYPE).to(where).requires_grad_()
    t = torch.linspace(0, 1, outputs + 1, dtype=DTYPE, device=where)
    method, own = POLICIES[policy]
    options = {"step_size": 1 / steps, **own}

    def solve(y: torch.Tensor) -> torch.Tensor:
        return torchdiffeq.odeint(field, y, t, method=method, options=options)[1:]

    row = TorchPass(field, y0, solve)
    first = row.run(count=True)
    timings = [row.run() for _ in range(max(1, min(repetitions, 3000 // steps)))]
    assert first.evaluations is not None
    return {
        "repetitions": len(timings),
        "seconds_per_step": statistics.median(timing.total for timing in timings) / steps,
        "forward_seconds_per_step": statistics.median(timing.forward for timing in timings) / steps,
        "evaluations_per_step": sum(count or 0 for count in first.evaluations) / steps,
    }
