"""The adjoint sweep: the symplectic partner's steps, backwards over a recorded solve."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..field._torch_compat import at_end_of_backward
from ..field.cotangents import CotangentSums, wide
from ..field.vector_field import VectorField
from ..record.trajectory import Trajectory
from .explicit_step_back import ExplicitStepBack
from .implicit_step_back import ImplicitStepBack
from .recompute import advance
from .step_back import Cotangents, OutputCotangents, StepBack, StepEnd
from .times import SolveTimes, StepTimeCotangents, gathered


@dataclass(frozen=True)
class Swept:
    """The cotangents that a sweep arrives at.

    Args:
        initial: of the initial state.
        first_slope: of the slope that was handed on to the first step; None where none was, or for zero.
        times: of the solve's times, None if they are not wanted.
    """

    initial: Tensor
    first_slope: Tensor | None
    times: SolveTimes | None


def sweep(
    trajectory: Trajectory,
    field: VectorField,
    sums: CotangentSums,
    cotangents: Cotangents,
    *,
    want_times: bool,
    keep: bool = False,
) -> Swept:
    """Carry cotangents back over a recorded solve.

    Args:
        trajectory: the solve.
        field: its vector field.
        sums: takes the cotangents of f's dependencies.
        cotangents: of the outputs, or of the end and the slopes of the last step.
        want_times: whether the cotangents of the times are wanted.
        keep: whether the checkpoints must stay, for another sweep.

    Raises:
        RuntimeError: if f is not what it was on the way forward.
    """
    given = _outputs(cotangents)
    outputs = OutputCotangents(trajectory, given, want_times=want_times)
    back: StepBack = (ExplicitStepBack if trajectory.method.implicit is None else ImplicitStepBack)(
        trajectory, field, sums, outputs, keep=keep
    )
    store, places, last = trajectory.store, trajectory.outputs, trajectory.method.tableau.stages - 1
    adjoint = torch.zeros_like(given[0], dtype=wide(given.dtype)) if cotangents.end is None else cotangents.end
    slopes, end = cotangents.slopes, len(places)
    times: list[StepTimeCotangents] = []
    try:
        for n in reversed(range(len(trajectory.checkpoints))):
            while end > 0 and places[end - 1][0] == n and outputs.at_end[end - 1]:
                end -= 1
                adjoint = adjoint + outputs.given[end]
            begin = end
            while begin > 0 and places[begin - 1][0] == n:
                begin -= 1
            checkpoint = trajectory.checkpoints[n]
            state, slope = store.recall(checkpoint, functools.partial(advance, field))
            start = back(StepEnd(n, state.detach(), slope, begin, end, adjoint, slopes))
            adjoint, slopes, end = start.adjoint, {last: start.first_slope}, begin
            if start.times is not None:
                times.append(start.times)
            if not keep:
                checkpoint.release()
    finally:
        if cotangents.outputs is not None:
            store.end_recall()
        elif store.is_recalling:  # for the steps before, which have sweeps of their own
            at_end_of_backward(store.end_recall)
    field.require_same(back.deviation)
    # The first output is the initial state, and so is an event that is met at once.
    initial = (adjoint + given[: end + 1].sum(0)).to(given.dtype)
    first_slope = slopes.get(last) if trajectory.checkpoints else None
    return Swept(initial, first_slope, gathered(times[::-1], given) if want_times else None)


def _outputs(cotangents: Cotangents) -> Tensor:
    """Return the outputs' cotangents, shape (M + 1, *state); zeros of shape (1, *state) without outputs."""
    if cotangents.outputs is not None:
        return cotangents.outputs.contiguous()
    assert cotangents.end is not None
    return cotangents.end.new_zeros(1, *cotangents.end.shape)
