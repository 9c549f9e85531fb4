"""The autograd functions: a recorded solve, or a step of one, on the way forward; the adjoint sweep on the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sweep import TimeCotangents, sweep, sweep_step
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
        _require_same_memory(ctx.addresses, saved[:n_inputs])
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


def attach_step(
    end: Tensor,
    slopes: Mapping[int, Tensor],
    trajectory: Trajectory,
    field: VectorField,
    start: Tensor,
    times: tuple[Tensor, Tensor],
    first_slope: Tensor | None,
    keep_slope: bool,
    with_loss: bool,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Make a step that was taken without a graph a function of what it depends on.

    Args:
        end: the state at its end, without a graph.
        slopes: by stage, the slopes that were evaluated in it, without graphs.
        trajectory: the step, without its state and slope.
        field: the vector field, with its dependencies discovered.
        start: the state at its start.
        times: the time at its start and its size, tensors of one element.
        first_slope: the slope that was handed on to it, if one was.
        keep_slope: whether that slope must be kept, since it can't be evaluated again from `start`.
        with_loss: whether the vector field takes and returns the state flattened, and with one element more: an integral
            that is added to whatever is differentiated.

    Returns:
        The same values, with gradients for the state, the slope handed on, the dependencies and the times.
    """
    record = _StepRecord(trajectory, field, with_loss, tuple(slopes), keep_slope)
    results = _RecordedStep.apply(record, (end, *slopes.values()), start, *times, first_slope, *field.dependencies)
    return results[0], dict(zip(slopes, results[1:], strict=True))


@dataclass(frozen=True)
class _StepRecord:
    """What the function of a step is handed that needs no gradient."""

    trajectory: Trajectory
    field: VectorField
    with_loss: bool
    stages: tuple[int, ...]
    keep_slope: bool


class _RecordedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        record: _StepRecord,
        results: tuple[Tensor, ...],
        start: Tensor,
        t: Tensor,
        h: Tensor,
        first_slope: Tensor | None,
        *dependencies: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.record = record
        ctx.dtype = results[0].dtype
        ctx.times = [(time.shape, time.dtype) for time in (t, h)]
        ctx.addresses = [_address(tensor) for tensor in dependencies]
        ctx.save_for_backward(start, first_slope if record.keep_slope else None, *dependencies)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, end: Tensor | None, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        record: _StepRecord = ctx.record
        start, first_slope, *dependencies = ctx.saved_tensors
        _require_same_memory(ctx.addresses, dependencies)
        _, _, needs_start, needs_t, needs_h, needs_slope, *needs = ctx.needs_input_grad

        def flat(tensor: Tensor | None, last: float) -> Tensor | None:
            """The state and, if there is a loss, one element more."""
            if tensor is None or not record.with_loss:
                return tensor
            return torch.cat([tensor.reshape(-1), tensor.new_full((1,), last)])

        state = flat(start.detach().to(ctx.dtype), 0.0)
        cotangent = flat(torch.zeros_like(start, dtype=ctx.dtype) if end is None else end, 1.0)
        assert state is not None
        assert cotangent is not None
        trajectory = replace(record.trajectory, states=[state], slopes=[flat(first_slope, 0.0)])
        sums = CotangentSums(record.field, needs)
        with without_autocast(cotangent.device), record.field.generators.kept():
            of_state, of_slope, of_times = sweep_step(
                trajectory,
                record.field,
                sums,
                cotangent,
                {i: flat(slope, 0.0) for i, slope in zip(record.stages, slopes, strict=True)},
                needs_t or needs_h,
            )
        if record.with_loss:
            of_state = of_state[:-1].view(start.shape)
        both = (None, None) if of_times is None else (of_times.starts, of_times.sizes)
        of_t, of_h = (
            None if time is None else time.to(dtype).reshape(shape)
            for time, (shape, dtype) in zip(both, ctx.times, strict=True)
        )
        return None, None, of_state.to(start.dtype), of_t, of_h, of_slope, *sums.results()


def _require_same_memory(addresses: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Refuse tensors that autograd thinks unchanged, but that hold other values than on the way forward."""
    if list(addresses) != [_address(tensor) for tensor in tensors]:
        raise RuntimeError(
            "symplectic_adjoint: a tensor that the vector field depends on was given other memory (its .data was set, "
            "or it was moved) between the forward and the backward pass, so the gradient can't be had. Call backward() "
            "before changing it."
        )


def _address(tensor: Tensor) -> int:
    """Where a tensor's values are."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
