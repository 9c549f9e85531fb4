"""The base of a step back, explicit or implicit: arguments, results, the outputs' cotangents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..field.cotangents import CotangentSums
from ..field.vector_field import VectorField
from ..record.method import StageTimeCache
from ..record.trajectory import Trajectory
from .times import StepTimeCotangents, zero


@dataclass(frozen=True)
class Cotangents:
    """The cotangents that a sweep starts from.

    Args:
        outputs: of the outputs, shape (M + 1, *state); None for a trajectory without outputs.
        end: of the state at the end of the last step; None, for zero, with outputs.
        slopes: of slopes of the last step, by stage, in the state's shape; None for zero.
    """

    outputs: Tensor | None = None
    end: Tensor | None = None
    slopes: Mapping[int, Tensor | None] = field(default_factory=dict)


class StepEnd(NamedTuple):
    """The start of a step back: the end of a step, with cotangents.

    Args:
        n: number of the step.
        state: state at the step's start.
        slope: slope there, if it was handed on and is not to be evaluated again.
        begin, end: numbers of the first output that lies in the step, and of the first one after.
        adjoint: cotangent of the state at the step's end.
        slopes: cotangents, from outside the step, of its slopes, by stage; None for zero.
    """

    n: int
    state: Tensor
    slope: Tensor | None
    begin: int
    end: int
    adjoint: Tensor
    slopes: Mapping[int, Tensor | None]


class StepStart(NamedTuple):
    """The result of a step back: cotangents at the start of a step.

    Args:
        adjoint: cotangent of the state at the step's start.
        first_slope: cotangent of the slope that was handed on to the step; None where none was, or for zero.
        times: cotangents of the step's times, None if they are not wanted.
    """

    adjoint: Tensor
    first_slope: Tensor | None
    times: StepTimeCotangents | None


class OutputCotangents:
    """The cotangents of a trajectory's outputs, and the weights with which they act on slopes.

    Args:
        trajectory: the solve.
        given: cotangents of the outputs, shape (M + 1, *state); for a trajectory without outputs zeros, (1, *state).
        want_times: whether cotangents of times are wanted.

    Attributes:
        given: cotangents of the outputs but the first, shape (M, *state).
        at_end: for each of them, whether it is the state at a step's end and no more.
    """

    def __init__(self, trajectory: Trajectory, given: Tensor, *, want_times: bool) -> None:
        dense, places = trajectory.method.dense, trajectory.outputs
        self.given = given[1:]
        self.want_times = want_times
        self.at_end: list[bool] = []
        self._thetas = [theta for _, theta in places]
        if places:
            thetas = torch.tensor(self._thetas, dtype=torch.float64)
            self._weights = dense.weights(thetas)
            self._device_weights = self._weights.to(given)
            self._derivatives = dense.derivatives(thetas) if want_times else self._weights
            self.at_end = [is_end and not want_times for is_end in trajectory.ends()]

    def act_on(self, at: StepEnd, i: int) -> bool:
        """Return whether outputs in a step act on slope i."""
        return at.end > at.begin and bool((self._weights[at.begin : at.end, i] != 0).any())

    def on_slope(self, at: StepEnd, i: int) -> Tensor:
        """Return sum_m b_i(theta_m) g_m over the outputs in a step, in the shape of the state."""
        given, weights = self.given[at.begin : at.end], self._device_weights[at.begin : at.end, i]
        shape = given.shape[1:]
        return torch.mv(given.reshape(len(given), shape.numel()).T, weights).view(shape)

    def in_step(self, at: StepEnd) -> Tensor:
        """Return the cotangents of the outputs in a step, shape (m, *state)."""
        return self.given[at.begin : at.end]

    def weights_in_step(self, at: StepEnd) -> Tensor:
        """Return b_i(theta_m) for the outputs in a step, shape (m, s), on the device."""
        return self._device_weights[at.begin : at.end]

    def times(self, at: StepEnd) -> StepTimeCotangents | None:
        """Return what takes the cotangents of a step's times, None if they are not wanted."""
        if not self.want_times:
            return None
        if at.end == at.begin:
            return StepTimeCotangents(self.given[:0], (), self.given.new_zeros(0, 0))
        places = slice(at.begin, at.end)
        return StepTimeCotangents(self.given[places], self._thetas[places], self._derivatives[places])


class StepBack(ABC):
    """One step of the symplectic partner of a method, for one sweep.

    Args:
        trajectory: the solve.
        field: its vector field.
        sums: takes the cotangents of f's dependencies.
        outputs: cotangents of the outputs.
        keep: whether graphs of the forward pass, if there are any, must stay for another sweep.

    Attributes:
        deviation: the largest difference seen so far between a recomputed state or slope and the recorded one,
            relative to their size, a scalar tensor.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        field: VectorField,
        sums: CotangentSums,
        outputs: OutputCotangents,
        *,
        keep: bool,
    ) -> None:
        self._trajectory = trajectory
        self._field = field
        self._sums = sums
        self._outputs = outputs
        self._keep = keep
        steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
        self._times = StageTimeCache(steps, trajectory.method.stage_times)
        self._following = trajectory.end
        self.deviation = zero(outputs.given)

    @abstractmethod
    def __call__(self, at: StepEnd) -> StepStart:
        """Carry the adjoint from the end of a step to its start."""
