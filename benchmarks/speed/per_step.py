"""Does a step cost the same however many there are, and however many outputs? rk4, with a tiny field."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from benchmarks.speed.passes import Timing, TorchPass
from benchmarks.speed.problems import DTYPE, Field

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "torchdiffeq, backpropagation": ("rk4", {}),
    "ours, default": ("symplectic_adjoint:rk4", {}),
    'ours, "steps"': ("symplectic_adjoint:rk4", {"checkpoint": "steps"}),
}
STEPS = (100, 1000, 10_000)
OUTPUTS = (10, 100, 1000)
STEPS_BESIDE_OUTPUTS = 1000


def cells(*, quick: bool = False) -> list[tuple[str, int, int]]:
    """Of each: the policy, the number of steps, that of output times."""
    sizes = [(steps, 1) for steps in (STEPS[:2] if quick else STEPS)]
    sizes += [] if quick else [(STEPS_BESIDE_OUTPUTS, outputs) for outputs in OUTPUTS]
    return [(policy, *size) for size in sizes for policy in POLICIES]


def per_step(policy: str, steps: int, outputs: int, device: str = "cpu", repetitions: int = 5) -> dict[str, Any]:
    """Seconds a step of the forward and the backward pass, and how many times those of the shortest solve, which is
    taken before and after each of the others; fewer repetitions the more steps there are."""
    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    row, shortest = _pass(policy, steps, outputs, where), _pass(policy, STEPS[0], 1, where)
    shortest.run()
    counted = row.run(count=True).evaluations  # which warms up, too
    assert counted is not None
    timings: list[Timing] = []
    ratios = []
    for _ in range(max(1, min(repetitions, 3000 // steps))):
        before = [shortest.run().total for _ in range(2)]
        timings.append(row.run())
        beside = statistics.median(before + [shortest.run().total for _ in range(2)])
        ratios.append(timings[-1].total / steps / (beside / STEPS[0]))
    return {
        "repetitions": len(timings),
        "seconds_per_step": statistics.median(timing.total for timing in timings) / steps,
        "forward_seconds_per_step": statistics.median(timing.forward for timing in timings) / steps,
        "ratio_to_shortest": statistics.median(ratios),
        "evaluations_per_step": sum(count or 0 for count in counted) / steps,
    }


def _pass(policy: str, steps: int, outputs: int, device: torch.device) -> TorchPass:
    torch.manual_seed(0)
    field = Field(2, 8, 1).to(device, DTYPE)
    y0 = torch.randn(4, 2, dtype=DTYPE).to(device).requires_grad_()
    t = torch.linspace(0, 1, outputs + 1, dtype=DTYPE, device=device)
    method, own = POLICIES[policy]
    options = {"step_size": 1 / steps, **own}

    def solve(y: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, y, t, method=method, options=options)[1:]

    return TorchPass(field, y0, solve)
