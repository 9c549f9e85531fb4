"""The autograd functions: a recorded solve, or a step of one, on the way forward; the adjoint sweep on the way back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .replay import Times, replay
from .sweep import TimeCotangents, sweep, sweep_step
from .trajectory import Trajectory
from .vector_field import CotangentSums, VectorField, without_autocast

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
        trajectory = record.trajectory
        ctx.record = replace(record, solution=None, trajectory=replace(trajectory, states=[], slopes=[]))
        ctx.has_slope = [slope is not None for slope in trajectory.slopes]
        ctx.witness = Witness(record.field)
        # All saved: so autograd notices what is changed in place before the backward pass, frees the checkpoints after
        # it, and lets hooks on saved tensors have them. The first state is the initial one.
        slopes = [slope for slope in trajectory.slopes if slope is not None]
        # Times that need no gradient may be changed: the steps are what counts.
        ctx.times = [None if time.requires_grad else time.detach() for time in inputs[: record.n_times]]
        times = [time for time in inputs[: record.n_times] if time.requires_grad]
        ctx.save_for_backward(*times, initial, *trajectory.states[1:], *slopes, *ctx.witness.saved)
        return record.solution

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        record: _Record = ctx.record
        n_steps = len(ctx.has_slope)
        unpacked = iter(ctx.saved_tensors)
        times = [next(unpacked) if time is None else time for time in ctx.times]
        saved = tuple(unpacked)
        n_states = max(1, n_steps + (1 if record.trajectory.ends else 0))
        slopes = iter(saved[n_states:])
        trajectory = replace(
            record.trajectory,
            states=[state.detach() for state in saved[:n_states]],
            slopes=[next(slopes) if has else None for has in ctx.has_slope],
        )
        arguments = (replace(record, trajectory=trajectory), ctx.witness, ctx.needs_input_grad[1:])
        if not torch.is_grad_enabled():
            return None, *_gradient(*arguments, cotangent, times)
        return None, *_Gradient.apply(arguments, cotangent, saved[0], *times, *record.field.dependencies)


def _gradient(
    record: _Record, witness: Witness, needed: Sequence[bool], cotangent: Tensor, times: Sequence[Tensor]
) -> list[Tensor | None]:
    """The cotangents of the initial state, of the times and of the dependencies, as far as they are needed."""
    needs_times, needs_dependencies = needed[1 : 1 + len(times)], needed[1 + len(times) :]
    with witness.checked(needs_dependencies, cotangent.device) as sums:
        initial, of_times = sweep(record.trajectory, record.field, sums, cotangent, any(needs_times))
        time_gradients: Sequence[Tensor | None] = [None] * len(times)
        if of_times is not None:
            with torch.enable_grad():
                leaves = [time.detach().requires_grad_() for time in times]
                solve_times = record.times_of(record.trajectory, *leaves)
            time_gradients = _grad(
                solve_times, leaves, [of_times.starts, of_times.sizes, of_times.outputs], create_graph=False
            )
    return [initial if needed[0] else None, *time_gradients, *sums.results()]


class _Gradient(torch.autograd.Function):
    """The gradient as a function that can be differentiated itself: by the graph of the whole solve, in its memory."""

    @staticmethod
    def forward(ctx: Any, arguments: Any, cotangent: Tensor, initial: Tensor, *inputs: Tensor) -> Any:
        record, witness, needed = arguments
        ctx.arguments = replace(record, trajectory=replace(record.trajectory, states=[], slopes=[])), witness
        times = inputs[: record.n_times]
        end = record.trajectory.states[-1] if record.trajectory.ends else initial
        ctx.save_for_backward(cotangent, initial, *times, end, *witness.saved)
        ctx.set_materialize_grads(False)
        return tuple(_gradient(record, witness, needed, cotangent, times))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "symplectic_adjoint: there are no third derivatives (create_graph=True on a gradient of a gradient): "
                "use the base method itself for those"
            )
        record, witness = ctx.arguments
        *unpacked, end = ctx.saved_tensors[: 3 + record.n_times]
        needed = [True] * len(record.field.dependencies)
        with witness.checked(needed, unpacked[0].device) as sums, torch.enable_grad():
            cotangent, initial, *times = (x.detach().requires_grad_() for x in unpacked)
            solve_times = record.times_of(record.trajectory, *times)
            with record.field.generators.kept():
                outputs, ended = replay(record.trajectory, record.field, sums, initial, solve_times)
            record.field.require_same(torch.linalg.vector_norm(ended.detach() - end) / torch.linalg.vector_norm(end))
            inputs = [initial, *times, *sums.inputs]
            first = _grad([outputs], inputs, [cotangent], create_graph=True)
            second = _grad(first, [cotangent, *inputs], directions, create_graph=False)
        return None, *second


def _grad(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], create_graph: bool
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad`, for outputs and cotangents that may be missing."""
    pairs = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    given = [output for output, _ in pairs], inputs, [cotangent for _, cotangent in pairs]
    return torch.autograd.grad(*given, allow_unused=True, create_graph=create_graph)


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
        with_loss: whether the vector field takes and returns the state flattened and with one element more: an
            integral that is added to whatever is differentiated.

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


