"""The cotangents of a solve's times: of its steps' starts and sizes, and of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeCotangents:
    """Cotangents of a solve's times.

    Args:
        starts: of each step's start t_n, its size held, shape (N,).
        sizes: of each step's size h, its start held, shape (N,).
        outputs: of the time of each output but the first, shape (M,).
    """

    starts: Tensor
    sizes: Tensor
    outputs: Tensor


class StepTimes:
    """The cotangents of one step's times, in the making.

    With tau_i the cotangent of stage i's time: that of the start is sum_i tau_i and that of the size
    sum_i <k_i, rate_i> + sum_i c_i tau_i, with rate_i = kappa_i / h less what comes from outside the step. An output at
    theta in the step has the cotangent <g, dx/dtheta> / h, and takes it, and theta times it, from the two.
    """

    def __init__(self, given: Tensor, theta: Tensor, derivatives: Tensor, begin: int, end: int) -> None:
        self.given = given
        self.theta = theta[begin:end].tolist()
        self.derivatives = derivatives[begin:end].tolist()
        self.start = self.size = zero(given)
        self.outputs = [self.start] * len(self.theta)

    def needs_slope(self, i: int) -> bool:
        """Whether slope i matters to the outputs' times, if to nothing else."""
        return any(row[i] != 0 for row in self.derivatives)

    def add_slope(self, i: int, slope: Tensor, rate: Tensor | None) -> None:
        """Add what acts through slope i, whose cotangent, without phi, is rate times the step's size."""
        if rate is not None:
            self.size = self.size + inner(rate, slope)
        for m, (theta, row) in enumerate(zip(self.theta, self.derivatives, strict=True)):
            if row[i] != 0:
                moved = row[i] * inner(self.given[m], slope)
                self.outputs[m] = self.outputs[m] + moved
                self.start = self.start - moved
                self.size = self.size - theta * moved

    def add_stage_time(self, c: float, tau: Tensor | None) -> None:
        """Add the cotangent of the time of a stage at c."""
        if tau is not None:
            self.start = self.start + tau
            self.size = self.size + c * tau


def gathered(times: list[StepTimes], like: Tensor) -> TimeCotangents:
    empty = zero(like).new_zeros(0)
    outputs = [output for step in times for output in step.outputs]
    return TimeCotangents(
        torch.stack([step.start for step in times]) if times else empty,
        torch.stack([step.size for step in times]) if times else empty,
        torch.stack(outputs) if outputs else empty,
    )


def zero(like: Tensor) -> Tensor:
    """A real zero in a state's precision."""
    return torch.zeros((), dtype=torch.empty(0, dtype=like.dtype).abs().dtype, device=like.device)


def inner(cotangent: Tensor, vector: Tensor) -> Tensor:
    """The change of the loss per unit of the vector: autograd's gradient of a complex tensor is the conjugate one."""
    cotangent, vector = cotangent.flatten(), vector.flatten().to(cotangent.dtype)
    return torch.vdot(cotangent, vector).real if cotangent.is_complex() else torch.dot(cotangent, vector)
