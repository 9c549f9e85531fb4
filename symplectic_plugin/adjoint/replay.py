"""A recorded solve taken again with its whole graph, for derivatives of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..field.cotangents import StandIns
from ..field.vector_field import VectorField
from ..record.trajectory import Trajectory


class Times(NamedTuple):
    """A solve's times, as functions of whatever they come from.

    Args:
        starts: of each step's start, shape (N,).
        sizes: of the steps, shape (N,).
        outputs: of each output but the first, shape (M,).
    """

    starts: Tensor
    sizes: Tensor
    outputs: Tensor


def replay(
    trajectory: Trajectory,
    field: VectorField,
    stand_ins: StandIns,
    initial: Tensor,
    times: Times,
    first_slope: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A solve with the graph of every evaluation: full memory.

    Args:
        trajectory: the solve.
        field: its vector field.
        stand_ins: what takes the place of dependencies.
        initial: the initial state.
        times: the solve's times, of which the values are the trajectory's.
        first_slope: the slope that was handed on to the first step, if one was.

    Returns:
        The outputs, shape (M + 1, *state); the state that it ends in; the slopes of its last step.

    Raises:
        RuntimeError: if its stages had to be solved for.
    """
    if trajectory.implicit is not None:
        raise RuntimeError(
            "symplectic_adjoint: there are no second derivatives (create_graph=True) with an implicit method: use "
            "an explicit one for those"
        )
    x = initial
    outputs = [x]
    handed_on = first_slope
    slopes: list[Tensor] = []
    for n, step in enumerate(trajectory.steps):
        # Values are those that the solve had, to the last bit; only their derivatives are taken from `times`.
        start, size = times.starts[n] - times.starts[n].detach(), times.sizes[n] - times.sizes[n].detach()
        h = step.h + size
        inside = [m for m, (place, _) in enumerate(trajectory.outputs) if place == n]
        end_stage = trajectory.dense.end_stage and bool(inside)
        tableau = trajectory.tableau.with_end_stage() if end_stage else trajectory.tableau
        stage_times = trajectory.stage_times([step])[0]
        keywords = trajectory.stage_keywords(step)
        slopes = []
        for i in range(tableau.stages):
            if (draw := step.draws_before(i)) is not None:
                field.generators.set(draw)
            if i == 0 and step.slope_handed_on:
                assert handed_on is not None
                slopes.append(handed_on)
                continue
            stage = x + h * _combined(tableau.a[i, :i], slopes) if i else x
            t = stage_times[i] + (start + float(tableau.c[i]) * size).to(stage_times[i].dtype)
            slopes.append(field.evaluate(t, stage, keywords[i], stand_ins))
        if inside:
            theta = torch.stack(
                [trajectory.outputs[m][1] + _shift((times.outputs[m] - step.t0 - start) / h) for m in inside]
            )
            weights = trajectory.dense.weights(theta.cpu().double())
            outputs += [x + h * _combined(row, slopes) for row in weights]
        x = x + h * _combined(tableau.b, slopes)
        handed_on = slopes[trajectory.tableau.stages - 1]
    outputs += [initial] * (len(trajectory.outputs) + 1 - len(outputs))  # an event that is met at once
    return torch.stack(outputs), x, slopes


def _combined(weights: Tensor, slopes: list[Tensor]) -> Tensor:
    """The weighted sum of slopes."""
    weights = weights.to(slopes[0])
    return sum((w * k for w, k in zip(weights, slopes, strict=True)), torch.zeros_like(slopes[0]))


def _shift(value: Tensor) -> Tensor:
    """Zero, with the derivative of a value."""
    return value - value.detach()
