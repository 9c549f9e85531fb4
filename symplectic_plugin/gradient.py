"""The autograd functions: a recorded solve, or a step of one, on the way forward; the adjoint sweep on the way back."""

from __future__ import annotations

import contextlib
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
        _refuse_third_derivatives()
        record, witness = ctx.arguments
        *unpacked, end = ctx.saved_tensors[: 3 + record.n_times]
        needed = [True] * len(record.field.dependencies)
        with witness.checked(needed, unpacked[0].device) as sums, torch.enable_grad():
            cotangent, initial, *times = (x.detach().requires_grad_() for x in unpacked)
            solve_times = record.times_of(record.trajectory, *times)
            with record.field.generators.kept():
                outputs, ended, _ = replay(record.trajectory, record.field, sums, initial, solve_times)
            record.field.require_same(torch.linalg.vector_norm(ended.detach() - end) / torch.linalg.vector_norm(end))
            inputs = [initial, *times, *sums.inputs]
            first = _grad([outputs], inputs, [cotangent], create_graph=True)
            second = _grad(first, [cotangent, *inputs], directions, create_graph=False)
        return None, *second


def _grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad`, for outputs, inputs and cotangents that may be missing."""
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
        ctx.step = _Step(record, Witness(record.field), results[0].dtype, [(x.shape, x.dtype) for x in (t, h)])
        # The end is the next step's start, and so costs nothing.
        times = (time if time.requires_grad else None for time in (t, h))
        ctx.save_for_backward(
            start, *times, first_slope if record.keep_slope else None, results[0], *ctx.step.witness.saved
        )
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        step: _Step = ctx.step
        start, t, h, first_slope, reached, *_ = ctx.saved_tensors
        arguments = (step, ctx.needs_input_grad[2:], reached.detach())
        if torch.is_grad_enabled() and not step.record.with_loss:
            dependencies = step.record.field.dependencies
            return (
                None,
                None,
                *_StepGradient.apply(arguments, start, t, h, first_slope, len(cotangents), *cotangents, *dependencies),
            )
        with torch.no_grad():
            gradients = step.gradient(*arguments[1:], start, first_slope, cotangents)
        if torch.is_grad_enabled():
            gradients = [None if g is None else _OnceDifferentiable.apply(g, _leaf_like(g)) for g in gradients]
        return None, None, *gradients


@dataclass(frozen=True)
class _Step:
    """A step's record, its witness, the state's dtype at its end, and the shapes and dtypes of its time and size."""

    record: _StepRecord
    witness: Witness
    dtype: torch.dtype
    times: list[tuple[torch.Size, torch.dtype]]

    def gradient(
        self,
        needed: Sequence[bool],
        reached: Tensor,
        start: Tensor,
        first_slope: Tensor | None,
        cotangents: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The cotangents of the state, of time and size, of the slope handed on, and of the dependencies."""
        record = self.record
        _, needs_t, needs_h, _, *needs = needed
        end, *slopes = cotangents

        def flat(tensor: Tensor | None, last: float) -> Tensor | None:
            """The state and, if there is a loss, one element more."""
            if tensor is None or not record.with_loss:
                return tensor
            return torch.cat([tensor.reshape(-1), tensor.new_full((1,), last)])

        state = flat(start.detach().to(self.dtype), 0.0)
        cotangent = flat(torch.zeros_like(start, dtype=self.dtype) if end is None else end, 1.0)
        assert state is not None
        assert cotangent is not None
        states = [state] if record.with_loss else [state, reached]
        trajectory = replace(record.trajectory, states=states, slopes=[flat(first_slope, 0.0)])
        with self.witness.checked(needs, cotangent.device) as sums:
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
            None if time is None or not need else time.to(dtype).reshape(shape)
            for time, need, (shape, dtype) in zip(both, (needs_t, needs_h), self.times, strict=True)
        )
        return [of_state.to(start.dtype), of_t, of_h, of_slope, *sums.results()]


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
        step, needed, reached = arguments
        ctx.step = step
        cotangents = others[:n_cotangents]
        ctx.save_for_backward(reached, start, t, h, first_slope, *cotangents)
        ctx.set_materialize_grads(False)
        return tuple(step.gradient(needed, reached, start, first_slope, cotangents))

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_third_derivatives()
        record, field = ctx.step.record, ctx.step.record.field
        trajectory, (taken,) = record.trajectory, record.trajectory.steps
        reached, *saved = ctx.saved_tensors
        with ctx.step.witness.checked([True] * len(field.dependencies), reached.device) as sums, torch.enable_grad():
            start, t, h, slope, *cotangents = (None if x is None else _leaf(x) for x in saved)
            assert start is not None
            starts, sizes = (
                torch.tensor([value], dtype=torch.float64, device=reached.device)
                if x is None
                else x.reshape(1).double()
                for x, value in ((t, taken.t0), (h, taken.h))
            )
            times, time = Times(starts, sizes, starts[:0]), trajectory.stage_times(taken)[0]
            evaluated_again = taken.slope_handed_on and slope is None
            if evaluated_again:
                slope = _leaf(field(time, start, {}))
            _, ended, slopes = replay(trajectory, field, sums, start.to(ctx.step.dtype), times, slope)
            field.require_same(torch.linalg.vector_norm(ended.detach() - reached) / torch.linalg.vector_norm(reached))
            variables = [start, t, h, slope, *sums.inputs]
            first = _grad([ended, *(slopes[i] for i in record.stages)], variables, cotangents, create_graph=True)
            n = len(cotangents)
            second = _grad(first, [*cotangents, *variables], directions, create_graph=False)
            if evaluated_again and (of_slope := second[n + 3]) is not None:
                # The slope handed on is f at the step's start: what acts through it acts through that.
                moved = time + (starts - starts.detach()).to(time.dtype).reshape(time.shape)
                more = _grad([field.evaluate(moved, start, {}, sums)], variables, [of_slope], create_graph=False)
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


def _refuse_third_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "symplectic_adjoint: there are no third derivatives (create_graph=True on a gradient of a gradient): "
            "use the base method itself for those"
        )


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
