"""The checkpoint of one step: what is kept of it for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .budget import Budget
from .live_graph import LiveStep
from .method import Method, Step
from .stage_graphs import StageGraphs
from .storage import Storage


class Checkpoint:
    """The checkpoint of one step; its memory is charged to the solve's budget as long as it lasts.

    Args:
        budget: the solve's.
        step: the step.
        method: the method that took it.
        previous: checkpoint of the step that ends where this one starts, if taking that step again gives this start.
        end: state at the step's end. Given up when a step follows that keeps the state.

    Attributes:
        index: number of steps from one that has no `previous` to this one.
        state, slope: handles of the storage for the state at the step's start, and for the slope there if it was
            handed on and is kept. None if dropped.
        stages: states of the stages, the first left out; for an implicit method the slopes, see `ImplicitSolve`.
        graphs: the graphs of the evaluations, or the step of a live graph.
    """

    __slots__ = (
        "__weakref__", "_charged", "_is_counted", "budget", "end", "graphs", "index", "method", "previous", "slope",
        "stages", "state", "step",
    )  # fmt: skip

    def __init__(
        self, budget: Budget, step: Step, method: Method, previous: Checkpoint | None = None, end: Tensor | None = None
    ) -> None:
        self.budget = budget
        self.step = step
        self.method = method
        self.previous = previous
        self.end = end
        if previous is not None:
            previous.give_up_end()
        self.index: int = 0 if previous is None else previous.index + 1
        self.state: Any = None
        self.slope: Any = None
        self.stages: list[Tensor] | None = None
        self.graphs: StageGraphs | LiveStep | None = None
        self._charged = {"states": 0, "stages": 0, "graphs": 0}
        self._is_counted = False

    def put_state(self, storage: Storage, state: Tensor, slope: Tensor | None) -> None:
        """Keep the state at the step's start, and the slope there if it is given."""
        self.state = storage.put(state)
        self.slope = None if slope is None else storage.put(slope)
        self._count(there=True)
        if storage.on_device:
            self._charge("states", bytes_of(state) + (0 if slope is None else bytes_of(slope)))

    def put_handles(self, state: Any, slope: Any) -> None:
        """Set the storage's handles of state and slope, which somebody else holds, without charging for them."""
        self.state, self.slope = state, slope

    def put_stages(self, stages: list[Tensor]) -> None:
        """Keep the states of the stages."""
        self.stages = stages
        self._charge("stages", sum(map(bytes_of, stages)))

    def put_graphs(self, graphs: StageGraphs | LiveStep, size: int) -> None:
        """Keep graphs of this many bytes."""
        self.graphs = graphs
        self._charge("graphs", size)

    def begin_anew(self) -> None:
        """Forget the step before, whose graph is live: nothing is recomputed from there."""
        self.previous = None

    def give_up_end(self) -> None:
        """Forget the state at the step's end: a step follows that keeps it."""
        self.end = None

    def set_end(self, end: Tensor) -> None:
        """Keep the state at the step's end, where no step follows."""
        self.end = end

    def set_step(self, step: Step) -> None:
        """Replace the step, whose times were not known as numbers before."""
        self.step = step

    def drop_state(self) -> None:
        """Drop state and slope."""
        self.state = self.slope = None
        self._count(there=False)
        self._charge("states", 0)

    def drop_slope(self) -> None:
        """Drop the slope, which is as large as the state."""
        if self.slope is not None:
            self.slope = None
            self._charge("states", self._charged["states"] // 2)

    def drop_stages(self) -> None:
        """Drop the states of the stages."""
        self.stages = None
        self._charge("stages", 0)

    def drop_graphs(self) -> list[Tensor]:
        """Drop the graphs, and return the states of the stages that they hold, the first left out."""
        assert self.graphs is not None
        stages = [stage.detach() for stage in self.graphs.stages[1:]]
        self.graphs = None
        self._charge("graphs", 0)
        return stages

    def release(self) -> None:
        """Drop everything."""
        self.drop_state()
        self.stages = self.graphs = self.end = None
        self._charge("stages", 0)
        self._charge("graphs", 0)

    def __del__(self) -> None:
        self.budget.release(self._charged, states=1 if self._is_counted else 0)

    def _count(self, *, there: bool) -> None:
        if there is not self._is_counted:
            self._is_counted = there
            self.budget.count_states(1 if there else -1)

    def _charge(self, kind: str, size: int) -> None:
        if change := size - self._charged[kind]:
            self._charged[kind] = size
            self.budget.charge(kind, change)


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
