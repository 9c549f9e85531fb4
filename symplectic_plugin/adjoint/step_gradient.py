"""The autograd function of one step: taken without a graph on the way forward, swept back over on the way back.

For hosts whose loops take steps from a solver one by one, and may do anything between them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..field.cotangents import CotangentSums
from ..field.report import timed
from ..field.vector_field import VectorField
from ..field.witness import Witness, gradients, refuse_batches, refuse_third_derivatives
from ..record.kept import Kept
from ..record.saved import graph_is_kept, states_for_hooks
from ..record.trajectory import Trajectory
from .recompute import advance
from .replay import Times, replay
from .sweep import sweep_step
from .times import TimeCotangents


def attach_step(
    end: Tensor,
    slopes: Mapping[int, Tensor],
    trajectory: Trajectory,
    field: VectorField,
    start: Tensor,
    times: tuple[Tensor, Tensor],
    first_slope: Tensor | None,
    with_loss: bool,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Make a step that was taken without a graph a function of what it depends on.

    Args:
        end: the state at its end, without a graph.
        slopes: by stage, the slopes that were evaluated in it, without graphs.
        trajectory: the step, with what is kept of it.
        field: the vector field, with its dependencies discovered.
        start: the state at its start.
        times: the time at its start and its size, tensors of one element.
        first_slope: the slope that was handed on to it, if one was.
        with_loss: whether the vector field takes and returns the state flattened and with one element more: an
            integral that is added to whatever is differentiated.

    Returns:
        The same values, with gradients for the state, the slope handed on, the dependencies and the times.
    """
    record = _StepRecord(trajectory, field, with_loss, tuple(slopes))
    results = _RecordedStep.apply(record, (end, *slopes.values()), start, *times, first_slope, *field.dependencies)
    return results[0], dict(zip(slopes, results[1:], strict=True))


@dataclass(frozen=True)
class _StepRecord:
    """What the function of a step is handed that needs no gradient."""

    trajectory: Trajectory
    field: VectorField
    with_loss: bool
    stages: tuple[int, ...]


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
        like = [(x.shape, x.dtype) for x in (t, h)]
        ctx.step = _Step(record, Witness(record.field), results[0].dtype, like, (start.shape, start.dtype))
        ctx.states = states_for_hooks(record.trajectory.kept)
        times = (time if time.requires_grad else None for time in (t, h))
        ctx.save_for_backward(*times, *ctx.states.take(), *ctx.step.witness.saved)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batches(cotangents)
        step: _Step = ctx.step
        t, h, *saved = ctx.saved_tensors
        keep = graph_is_kept()
        arguments = (step, ctx.needs_input_grad[2:], keep)
        with ctx.states.there(iter(saved)), timed(step.record.field.report):
            if torch.is_grad_enabled() and not step.record.with_loss:
                start, first_slope = step.inputs()
                dependencies = step.record.field.dependencies
                return (
                    None,
                    None,
                    *_StepGradient.apply(
                        arguments, start, t, h, first_slope, len(cotangents), *cotangents, *dependencies
                    ),
                )
            with torch.no_grad():
                results = step.gradient(*arguments[1:], cotangents)
        if torch.is_grad_enabled():
            results = [None if g is None else _OnceDifferentiable.apply(g, _leaf_like(g)) for g in results]
        return None, None, *results


