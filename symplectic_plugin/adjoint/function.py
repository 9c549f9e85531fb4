"""The autograd function of a solve: recorded on the way forward, swept back over on the way back.

One function serves both kinds of hosts: those that hand over a whole solve with its outputs, and those that loop over
steps by themselves, for which each step is a trajectory without outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..field._torch_compat import graph_is_kept
from ..field.report import timed
from ..field.vector_field import VectorField
from ..field.witness import Witness, refuse_batches
from ..record.saved_tensor_hooks import StatesForHooks
from ..record.trajectory import Trajectory
from .replay import replay, slope_at_start
from .step_back import Cotangents
from .sweep import sweep
from .times import SolveTimes

TimesOf = Callable[..., SolveTimes]
"""A solve's times as functions of the tensors that they come from: called with the trajectory and those tensors."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a solve, beside the dependencies of f.

    Args:
        initial: initial state.
        times: tensors that the solve's times come from.
        times_of: the solve's times as functions of those.
        first_slope: slope that was handed on to the first step, if one was.
    """

    initial: Tensor
    times: tuple[Tensor, ...]
    times_of: TimesOf
    first_slope: Tensor | None = None


def attach(solution: Tensor, trajectory: Trajectory, field: VectorField, inputs: Inputs) -> Tensor:
    """Make a solution that was computed without a graph a function of what it depends on.

    Args:
        solution: the outputs, shape (M + 1, *state), without a graph.
        trajectory: the solve.
        field: its vector field, with its dependencies discovered.
        inputs: what else the solve depends on.

    Returns:
        The same values, with a gradient for the inputs and the dependencies.
    """
    return _apply((solution,), trajectory, field, inputs, None)[0]


def attach_step(
    end: Tensor, slopes: dict[int, Tensor], trajectory: Trajectory, field: VectorField, inputs: Inputs
) -> tuple[Tensor, dict[int, Tensor]]:
    """Make a step that was taken without a graph a function of what it depends on.

    Args:
        end: state at the step's end, without a graph.
        slopes: slopes that were evaluated in the step, by stage, without graphs.
        trajectory: the step.
        field: the vector field, with its dependencies discovered.
        inputs: what else the step depends on.

    Returns:
        The same values, with a gradient for the inputs and the dependencies.
    """
    values = _apply((end, *slopes.values()), trajectory, field, inputs, tuple(slopes))
    return values[0], dict(zip(slopes, values[1:], strict=True))


def _apply(
    values: tuple[Tensor, ...],
    trajectory: Trajectory,
    field: VectorField,
    inputs: Inputs,
    stages: tuple[int, ...] | None,
) -> tuple[Tensor, ...]:
    record = _Record(trajectory, Witness(field), inputs.times_of, len(inputs.times), stages, values[0].dtype)
    return SymplecticAdjointSolve.apply(
        record, values, inputs.initial, inputs.first_slope, *inputs.times, *field.dependencies
    )


@dataclass(frozen=True)
class _Record:
    """The arguments of the autograd function that have no gradient.

    Args:
        trajectory: the solve.
        witness: sees to it that f is what it was.
        times_of: the solve's times as functions of the tensors that they come from.
        n_times: number of those tensors.
        stages: stages whose slopes are values of the function, beside the end of the only step; None if the outputs
            of a whole solve are its value.
        dtype: the dtype of the state at the end.
    """

    trajectory: Trajectory
    witness: Witness
    times_of: TimesOf
    n_times: int
    stages: tuple[int, ...] | None
    dtype: torch.dtype

    def cotangents(self, given: Sequence[Tensor | None], state: Tensor) -> Cotangents:
        """Return the cotangents of the function's values as a sweep takes them, for a state like this one."""
        first, *others = given
        if self.stages is None:
            return Cotangents(outputs=first)
        end = torch.zeros_like(state, dtype=self.dtype) if first is None else first
        return Cotangents(end=end, slopes=dict(zip(self.stages, others, strict=True)))

    def gradient(
        self,
        given: Sequence[Tensor | None],
        initial: Tensor,
        times: Sequence[Tensor],
        needed: Sequence[bool],
        *,
        keep: bool,
    ) -> list[Tensor | None]:
        """Sweep back over the solve.

        Args:
            given: cotangents of the function's values.
            initial: a tensor like the initial state.
            times: the tensors that the times come from.
            needed: which gradients are needed, in the order of the result.
            keep: whether the checkpoints must stay for another sweep.

        Returns:
            The gradients in the initial state, the first slope, the tensors of times and the dependencies, None where
            they are not needed, or for zero.
        """
        needs_times, needs_dependencies = needed[2 : 2 + self.n_times], needed[2 + self.n_times :]
        with torch.no_grad(), self.witness.checked(needs_dependencies, initial.device) as (field, sums):
            cotangents, want_times = self.cotangents(given, initial), any(needs_times)
            swept = sweep(self.trajectory, field, sums, cotangents, want_times=want_times, keep=keep)
            of_times: Sequence[Tensor | None] = [None] * self.n_times
            if swept.times is not None:
                of_times = self._of_times(times, swept.times)
        of_initial = swept.initial.to(initial.dtype) if needed[0] else None
        return [of_initial, swept.first_slope if needed[1] else None, *of_times, *sums.results()]

    def _of_times(self, times: Sequence[Tensor], cotangents: SolveTimes) -> list[Tensor | None]:
        with torch.enable_grad():
            leaves = [time.detach().requires_grad_() for time in times]
            values = self.times_of(self.trajectory, *leaves)
        given = [cotangents.starts, cotangents.sizes, cotangents.outputs]
        return _grad([values.starts, values.sizes, values.outputs], leaves, given, create_graph=False)


