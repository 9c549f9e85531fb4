"""A solve whose steps' graphs were all kept, going on from each other: its outputs as functions of the initial state.

That is backpropagation: there is nothing between it and autograd, neither the adjoint sweep nor what that relies on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..field.autocast import without_autocast
from ..field.graphs import mark_as_solve
from ..field.report import SolveReport
from ..field.vector_field import VectorField
from ..field.witness import Addresses
from ..record.checkpoints import Lent
from ..record.step_graph import StepGraph
from ..record.trajectory import DenseOutput, Trajectory


def with_graph(solution: Tensor, trajectory: Trajectory, field: VectorField) -> Tensor:
    """A solution with the graph of its steps.

    Args:
        solution: the outputs, shape (M + 1, *state), without a graph.
        trajectory: the solve that they are of, one step at least, each step's graph going on from the one before.
        field: its vector field, with its dependencies discovered.

    Returns:
        The same values, with their graph.
    """
    graphs = [kept.graph for kept in trajectory.kept if isinstance(kept.graph, StepGraph)]
    origin: Any = graphs[0].origin
    places, ends = trajectory.outputs, trajectory.ends()
    with torch.enable_grad(), without_autocast(field.device):
        outputs = [origin.unsqueeze(0)]
        for (n, is_end), group in itertools.groupby(range(len(places)), lambda m: (places[m][0], ends[m])):
            thetas = [places[m][1] for m in group]
            if is_end or n < 0:  # or an event that is met at once
                outputs += [(graphs[n].end if is_end else origin).unsqueeze(0)] * len(thetas)
            else:
                outputs.append(_inside(graphs[n], trajectory.dense, torch.tensor(thetas, dtype=torch.float64)))
        result = torch.cat(outputs)
    result.data.copy_(solution)  # as the host rounds it; no node has saved it
    watch(result, origin, field.report, sum(graph.evaluations for graph in graphs), Addresses(field.used))
    return result


def _inside(graph: StepGraph, dense: DenseOutput, thetas: Tensor) -> Tensor:
    """The outputs at these places in a step, shape (m,): shape (m, *state)."""
    origin = graph.origin
    if dense.linear:
        return origin + thetas.to(origin).view(-1, *[1] * origin.ndim) * (graph.end - origin)
    weights = dense.weights(thetas)
    slopes = torch.stack([slope.reshape(-1) for slope in graph.slopes]).to(origin.dtype)
    inside = torch.addmm(origin.reshape(1, -1), (weights * graph.h).to(slopes), slopes)
    return inside.view(len(weights), *origin.shape)


def watch(
    result: Tensor, origin: Tensor, report: SolveReport, vjps: int, addresses: Addresses, lent: Lent | None = None
) -> None:
    """Have a backward pass from a result to an origin begin with a check of where f's tensors are, and reported on.

    Args:
        result: of a solve or a step.
        origin: the state at its start.
        report: the solve's.
        vjps: how many of f there are in between.
        addresses: of what f depends on.
        lent: the memory that the graph keeps.
    """
    mark_as_solve(result)
    watching, last, first = _Watch(report, vjps, addresses, lent), result.grad_fn, origin.grad_fn
    last.register_prehook(watching.begin)  # type: ignore[union-attr]
    if report.is_seen and first is not None:
        first.register_hook(watching.end)


class _Watch:
    """What is held for that by the graph."""

    def __init__(self, report: SolveReport, vjps: int, addresses: Addresses, lent: Lent | None) -> None:
        self.report = report
        self.addresses = addresses
        self.vjps = vjps
        self.lent = lent
        self.began: float | None = None

    def begin(self, _: Sequence[Tensor]) -> None:
        self.addresses.require_same()
        self.report.vjps += self.vjps
        if self.report.is_seen:
            self.began = time.perf_counter()
            # The graph's first node is not reached where the initial state needs no gradient.
            torch.autograd.Variable._execution_engine.queue_callback(self.end)

    def end(self, *_: Any) -> None:
        if self.began is not None:
            self.report.backward_seconds += time.perf_counter() - self.began
        self.began = None
