"""The one autograd function: a recorded solve on the way forward, the adjoint sweep on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sweep import TimeCotangents, sweep
from .trajectory import Trajectory
from .vector_field import CotangentSums, VectorField, without_autocast

TimeGradients = Callable[[TimeCotangents], Sequence[Tensor]]


def attach(
    solution: Tensor,
    trajectory: Trajectory,
    field: VectorField,
    initial: Tensor,
    times: tuple[Tensor, ...],
    time_gradients: TimeGradients,
) -> Tensor:
    """Make a solution that was computed without a graph a function of what it depends on.

    Args:
        solution: the outputs, shape (M + 1, *state), without a graph.
        trajectory: the solve that they are of.
        field: its vector field, with its dependencies discovered.
        initial: the initial state.
        times: the tensors that the solve's times come from.
        time_gradients: turns the cotangents of a solve's times into those of `times`.

    Returns:
        The same values, with a gradient for the initial state, the dependencies and the times.
    """
    record = _Record(solution, trajectory, field, time_gradients, len(times))
    return _RecordedSolve.apply(record, initial, *times, *field.dependencies)


@dataclass(frozen=True)
class _Record:
    """What the function is handed that needs no gradient."""

    solution: Tensor | None
    trajectory: Trajectory
    field: VectorField
    time_gradients: TimeGradients
    n_times: int


class _RecordedSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, initial: Tensor, *inputs: Tensor) -> Tensor | None:
        trajectory = record.trajectory
        ctx.record = replace(record, solution=None, trajectory=replace(trajectory, states=[], slopes=[]))
        ctx.addresses = [_address(tensor) for tensor in inputs]
        ctx.has_slope = [slope is not None for slope in trajectory.slopes]
        # All saved: so autograd notices what is changed in place before the backward pass, frees the checkpoints after
        # it, and lets hooks on saved tensors have them. The first state is the initial one.
        slopes = [slope for slope in trajectory.slopes if slope is not None]
        ctx.save_for_backward(*inputs, initial, *trajectory.states[1:], *slopes)
        return record.solution

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        record: _Record = ctx.record
        n_inputs, n_steps = len(ctx.addresses), len(ctx.has_slope)
        saved = list(ctx.saved_tensors)
        if ctx.addresses != [_address(tensor) for tensor in saved[:n_inputs]]:
            raise RuntimeError(
                "symplectic_adjoint: a tensor that the vector field depends on was given other memory (its .data was "
                "set, or it was moved) between the forward and the backward pass, so the gradient can't be had. "
                "Call backward() before changing it."
            )
        given_slopes = iter(saved[n_inputs + n_steps :]) if n_steps else iter(())
        trajectory = replace(
            record.trajectory,
            states=[state.detach() for state in saved[n_inputs : n_inputs + n_steps]],
            slopes=[next(given_slopes) if has else None for has in ctx.has_slope],
        )
        _, needs_initial, *needs = ctx.needs_input_grad
        needs_times, needs_dependencies = needs[: record.n_times], needs[record.n_times :]
        sums = CotangentSums(record.field, needs_dependencies)
        with without_autocast(cotangent.device), record.field.generators.kept():
            initial, times = sweep(trajectory, record.field, sums, cotangent, any(needs_times))
            time_gradients = [None] * record.n_times if times is None else record.time_gradients(times)
        return None, initial if needs_initial else None, *time_gradients, *sums.results()


def _address(tensor: Tensor) -> int:
    """Where a tensor's values are."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
