"""The times of a solve and their cotangents: of its steps' starts and sizes, and of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SolveTimes:
    """The times of a solve, or their cotangents.

    Args:
        starts: starts t_n of the steps (cotangents: the sizes held), shape (N,).
        sizes: sizes h of the steps (cotangents: the starts held), shape (N,).
        outputs: times of the outputs but the first, shape (M,).
    """

    starts: Tensor
    sizes: Tensor
    outputs: Tensor


class StepTimeCotangents:
    """The cotangents of one step's times, in the making.

    With tau_i the cotangent of stage i's time: that of the start is sum_i tau_i and that of the size
    sum_i <k_i, dL/dk_i / h> + sum_i c_i tau_i, without the share of dL/dk_i that comes from outside the step. An output
    at theta in the step has the cotangent <g, dx/dtheta> / h, and takes it, and theta times it, from the two.

    Args:
        outputs: cotangents of the outputs in the step, shape (m, *state).
        thetas: their places, m numbers.
        derivatives: derivatives of the interpolant's weights at the places, shape (m, s).

    Attributes:
        start, size: cotangents of the step's start and size, scalars.
        outputs: cotangents of the outputs' times, m scalars.
    """

    def __init__(self, outputs: Tensor, thetas: Sequence[float], derivatives: Tensor) -> None:
        self._outputs = outputs
        self._thetas = thetas
        self._derivatives = derivatives.tolist()
        self.start = self.size = zero(outputs)
        self.outputs = [self.start] * len(thetas)

    def needs_slope(self, i: int) -> bool:
        """Return whether slope i acts on the outputs' times."""
        return any(row[i] != 0 for row in self._derivatives)

    def add_slope(self, i: int, slope: Tensor, cotangent_over_h: Tensor | None) -> None:
        """Add what acts through slope i.

        Args:
            i: the stage.
            slope: k_i.
            cotangent_over_h: dL/dk_i / h without the share from outside the step, None for zero.
        """
        if cotangent_over_h is not None:
            self.size = self.size + inner(cotangent_over_h, slope)
        for m, (theta, row) in enumerate(zip(self._thetas, self._derivatives, strict=True)):
            if row[i] != 0:
                moved = row[i] * inner(self._outputs[m], slope)
                self.outputs[m] = self.outputs[m] + moved
                self.start = self.start - moved
                self.size = self.size - theta * moved

    def add_size(self, cotangent: Tensor) -> None:
        """Add a cotangent of the step's size."""
        self.size = self.size + cotangent

    def add_stage_time(self, c: float, tau: Tensor | None) -> None:
        """Add the cotangent of the time of a stage at c, None for zero."""
        if tau is not None:
            tau = tau.reshape(())  # torchdyn's times have one element
            self.start = self.start + tau
            self.size = self.size + c * tau


def gathered(steps: Sequence[StepTimeCotangents], like: Tensor) -> SolveTimes:
    """Gather the cotangents of the steps' times, in order, in the precision of a state."""
    empty = zero(like).new_zeros(0)
    outputs = [output for step in steps for output in step.outputs]
    return SolveTimes(
        torch.stack([step.start for step in steps]) if steps else empty,
        torch.stack([step.size for step in steps]) if steps else empty,
        torch.stack(outputs) if outputs else empty,
    )


def zero(like: Tensor) -> Tensor:
    """Return a real zero in a state's precision, on its device."""
    return torch.zeros((), dtype=torch.empty(0, dtype=like.dtype).abs().dtype, device=like.device)


def inner(cotangent: Tensor, vector: Tensor) -> Tensor:
    """Return the change of the loss per unit of the vector: autograd's gradient of a complex tensor is conjugate."""
    cotangent, vector = cotangent.flatten(), vector.flatten().to(cotangent.dtype)
    return torch.vdot(cotangent, vector).real if cotangent.is_complex() else torch.dot(cotangent, vector)
