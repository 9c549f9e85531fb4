"""The record of a forward pass: the method, a checkpoint for each accepted step, the places of the outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .checkpoint import Checkpoint
from .method import Method
from .store import CheckpointStore


@dataclass
class Trajectory:
    """A recorded solve, or one step of a solve whose host loops over steps by itself.

    Args:
        method: the method.
        store: keeps the checkpoints within the budget.
        checkpoints: one for each accepted step, in order.
        outputs: for each output but the initial state, the number of the step that it lies in and its place theta
            there, in order; step -1 for an event that is met at once.
    """

    method: Method
    store: CheckpointStore
    checkpoints: list[Checkpoint] = field(default_factory=list)
    outputs: list[tuple[int, float]] = field(default_factory=list)

    def place_outputs(self, outputs: list[tuple[int, float]]) -> None:
        """Set the places of the outputs."""
        self.outputs = outputs

    @property
    def end(self) -> Tensor | None:
        """State at the end of the last step, if it is known."""
        return self.store.end_of(self.checkpoints[-1]) if self.checkpoints else None

    def ends(self) -> list[bool]:
        """Return for each output but the initial state whether it is the state at a step's end and no more."""
        at_end = self.method.dense.is_end(self.method.tableau.b)
        return [at_end and theta == 1 for _, theta in self.outputs]