def _once_differentiable(backward: Any) -> Any:
    """Have gradients that are differentiated again raise, whatever they are differentiated by.

    torch's own `once_differentiable` lets them pass for constants where the cotangent is one.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *cotangents: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *cotangents)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(
            None if g is None else _SecondDerivative.apply(g, g.new_zeros(()).requires_grad_()) for g in gradients
        )

    return wrapped


class _SecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "symplectic_adjoint: a gradient was differentiated again (create_graph=True), but there are first "
            "derivatives only here. Use the base method itself for second ones."
        )


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
        ctx.witness = Witness(record.field)
        # The end is the next step's start, and so costs nothing.
        ctx.save_for_backward(start, results[0], first_slope if record.keep_slope else None, *ctx.witness.saved)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, end: Tensor | None, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        record: _StepRecord = ctx.record
        start, reached, first_slope, *_ = ctx.saved_tensors
        _, _, _, needs_t, needs_h, _, *needs = ctx.needs_input_grad

        def flat(tensor: Tensor | None, last: float) -> Tensor | None:
            """The state and, if there is a loss, one element more."""
            if tensor is None or not record.with_loss:
                return tensor
            return torch.cat([tensor.reshape(-1), tensor.new_full((1,), last)])

        state = flat(start.detach().to(ctx.dtype), 0.0)
        cotangent = flat(torch.zeros_like(start, dtype=ctx.dtype) if end is None else end, 1.0)
        assert state is not None
        assert cotangent is not None
        states = [state] if record.with_loss else [state, reached.detach()]
        trajectory = replace(record.trajectory, states=states, slopes=[flat(first_slope, 0.0)])
        with ctx.witness.checked(needs, cotangent.device) as sums:
            of_state, of_slope, of_times = sweep_step(
                trajectory,
                record.field,
                sums,
                cotangent,
                {i: flat(slope, 0.0) for i, slope in zip(record.stages, slopes, strict=True)},
                needs_t or needs_h,
            )
            if record.with_loss and of_slope is not None:
                _add_loss_at_start(trajectory, record.field, sums, of_state, of_slope, of_times)
        both = [None, None] if of_times is None else [of_times.starts, of_times.sizes]
        if record.with_loss:
            of_state = of_state[:-1].view(start.shape)
            of_slope = None if of_slope is None else of_slope[:-1].view(start.shape)
        of_t, of_h = (
            None if time is None else time.to(dtype).reshape(shape)
            for time, (shape, dtype) in zip(both, ctx.times, strict=True)
        )
        return None, None, of_state.to(start.dtype), of_t, of_h, of_slope, *sums.results()


def _add_loss_at_start(
    trajectory: Trajectory,
    field: VectorField,
    sums: CotangentSums,
    of_state: Tensor,
    of_slope: Tensor,
    of_times: TimeCotangents | None,
) -> None:
    """Add, in place, what acts through the integrand at a step's start: handed on was the slope of the state alone."""
    step = trajectory.steps[0]
    cotangent = torch.zeros_like(of_slope)
    cotangent[-1] = of_slope[-1]
    time = trajectory.stage_times(step)[0]
    slope, product, tau = field.vjp(time, trajectory.states[0], {}, cotangent, sums, of_times is not None)
    if product is not None:
        of_state += product
    if of_times is not None:
        if trajectory.slopes[0] is not None:  # else it was evaluated again, with the integrand
            of_times.sizes.add_(slope[-1] * of_slope[-1] / step.h)
        if tau is not None:
            of_times.starts.add_(tau.sum())


def refuse_transforms() -> None:
    """Refuse derivatives that would pass a solve by.

    Raises:
        RuntimeError: inside a transform of torch.func, or in forward mode.
    """
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "symplectic_adjoint: a solve can't be differentiated in forward mode (torch.autograd.forward_ad) or by "
            "torch.func's transforms: use torch.autograd, or the base method itself"
        )


class Witness:
    """Sees to it that the backward pass finds the vector field as the forward pass left it.

    Args:
        field: the vector field, with its dependencies discovered.

    Attributes:
        saved: the dependencies that f has been seen to use, to be saved for the backward pass: autograd raises if they
            are changed in place.
    """

    def __init__(self, field: VectorField) -> None:
        field.settle()
        self.field = field
        used = len(field.dependencies) - field.spare
        self.saved = field.dependencies[:used]
        self._spare = field.dependencies[used:]
        self._addresses = [_address(tensor) for tensor in field.dependencies]
        self._versions = [tensor._version for tensor in self._spare]

    @contextlib.contextmanager
    def checked(self, needed: Sequence[bool], device: torch.device) -> Iterator[CotangentSums]:
        """The context of a sweep: autocast off, f as it was, random number generators left alone.

        Raises:
            RuntimeError: if a tensor that f depends on is not what it was.
        """
        field = self.field
        sums = CotangentSums(field, needed)
        draws = field.generators.kept() if field.draws else contextlib.nullcontext()
        with without_autocast(device), draws, field.restored():
            if self._addresses[: len(self.saved)] != [_address(tensor) for tensor in self.saved]:
                raise RuntimeError(_CHANGED.format("was given other memory (its .data was set, or it was moved)"))
            yield sums
        used = sums.used()[len(self.saved) :]
        for tensor, version, is_used in zip(self._spare, self._versions, used, strict=True):
            if is_used and tensor._version != version:
                raise RuntimeError(_CHANGED.format("was modified by an inplace operation"))


_CHANGED = (
    "symplectic_adjoint: a tensor that the vector field depends on {} between the forward and the backward pass, so "
    "the gradient can't be had. Call backward() before changing it."
)


def _address(tensor: Tensor) -> int:
    """Where a tensor's values are."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
