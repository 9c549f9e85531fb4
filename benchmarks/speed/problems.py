"""The vector fields and solvers that everything is compared on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.experiments.measure import VectorField
from benchmarks.experiments.methods import Solver

DTYPE = torch.float64
STEPS = 20
TOLERANCE = 1e-5
FIRST_STEP = 0.05
SOLVERS = {
    "rk4": Solver("rk4", options={"step_size": 1 / STEPS}),
    # The first step is given: if it is not, torchdiffeq's backpropagation differentiates the choice of it too.
    "dopri5": Solver("dopri5", TOLERANCE, TOLERANCE, {"first_step": FIRST_STEP}),
}


class Field(VectorField):
    """y -> 2 MLP(y), with tanh between the layers."""

    def __init__(self, state: int, hidden: int, layers: int) -> None:
        super().__init__()
        sizes = [state, *[hidden] * layers]
        inner = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*inner, nn.Linear(hidden, state))

    def forward(self, t: Tensor, y: Tensor, args: object = None) -> Tensor:
        """torchdyn gives the last argument."""
        return 2 * self.net(y)


@dataclass(frozen=True)
class Problem:
    """Batch and state size; width and number of the field's hidden layers. The time goes from 0 to 1."""

    batch: int
    state: int
    hidden: int
    layers: int

    def build(self, device: torch.device) -> tuple[Field, Tensor]:
        """The vector field and the initial state; the same ones every time."""
        torch.manual_seed(0)
        field = Field(self.state, self.hidden, self.layers).to(device, DTYPE)
        return field, torch.randn(self.batch, self.state, dtype=DTYPE).to(device).requires_grad_()

    def __str__(self) -> str:
        plural = "s" if self.layers > 1 else ""
        return f"state {self.batch}x{self.state}, {self.layers} hidden layer{plural} of {self.hidden}"


PROBLEMS = {
    "tiny": Problem(4, 2, 8, 1),  # for tests
    "small": Problem(128, 2, 64, 2),
    "medium": Problem(256, 32, 256, 3),
    "large": Problem(1024, 64, 512, 3),
}


def loss(end: Tensor) -> Tensor:
    return end.square().sum()