class SymplecticAdjointSolve(torch.autograd.Function):
    """A solve as a function of its initial state, first slope, times and the dependencies of f."""

    @staticmethod
    def forward(
        ctx: Any,
        record: _Record,
        values: tuple[Tensor, ...],
        initial: Tensor,
        first_slope: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.record = record
        # Times that need no gradient may be changed: the steps are what counts.
        times = inputs[: record.n_times]
        ctx.times = [None if time.requires_grad else time.detach() for time in times]
        # Autograd notices if what is saved is changed in place before the backward pass. A step's initial state is the
        # store's to drop.
        ctx.initial = _like(initial) if record.stages is not None else None
        ctx.states = StatesForHooks(record.trajectory.checkpoints)
        saved = [time for time in times if time.requires_grad]
        saved += [initial] if record.stages is None else []
        ctx.save_for_backward(*saved, *ctx.states.take(), *record.witness.saved)
        ctx.set_materialize_grads(record.stages is None)
        return values

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batches(given)
        record: _Record = ctx.record
        unpacked = iter(ctx.saved_tensors)
        times = [next(unpacked) if time is None else time for time in ctx.times]
        initial = next(unpacked) if ctx.initial is None else ctx.initial
        needed, keep = ctx.needs_input_grad[2:], graph_is_kept()
        with ctx.states.restored(unpacked), timed(record.witness.field.report):
            if not torch.is_grad_enabled():
                return None, None, *record.gradient(given, initial, times, needed, keep=keep)
            first_slope = None
            if record.stages is not None:
                initial, first_slope = _inputs_of_step(record.trajectory)
            arguments, dependencies = (record, needed, len(given), keep), record.witness.field.dependencies
            return None, None, *_Gradient.apply(arguments, *given, initial, first_slope, *times, *dependencies)


class _Gradient(torch.autograd.Function):
    """The gradient as a function that can be differentiated itself, by the graph of the whole solve, in its memory."""

    @staticmethod
    def forward(ctx: Any, arguments: Any, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        record, needed, n, keep = arguments
        given, initial, first_slope, times = (
            inputs[:n],
            inputs[n],
            inputs[n + 1],
            inputs[n + 2 : n + 2 + record.n_times],
        )
        ctx.arguments = record, n
        ctx.save_for_backward(*given, initial, first_slope, *times, record.trajectory.end, *record.witness.saved)
        ctx.set_materialize_grads(False)
        return tuple(record.gradient(given, initial, times, needed, keep=keep))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "symplectic_adjoint: there are no third derivatives (create_graph=True on a gradient of a gradient): "
                "use the base method itself for those"
            )
        refuse_batches(directions)
        record, n = ctx.arguments
        *saved, reached = ctx.saved_tensors[: n + 3 + record.n_times]
        needed = [True] * len(record.witness.field.dependencies)
        with (
            record.witness.checked(needed, saved[n].device) as (field, sums),
            timed(field.report),
            torch.enable_grad(),
        ):
            leaves = [None if x is None else x.detach().requires_grad_() for x in saved]
            given, initial, times = leaves[:n], leaves[n], leaves[n + 2 :]
            solve_times = record.times_of(record.trajectory, *times)
            first_slope, at_start = leaves[n + 1], None
            if first_slope is None and record.trajectory.checkpoints[0].step.slope_handed_on:
                at_start = slope_at_start(record.trajectory, field, sums.stand_ins, initial, solve_times)
                first_slope = at_start.detach().requires_grad_()
            start = initial.to(record.dtype)
            replayed = replay(record.trajectory, field, sums.stand_ins, start, solve_times, first_slope)
            if reached is not None:
                off = torch.linalg.vector_norm(replayed.end.detach() - reached)
                field.require_same(off / torch.linalg.vector_norm(reached))
            values = [replayed.outputs]
            if record.stages is not None:
                values = [replayed.end, *(replayed.slopes[i] for i in record.stages)]
            variables = [*given, initial, first_slope, *times, *sums.inputs]
            first = _grad(values, variables[n:], given, create_graph=True)
            second = _grad(first, variables, directions, create_graph=False)
            if at_start is not None:
                # The slope handed on is f at the step's start: what acts through the slope acts through f there.
                through_f = _grad([at_start], variables, [second[n + 1]], create_graph=False)
                second = [_sum(a, b) for a, b in zip(second, through_f, strict=True)]
                second[n + 1] = None
        return None, *second


def _like(state: Tensor) -> Tensor:
    """Return a tensor in the shape and dtype of a state that takes the memory of one number."""
    return state.new_zeros(()).expand(state.shape)


def _inputs_of_step(trajectory: Trajectory) -> tuple[Tensor, Tensor | None]:
    """Return the state and the slope at the start of a trajectory's only step, with their histories.

    Raises:
        RuntimeError: if they were not kept.
    """
    (checkpoint,), storage = trajectory.checkpoints, trajectory.store.storage
    if checkpoint.state is None or not storage.on_device:
        raise RuntimeError(
            "symplectic_adjoint: create_graph=True needs all states, but some were dropped or offloaded: "
            'use checkpoint="steps", or a larger memory_budget'
        )
    return storage.get(checkpoint.state), None if checkpoint.slope is None else storage.get(checkpoint.slope)


def _grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    """Call `torch.autograd.grad` for outputs, inputs and cotangents that may be missing."""
    pairs = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    present = [x for x in inputs if x is not None]
    if not pairs or not present:
        return [None] * len(inputs)
    given = [output for output, _ in pairs], present, [cotangent for _, cotangent in pairs]
    gradients = iter(torch.autograd.grad(*given, allow_unused=True, create_graph=create_graph))
    return [None if x is None else next(gradients) for x in inputs]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