@dataclass(frozen=True)
class _Step:
    """A step's record and its witness.

    Args:
        dtype: the state's at its end.
        times: the shapes and dtypes of its time and size.
        state: the shape and dtype of the state at its start.
    """

    record: _StepRecord
    witness: Witness
    dtype: torch.dtype
    times: list[tuple[torch.Size, torch.dtype]]
    state: tuple[torch.Size, torch.dtype]

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """The state and the slope at its start, with their histories.

        Raises:
            RuntimeError: if they were not kept.
        """
        (kept,), storage = self.record.trajectory.kept, self.record.trajectory.checkpoints.storage
        if kept.state is None or not storage.on_device:
            raise RuntimeError(
                "symplectic_adjoint: create_graph=True needs all states, but some were dropped or offloaded: "
                'use checkpoint="steps", or a larger memory_budget'
            )
        return storage.get(kept.state), None if kept.slope is None else storage.get(kept.slope)

    def gradient(self, needed: Sequence[bool], keep: bool, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The cotangents of the state, of time and size, of the slope handed on, and of the dependencies."""
        record = self.record
        checkpoints, (kept,) = record.trajectory.checkpoints, record.trajectory.kept
        _, needs_t, needs_h, _, *needs = needed
        end, *slopes = cotangents
        shape, dtype = self.state

        def flat(tensor: Tensor | None, last: float) -> Tensor | None:
            """The state and, if there is a loss, one element more."""
            if tensor is None or not record.with_loss:
                return tensor
            return torch.cat([tensor.reshape(-1), tensor.new_full((1,), last)])

        with self.witness.checked(needs, record.field.device) as sums:
            following = checkpoints.end_of(kept)
            start, first_slope = checkpoints.recall(kept, functools.partial(_advance, record.field))
            start = start.detach().to(self.dtype)
            cotangent = flat(torch.zeros_like(start) if end is None else end, 1.0)
            state, slope = flat(start, 0.0), flat(None if first_slope is None else first_slope.detach(), 0.0)
            assert state is not None
            assert cotangent is not None
            of_state, of_slope, of_times = sweep_step(
                record.trajectory,
                record.field,
                sums,
                state,
                slope,
                cotangent,
                {i: flat(of, 0.0) for i, of in zip(record.stages, slopes, strict=True)},
                needs_t or needs_h,
                keep,
                None if following is None or record.with_loss else following.detach(),
            )
            if record.with_loss and of_slope is not None:
                _add_loss_at_start(record.trajectory, record.field, sums, state, slope, of_state, of_slope, of_times)
            if not keep:
                checkpoints.release(kept)
        both = [None, None] if of_times is None else [of_times.starts, of_times.sizes]
        if record.with_loss:
            of_state = of_state[:-1].view(shape)
            of_slope = None if of_slope is None else of_slope[:-1].view(shape)
        of_t, of_h = (
            None if time is None or not need else time.to(dtype).reshape(shape)
            for time, need, (shape, dtype) in zip(both, (needs_t, needs_h), self.times, strict=True)
        )
        return [of_state.to(dtype), of_t, of_h, of_slope, *sums.results()]


def _advance(field: VectorField, kept: Kept, state: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return advance(kept.step, field, 0, state.detach(), None if slope is None else slope.detach())


class _StepGradient(torch.autograd.Function):
    """A step's gradient as a function that can be differentiated itself."""

    @staticmethod
    def forward(
        ctx: Any,
        arguments: Any,
        start: Tensor,
        t: Tensor | None,
        h: Tensor | None,
        first_slope: Tensor | None,
        n_cotangents: int,
        *others: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        step, needed, keep = arguments
        ctx.step = step
        cotangents = others[:n_cotangents]
        ctx.save_for_backward(start, t, h, first_slope, *cotangents)
        ctx.set_materialize_grads(False)
        return tuple(step.gradient(needed, keep, cotangents))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_third_derivatives()
        refuse_batches(directions)
        record, field = ctx.step.record, ctx.step.record.field
        trajectory, (taken,) = record.trajectory, record.trajectory.steps
        saved = ctx.saved_tensors
        with (
            ctx.step.witness.checked([True] * len(field.dependencies), field.device) as sums,
            timed(field.report),
            torch.enable_grad(),
        ):
            start, t, h, slope, *cotangents = (None if x is None else _leaf(x) for x in saved)
            assert start is not None
            starts, sizes = (
                torch.tensor([value], dtype=torch.float64, device=field.device) if x is None else x.reshape(1).double()
                for x, value in ((t, taken.t0), (h, taken.h))
            )
            times, time = Times(starts, sizes, starts[:0]), trajectory.stage_times([taken])[0][0]
            evaluated_again = taken.slope_handed_on and slope is None
            if evaluated_again:
                slope = _leaf(field(time, start, {}))
            _, ended, slopes = replay(trajectory, field, sums.stand_ins, start.to(ctx.step.dtype), times, slope)
            if (reached := trajectory.end) is not None:
                off = torch.linalg.vector_norm(ended.detach() - reached)
                field.require_same(off / torch.linalg.vector_norm(reached))
            variables = [start, t, h, slope, *sums.inputs]
            first = gradients([ended, *(slopes[i] for i in record.stages)], variables, cotangents, create_graph=True)
            n = len(cotangents)
            second = gradients(first, [*cotangents, *variables], directions, create_graph=False)
            if evaluated_again and (of_slope := second[n + 3]) is not None:
                # The slope handed on is f at the step's start: what acts through it acts through that.
                moved = time + (starts - starts.detach()).to(time.dtype).reshape(time.shape)
                again = field.evaluate(moved, start, {}, sums.stand_ins)
                more = gradients([again], variables, [of_slope], create_graph=False)
                second[n + 3] = None
                for i, extra in enumerate(more):
                    if extra is not None:
                        known = second[n + i]
                        second[n + i] = extra if known is None else known + extra
        return None, *second[n : n + 4], None, *second[:n], *second[n + 4 :]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _leaf_like(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(()).requires_grad_()


class _OnceDifferentiable(torch.autograd.Function):
    """Makes a gradient raise where it is differentiated again, rather than pass for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "symplectic_adjoint: a gradient was differentiated again (create_graph=True), which it can't be with an "
            "integral_loss: use sensitivity='autograd' for that"
        )


def _add_loss_at_start(
    trajectory: Trajectory,
    field: VectorField,
    sums: CotangentSums,
    state: Tensor,
    kept_slope: Tensor | None,
    of_state: Tensor,
    of_slope: Tensor,
    of_times: TimeCotangents | None,
) -> None:
    """Add, in place, what acts through the integrand at a step's start: handed on was the slope of the state alone."""
    step = trajectory.steps[0]
    cotangent = torch.zeros_like(of_slope)
    cotangent[-1] = of_slope[-1]
    time = trajectory.stage_times([step])[0][0]
    evaluation = field.differentiable(time, state, {}, of_times is not None, sums.stand_ins)
    product, tau = field.vjp(evaluation, cotangent, sums, of_times is not None)
    if product is not None:
        of_state += product
    if of_times is not None:
        if kept_slope is not None:  # else it was evaluated again, with the integrand
            of_times.sizes.add_(evaluation.slope.detach()[-1] * of_slope[-1] / step.h)
        if tau is not None:
            of_times.starts.add_(tau.sum())
