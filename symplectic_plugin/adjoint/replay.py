"""A recorded solve with the graph of every evaluation, for derivatives of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..field.cotangents import StandIns
from ..field.vector_field import VectorField
from ..methods.explicit import explicit_step, weighted_sum
from ..record.method import Step
from ..record.trajectory import Trajectory
from .times import SolveTimes


class Replayed(NamedTuple):
    """A replayed solve.

    Args:
        outputs: shape (M + 1, *state).
        end: the state at the end of the last step.
        slopes: slopes of the last step.
    """

    outputs: Tensor
    end: Tensor
    slopes: list[Tensor]


def replay(
    trajectory: Trajectory,
    field: VectorField,
    stand_ins: StandIns,
    initial: Tensor,
    times: SolveTimes,
    first_slope: Tensor | None = None,
) -> Replayed:
    """Solve again over the recorded steps with the graph of every evaluation, at backpropagation's memory.

    Args:
        trajectory: the solve.
        field: its vector field.
        stand_ins: leaves that take the place of dependencies.
        initial: the initial state.
        times: times of the solve with their histories. Values are the trajectory's.
        first_slope: slope that was handed on to the first step, if one was.

    Raises:
        RuntimeError: if the stages had to be solved for.
    """
    method = trajectory.method
    if method.implicit is not None:
        raise RuntimeError(
            "symplectic_adjoint: there are no second derivatives (create_graph=True) with an implicit method: use "
            "an explicit one for those"
        )
    x, handed_on = initial, first_slope
    outputs, slopes = [x], list[Tensor]()
    for n, checkpoint in enumerate(trajectory.checkpoints):
        step = checkpoint.step
        # Values are those that the solve had, to the last bit; only their derivatives are taken from `times`.
        moves = _zero_with_derivative(times.starts[n]), _zero_with_derivative(times.sizes[n])
        inside = [m for m, (place, _) in enumerate(trajectory.outputs) if place == n]
        tableau = method.tableau.with_end_stage() if method.dense.end_stage and inside else method.tableau
        slope_at = _slope_at(trajectory, field, stand_ins, step, moves)
        h = step.h + moves[1]
        slopes = explicit_step(tableau, slope_at, x, h, handed_on if step.slope_handed_on else None)
        if inside:
            thetas = [
                trajectory.outputs[m][1] + _zero_with_derivative((times.outputs[m] - step.t0 - moves[0]) / h)
                for m in inside
            ]
            weights = method.dense.weights(torch.stack(thetas).cpu().double())
            outputs += [_interpolated(x, row, slopes, h) for row in weights]
        x = weighted_sum(x, tableau.numbers[1], slopes, h)
        handed_on = slopes[method.tableau.stages - 1]
    outputs += [initial] * (len(trajectory.outputs) + 1 - len(outputs))  # an event that is met at once
    return Replayed(torch.stack(outputs), x, slopes)


def slope_at_start(
    trajectory: Trajectory, field: VectorField, stand_ins: StandIns, initial: Tensor, times: SolveTimes
) -> Tensor:
    """Return f at the start of the first step with its graph, where the slope there was handed on and is not kept.

    Args:
        trajectory, field, stand_ins, initial, times: as for `replay`.
    """
    moves = _zero_with_derivative(times.starts[0]), _zero_with_derivative(times.sizes[0])
    return _slope_at(trajectory, field, stand_ins, trajectory.checkpoints[0].step, moves)(0, initial)


def _slope_at(
    trajectory: Trajectory, field: VectorField, stand_ins: StandIns, step: Step, moves: tuple[Tensor, Tensor]
) -> Callable[[int, Tensor], Tensor]:
    """Return f at the stages of a step, whose start and size have the derivatives of `moves`."""
    c = [*trajectory.method.tableau.c.tolist(), *trajectory.method.dense.added_times]
    times, keywords = trajectory.method.stage_times([step])[0], trajectory.method.stage_keywords(step)

    def slope_at(i: int, stage: Tensor) -> Tensor:
        if (before := step.draws_before(i)) is not None:
            field.generators.draw_again_from(before)
        t = times[i] + (moves[0] + c[i] * moves[1]).to(times[i].dtype).reshape(times[i].shape)
        return field.evaluate(t, stage, keywords[i], stand_ins)

    return slope_at


def _interpolated(x: Tensor, weights: Tensor, slopes: list[Tensor], h: Tensor) -> Tensor:
    weights = (h * weights).to(slopes[0])
    return sum((w * k for w, k in zip(weights, slopes, strict=True)), x)


def _zero_with_derivative(value: Tensor) -> Tensor:
    """Return zero, with the derivative of a value."""
    return value - value.detach()
