"""The rows of every table: the ways to get a gradient through a solve, each for the same solver.

`Solver(...).solve(row)` is a function of a vector field, a state and times that any model here can be given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from benchmarks.experiments.checkpointing import (
    State,
    controls_its_step,
    odeint_checkpoint_per_component,
    odeint_checkpoint_per_step,
)

Solve = Callable[[nn.Module, State, Tensor], State]


def odeint_symplectic_adjoint(
    f: nn.Module, y0: State, t: Tensor, *, method: str, options: dict, checkpoint: str, **given: Any
) -> State:
    """torchdiffeq's own odeint with the plugin's flag."""
    return torchdiffeq.odeint(
        f, y0, t, method=f"symplectic_adjoint:{method}", options={**options, "checkpoint": checkpoint}, **given
    )


BACKPROPAGATION = "backpropagation"
CONTINUOUS = "continuous adjoint"
PER_COMPONENT = "checkpoint per component"
PER_STEP = "checkpoint per step (ACA)"
SYMPLECTIC = "symplectic adjoint"
STAGES_KEPT = "symplectic adjoint, stages kept"
DEFAULT = "symplectic adjoint, default"

METHODS: dict[str, Callable[..., State]] = {
    CONTINUOUS: torchdiffeq.odeint_adjoint,
    BACKPROPAGATION: torchdiffeq.odeint,
    PER_COMPONENT: odeint_checkpoint_per_component,
    PER_STEP: odeint_checkpoint_per_step,
    # The scheme of Matsubara et al., whatever memory there is; PNODE's, which keeps what the stages are too; and what
    # the flag alone does, which keeps graphs as far as 32 MiB go.
    SYMPLECTIC: functools.partial(odeint_symplectic_adjoint, checkpoint="steps"),
    STAGES_KEPT: functools.partial(odeint_symplectic_adjoint, checkpoint="stages"),
    DEFAULT: functools.partial(odeint_symplectic_adjoint, checkpoint="auto"),
}
EXACT = [row for row in METHODS if row != CONTINUOUS]
COMPETITORS = [PER_COMPONENT, PER_STEP]

# What the paper gives for its rows (Matsubara et al. 2021, Table 1): evaluations of one layer, with a backward pass
# through it counted as one, for N steps (Ñ in the backward direction) of s stages, L layers and M components; and the
# memory.
PAPERS_COST = {
    CONTINUOUS: "(N + 2Ñ) s L M",
    BACKPROPAGATION: "2 N s L M",
    PER_COMPONENT: "3 N s L M",
    PER_STEP: "3 N s L M",
    SYMPLECTIC: "4 N s L M",
}
PAPERS_MEMORY = {
    CONTINUOUS: "M + L",
    BACKPROPAGATION: "N s L M",
    PER_COMPONENT: "M + N s L",
    PER_STEP: "M N + s L",
    SYMPLECTIC: "M N + s + L",
}


@dataclass(frozen=True)
class Solver:
    """A method of torchdiffeq's and its settings; the same for every row, so that their steps are the same."""

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-8
    options: dict[str, Any] = field(default_factory=dict)

    def solve(self, row: str) -> Solve:
        def solve(f: nn.Module, y0: State, t: Tensor) -> State:
            return METHODS[row](
                f, y0, t, method=self.method, rtol=self.rtol, atol=self.atol, options=dict(self.options)
            )

        return solve


def adaptive(method: str, rtol: float, atol: float, first_step: float = 0.05) -> Solver:
    """A solver with step control.

    The first step is given: if it is not, torchdiffeq's backpropagation differentiates the choice of it too.
    """
    return Solver(method, rtol, atol, {"first_step": first_step})


def fixed(method: str, steps: int) -> Solver:
    """A solver that takes equal steps from time 0 to 1; also with a method that would control its steps."""
    if controls_its_step(method):
        if steps & (steps - 1):
            raise ValueError("a method with step control takes equal steps exactly for powers of two only")
        size = 1 / steps
        return Solver(method, options={"first_step": size, "min_step": size, "max_step": size})

    def grid(_f: nn.Module, _y: State, t: Tensor) -> Tensor:
        return torch.linspace(float(t[0]), float(t[-1]), steps + 1, dtype=t.dtype, device=t.device)

    return Solver(method, options={"grid_constructor": grid})
