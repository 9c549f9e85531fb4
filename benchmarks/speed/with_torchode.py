"""torchode: one backpropagation through its solve, in which every row of the state chooses its own steps."""

from __future__ import annotations

from typing import Any

import torch
import torchode
from torch import Tensor
from torchode.interpolation import LinearInterpolation
from torchode.single_step_methods.runge_kutta import ButcherTableau, ExplicitRungeKutta

from benchmarks.experiments.methods import Solver
from benchmarks.speed.passes import TorchPass
from benchmarks.speed.problems import FIRST_STEP, STEPS, Field


class ThreeEighths(ExplicitRungeKutta):
    """The 3/8 rule, which torchdiffeq calls rk4 and torchode does not have."""

    TABLEAU = ButcherTableau.from_lists(
        c=[0, 1 / 3, 2 / 3, 1],
        a=[[], [1 / 3], [-1 / 3, 1], [1, -1, 1]],
        b=[1 / 8, 3 / 8, 3 / 8, 1 / 8],
        b_err=[0.0] * 4,
    )

    def __init__(self, term: Any) -> None:
        super().__init__(term, self.TABLEAU)

    def convergence_order(self) -> int:
        return 4

    def build_interpolation(self, data: Any) -> LinearInterpolation:
        return LinearInterpolation(data.t0, data.dt, data.y0, data.y1)  # only ever asked for the end of a step


def build(field: Field, y0: Tensor, solver: Solver) -> TorchPass:
    term = torchode.ODETerm(field, with_stats=False)
    controller: Any
    if solver.method == "rk4":
        method, controller, size = ThreeEighths(term), torchode.FixedStepController(), 1 / STEPS
    else:
        method, size = torchode.Dopri5(term), FIRST_STEP
        controller = torchode.IntegralController(solver.atol, solver.rtol, term=term).to(y0)
    adjoint = torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False)
    start, end, first = (torch.full(y0.shape[:1], float(x), dtype=y0.dtype, device=y0.device) for x in (0, 1, size))

    def solve(y: Tensor) -> Tensor:
        problem = torchode.InitialValueProblem(y, start, end, t_eval=None)
        return adjoint.solve(problem, term, dt0=first).ys[:, -1]

    return TorchPass(field, y0, solve)
