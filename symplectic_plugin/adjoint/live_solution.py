"""The solution of a solve with a live graph: its outputs joined, and watched over by the plugin."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..field._torch_compat import at_end_of_backward
from ..field.autocast import without_autocast
from ..field.graphs import mark_as_solve
from ..field.report import SolveReport
from ..field.vector_field import VectorField
from ..field.witness import Addresses
from ..record.live_graph import LiveStep
from ..record.method import Method
from ..record.trajectory import Trajectory
from .function import Inputs, attach


def live_solution(
    solution: Tensor, trajectory: Trajectory, steps: Sequence[LiveStep], field: VectorField, inputs: Inputs
) -> Tensor:
    """Give a solution its graph, where the first steps of the solve, or all, are a live graph.

    Args:
        solution: the outputs, shape (M + 1, *state), without a graph.
        trajectory: the solve.
        steps: the steps of the live graph, at least one.
        field: the vector field.
        inputs: what else the solve depends on.

    Returns:
        The same values with their graph.
    """
    if not any(tensor.requires_grad for tensor in (inputs.initial, *field.dependencies)):
        return solution
    live = len(steps)
    inside = sum(n < live for n, _ in trajectory.outputs)
    result = _joined(solution[: inside + 1], trajectory, steps)
    watch = LiveWatch(field.report, field.used, steps[0].origin)
    watch.add(sum(len(step.nodes) for step in steps))
    if live == len(trajectory.checkpoints):
        if result.requires_grad:
            mark_as_solve(result)
            watch.check_before(result)
        return result
    # The other steps are swept over, from where the live graph ends.
    places = [(n - live, theta) for n, theta in trajectory.outputs[inside:]]
    rest = Trajectory(trajectory.method, trajectory.store, trajectory.checkpoints[live:], places)
    rest.checkpoints[0].begin_anew()
    last = steps[-1]
    slope = last.slopes[-1] if rest.checkpoints[0].step.slope_handed_on else None
    start = Inputs(last.end, inputs.times, inputs.times_of, slope)
    swept = attach(torch.cat([last.end.detach().unsqueeze(0), solution[inside + 1 :]]), rest, field, start)
    return torch.cat([result, swept[1:]])


def _joined(solution: Tensor, trajectory: Trajectory, steps: Sequence[LiveStep]) -> Tensor:
    """Join the outputs, shape (M + 1, *state), with their graph."""
    origin, places, ends = steps[0].origin, trajectory.outputs[: len(solution) - 1], trajectory.ends()
    with torch.enable_grad(), without_autocast(origin.device):
        if all(ends):
            result = torch.stack([origin, *(steps[n].end for n, _ in places)])
            result.data.copy_(solution)  # as the host rounds it; no node has saved the result
            return result
        outputs = [origin.unsqueeze(0)]
        for (n, is_end), group in itertools.groupby(range(len(places)), lambda m: (places[m][0], ends[m])):
            thetas = [places[m][1] for m in group]
            if is_end or n < 0:  # step -1 is that of an event which is met at once
                outputs += [(steps[n].end if is_end else origin).unsqueeze(0)] * len(thetas)
            else:
                outputs.append(_inside(steps[n], trajectory.method, torch.tensor(thetas, dtype=torch.float64)))
        result = torch.cat(outputs)
    result.data.copy_(solution)  # as the host rounds it; no node has saved the result
    return result


def _inside(step: LiveStep, method: Method, thetas: Tensor) -> Tensor:
    """Interpolate at places theta in a step, shape (m,): shape (m, *state)."""
    origin = step.origin
    if method.dense.linear:
        return origin + thetas.to(origin).view(-1, *[1] * origin.ndim) * (step.end - origin)
    weights = method.dense.weights(thetas)
    slopes = torch.stack([slope.reshape(-1) for slope in step.slopes]).to(origin.dtype)
    inside = torch.addmm(origin.reshape(1, -1), (weights * step.h).to(slopes), slopes)
    return inside.view(len(weights), *origin.shape)


class LiveWatch:
    """Watches the backward passes through a live graph: where f's tensors are, how many products there are, the time.

    Args:
        report: the solve's.
        tensors: tensors that f was seen to use.
        origin: state at the start of the solve, with a node of its own, where its history begins.
    """

    def __init__(self, report: SolveReport, tensors: Sequence[Tensor], origin: Tensor) -> None:
        self.report = report
        self.vjps = 0
        self._addresses = Addresses(tensors)
        self._began: float | None = None
        if report.is_seen and origin.grad_fn is not None:
            origin.grad_fn.register_hook(self._end)

    def check_before(self, value: Tensor) -> None:
        """Have each backward pass through the node of a value begin with a check of where f's tensors are.

        A node that Python has seen is freed recursively, so this is for one value of a solve.
        """
        if value.grad_fn is not None:
            value.grad_fn.register_prehook(self._check)

    def add(self, evaluations: int) -> None:
        """Add evaluations to those that a backward pass goes through."""
        self.vjps += evaluations

    def begin_at(self, end: Tensor) -> Tensor:
        """Return the state at the end of a step such that a backward pass through it begins to be timed."""
        return _Begin.apply(self, end) if self.report.is_seen else end

    def begin(self) -> None:
        """Begin to time a backward pass, if none is being timed."""
        if self.report.is_seen and self._began is None:
            self._began = time.perf_counter()
            # The graph's first node is not reached where the initial state needs no gradient.
            at_end_of_backward(self._end)

    def _check(self, _: Sequence[Tensor]) -> None:
        self._addresses.require_same()
        self.report.vjps += self.vjps
        self.begin()

    def _end(self, *_: Any) -> None:
        if self._began is not None:
            self.report.backward_seconds += time.perf_counter() - self._began
        self._began = None


class _Begin(torch.autograd.Function):
    """The identity, whose backward pass begins to be timed. Unlike a hook, it leaves autograd's nodes unseen."""

    @staticmethod
    def forward(ctx: Any, watch: LiveWatch, x: Tensor) -> Tensor:
        ctx.watch = watch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        ctx.watch.begin()
        return None, gradient
