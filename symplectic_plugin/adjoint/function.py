"""The autograd function of a solve: recorded on the way forward, swept back over on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..field.report import timed
from ..field.vector_field import VectorField
from ..field.witness import Witness, gradients, refuse_batches, refuse_third_derivatives
from ..record.saved import graph_is_kept, states_for_hooks
from ..record.trajectory import Trajectory
from .replay import Times, replay
from .sweep import sweep

TimesOf = Callable[..., Times]
"""A solve's times as functions of the tensors that they come from: called with the trajectory and those."""


def attach(
    solution: Tensor,
    trajectory: Trajectory,
    field: VectorField,
    initial: Tensor,
    times: tuple[Tensor, ...],
    times_of: TimesOf,
) -> Tensor:
    """Make a solution that was computed without a graph a function of what it depends on.

    Args:
        solution: the outputs, shape (M + 1, *state), without a graph.
        trajectory: the solve that they are of.
        field: its vector field, with its dependencies discovered.
        initial: the initial state.
        times: the tensors that the solve's times come from.
        times_of: the solve's times as functions of those.

    Returns:
        The same values, with a gradient for the initial state, the dependencies and the times.
    """
    record = _Record(solution, trajectory, field, times_of, len(times))
    return _RecordedSolve.apply(record, initial, *times, *field.dependencies)


@dataclass(frozen=True)
class _Record:
    """What the function is handed that needs no gradient."""

    solution: Tensor | None
    trajectory: Trajectory
    field: VectorField
    times_of: TimesOf
    n_times: int


class _RecordedSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, initial: Tensor, *inputs: Tensor) -> Tensor | None:
        ctx.record = replace(record, solution=None)
        ctx.witness = Witness(record.field)
        # Times that need no gradient may be changed: the steps are what counts.
        ctx.times = [None if time.requires_grad else time.detach() for time in inputs[: record.n_times]]
        times = [time for time in inputs[: record.n_times] if time.requires_grad]
        # Autograd notices if what is saved is changed in place before the backward pass. Where somebody's hooks take
        # over what is saved, to offload it or make it again, they get the checkpoints as well.
        ctx.states = states_for_hooks(record.trajectory.kept)
        ctx.save_for_backward(*times, initial, *ctx.states.take(), *ctx.witness.saved)
        return record.solution

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batches([cotangent])
        record: _Record = ctx.record
        unpacked = iter(ctx.saved_tensors)
        times = [next(unpacked) if time is None else time for time in ctx.times]
        initial = next(unpacked)
        arguments = record, ctx.witness, ctx.needs_input_grad[1:], graph_is_kept()
        with ctx.states.there(unpacked), timed(record.field.report):
            if not torch.is_grad_enabled():
                return None, *_gradient(cotangent, times, *arguments)
            return None, *_Gradient.apply(arguments, cotangent, initial, *times, *record.field.dependencies)


def _gradient(
    cotangent: Tensor, times: Sequence[Tensor], record: _Record, witness: Witness, needed: Sequence[bool], keep: bool
) -> list[Tensor | None]:
    """The cotangents of the initial state, of the times and of the dependencies, as far as they are needed."""
    needs_times, needs_dependencies = needed[1 : 1 + len(times)], needed[1 + len(times) :]
    with witness.checked(needs_dependencies, cotangent.device) as sums:
        initial, of_times = sweep(record.trajectory, record.field, sums, cotangent, any(needs_times), keep)
        time_gradients: Sequence[Tensor | None] = [None] * len(times)
        if of_times is not None:
            with torch.enable_grad():
                leaves = [time.detach().requires_grad_() for time in times]
                solve_times = record.times_of(record.trajectory, *leaves)
            time_gradients = gradients(
                solve_times, leaves, [of_times.starts, of_times.sizes, of_times.outputs], create_graph=False
            )
    return [initial if needed[0] else None, *time_gradients, *sums.results()]


class _Gradient(torch.autograd.Function):
    """The gradient as a function that can be differentiated itself: by the graph of the whole solve, in its memory."""

    @staticmethod
    def forward(ctx: Any, arguments: Any, cotangent: Tensor, initial: Tensor, *inputs: Tensor) -> Any:
        record, witness, _, _ = arguments
        ctx.arguments = record, witness
        times = inputs[: record.n_times]
        end = initial if record.trajectory.end is None else record.trajectory.end
        ctx.save_for_backward(cotangent, initial, *times, end, *witness.saved)
        ctx.set_materialize_grads(False)
        return tuple(_gradient(cotangent, times, *arguments))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_third_derivatives()
        refuse_batches(directions)
        record, witness = ctx.arguments
        *unpacked, end = ctx.saved_tensors[: 3 + record.n_times]
        needed = [True] * len(record.field.dependencies)
        with (
            witness.checked(needed, unpacked[0].device) as sums,
            timed(record.field.report),
            torch.enable_grad(),
        ):
            cotangent, initial, *times = (x.detach().requires_grad_() for x in unpacked)
            solve_times = record.times_of(record.trajectory, *times)
            with record.field.generators.kept():
                outputs, ended, _ = replay(record.trajectory, record.field, sums.stand_ins, initial, solve_times)
            record.field.require_same(torch.linalg.vector_norm(ended.detach() - end) / torch.linalg.vector_norm(end))
            inputs = [initial, *times, *sums.inputs]
            first = gradients([outputs], inputs, [cotangent], create_graph=True)
            second = gradients(first, [cotangent, *inputs], directions, create_graph=False)
        return None, *second
