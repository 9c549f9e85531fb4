"""The checkpoints of a solve within its budget, and how dropped ones are recomputed: the memory dial.

A step can be kept as the state at its start; as the states of its stages too, so that they need not be evaluated again;
or as the graphs of its evaluations, so that nothing has to be. Per byte, stages save more work than graphs. Where there
are many stages, room for the graphs of one step does so too: each step is recomputed with its graphs when its turn
comes, which evaluates each stage once more and not twice. Where even the states of all steps are too much, some are
dropped, and recomputed by taking steps from the one before (schedules.py).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ..field.evaluation import Evaluation
from ..field.vector_field import VectorField
from .budget import FEWEST_STATES, Budget, Demand
from .checkpoint import Checkpoint
from .defaults import DEFAULTS
from .live_graph import LiveStep
from .schedules import positions, reversed_states
from .storage import DeviceMemory, Storage

POLICIES = ("auto", "stages", "steps", "binomial")

StateAndSlope = tuple[Tensor, Tensor | None]

Advance = Callable[[Checkpoint, Tensor, Tensor | None], StateAndSlope]
"""Takes a step again, without graphs: from the state and, where it was handed on, the slope at its start to those at
its end."""


class CheckpointStore:
    """The checkpoints of one solve.

    Args:
        policy: one of `POLICIES`, by default that of `Defaults`.
        limit: of the memory, in bytes, see `Budget`.
        storage: where states are put.

    Attributes:
        budget: the solve's.
        keeps_slope: whether a slope that is handed on is kept with the state at its step's start.

    Raises:
        ValueError: if there is no such policy, or the limit is no positive number of bytes.
    """

    def __init__(self, policy: str | None = None, limit: float | None = None, storage: Storage | None = None) -> None:
        policy = DEFAULTS.checkpoint if policy is None else policy
        if policy not in POLICIES:
            raise ValueError(
                f"symplectic_adjoint: checkpoint must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}"
            )
        self.policy = policy
        self.storage = storage or DeviceMemory()
        self.budget = Budget(policy, limit, on_device=self.storage.on_device)
        self.keeps_slope = True
        self._states_alone = policy == "steps"
        self._evaluations_again = 0
        self._reserves = self._slopes_are_spare = False
        self._spacing = 1
        self._positions: set[int] | None = None
        self._checkpoints: list[weakref.ref[Checkpoint]] = []
        self._with_graphs: deque[weakref.ref[Checkpoint]] = deque()
        self._with_stages: deque[weakref.ref[Checkpoint]] = deque()
        self._reversal: tuple[list[Checkpoint], Iterator[StateAndSlope]] | None = None
        self._last: tuple[weakref.ref[Checkpoint], Tensor] | None = None

    def keep_states_alone(self) -> None:
        """Keep the states of steps alone, on the device: hooks of the user's take them over."""
        self._states_alone = True
        self.storage = DeviceMemory()
        self.budget.on_device = True

    def measure(self, field: VectorField, evaluation: Evaluation, demand: Demand) -> None:
        """Plan from the first evaluation of f what is kept.

        Args:
            field: f, with its dependencies discovered.
            evaluation: the first one.
            demand: what is known of the solve.

        Raises:
            ValueError: if the budget is too small.
        """
        self.keeps_slope = demand.keeps_slope
        self.budget.measure(field, evaluation, demand)
        self._plan_recomputed_graphs(demand)
        if demand.steps is None or self.budget.state == 0:
            return
        if self.policy == "binomial" or (self.budget.limit is not None and self.policy == "auto"):
            snapshots = self._snapshots()
            if demand.steps > snapshots:
                self._positions = positions(demand.steps, snapshots)

    def _plan_recomputed_graphs(self, demand: Demand) -> None:
        """Plan to recompute steps with their graphs, if one step's graphs are less than the states of all stages."""
        if self.policy != "auto" or self._states_alone or demand.evaluations == 0:
            return
        budget, steps, size = self.budget, demand.steps, demand.state.numel() * demand.state.element_size()
        more, room = (demand.evaluations - 1) * budget.largest, budget.room()
        fits = steps is not None and more + steps * size <= budget.room(steps * size)
        if steps is not None and more > steps * (demand.stages - 1) * size:
            return
        if not fits and (more > room / 3 or more + budget.least_states(steps) * budget.state > room):
            return
        self._evaluations_again = demand.evaluations
        if steps is not None and not fits:  # then there are snapshots, whose number is planned
            self._reserve()
        if demand.evaluations < demand.stages and not self.keeps_slope:
            # The first slope, that of the step before, is kept rather than evaluated again.
            self.keeps_slope = self._slopes_are_spare = True
            budget.add_slopes(1)

    def _reserve(self) -> None:
        self._reserves = True
        self.budget.reserve_recomputed_graphs(self._evaluations_again)

    @property
    def recomputes_graphs(self) -> bool:
        """Return whether steps of which states alone are kept are recomputed with their graphs."""
        return self._evaluations_again > 0

    @property
    def keeps_graphs(self) -> bool:
        """Return whether graphs are kept where there is room."""
        return self.policy == "auto" and not self._states_alone and not self._drops_states

    @property
    def keeps_stages(self) -> bool:
        """Return whether the states of stages are kept where there is room."""
        return self.policy in ("auto", "stages") and not (
            self._states_alone or self._drops_states or self.recomputes_graphs
        )

    @property
    def may_be_live(self) -> bool:
        """Return whether a live graph may be kept where there is room."""
        return DEFAULTS.live_graphs and self.keeps_graphs and self.storage.on_device

    @property
    def _drops_states(self) -> bool:
        return self.policy == "binomial" or self._spacing > 1 or self._positions is not None

    def has_room_for(self, field: VectorField, evaluation: Evaluation, nodes: list[int]) -> bool:
        """Return whether graphs in the making can be kept, even if the latest evaluation is larger than those before.

        Args:
            field: the vector field.
            evaluation: the latest one.
            nodes: numbers of nodes of all evaluations in the making, the latest one's last.
        """
        if evaluation.nodes in self.budget.sizes:
            return True
        self.budget.measure_again(field, evaluation)
        return self.budget.used + self.budget.size_of(nodes) <= self.budget.room()

    def add(self, checkpoint: Checkpoint, state: Tensor, slope: Tensor | None) -> None:
        """Add a step's checkpoint, which has its stages or graphs already, and drop what there is no room for.

        Args:
            checkpoint: the checkpoint.
            state: state at the step's start.
            slope: slope there, if it has to be kept.

        Raises:
            ValueError: if there is no room, and nothing that may be dropped.
        """
        self.budget.add_working(checkpoint.step.draws_bytes)
        if checkpoint.previous is None or self._takes(checkpoint.index):
            checkpoint.put_state(self.storage, state, slope)
        me = weakref.ref(checkpoint)
        self._checkpoints.append(me)
        if checkpoint.graphs is not None:
            self._with_graphs.append(me)
        elif checkpoint.stages is not None:
            self._with_stages.append(me)
        else:
            self._reserve()
        self.make_room()

    def make_room(self) -> None:
        """Drop what there is no room for.

        Raises:
            ValueError: if there is no room, and nothing that may be dropped.
        """
        while self.budget.is_exceeded:
            self._drop()

    def recall(self, checkpoint: Checkpoint, advance: Advance) -> StateAndSlope:
        """Return the state at a step's start, and the slope if it is needed. In the reverse order of the steps."""
        state, slope = self._recalled(checkpoint, advance)
        # Weakly and without a history: both may lead back here.
        self._last = None if checkpoint.previous is None else (weakref.ref(checkpoint.previous), state.detach())
        return state, slope

    @property
    def is_recalling(self) -> bool:
        """Return whether a reversal is in progress: dropped states will be recalled from it."""
        return self._reversal is not None

    def end_recall(self) -> None:
        """Drop the reversal in progress, which refers to the caller of `recall` and would keep it alive."""
        self._reversal = None

    def end_of(self, checkpoint: Checkpoint) -> Tensor | None:
        """Return the state at a step's end, if it is kept or was recalled last."""
        if checkpoint.end is not None:
            return checkpoint.end
        if self._last is not None and self._last[0]() is checkpoint:
            return self._last[1]
        return None

    def turn_graphs_into_states(self) -> None:
        """Keep the states of stages, where there is room, instead of all graphs so far."""
        while (checkpoint := _oldest(self._with_graphs)) is not None:
            self._turn_into_states(checkpoint)
        self.make_room()

    def kept(self) -> str:
        """Return in words what is kept."""
        live = [checkpoint for ref in self._checkpoints if (checkpoint := ref()) is not None]
        if not live:
            return "nothing"
        graphs = sum(checkpoint.graphs is not None for checkpoint in live)
        stages = sum(checkpoint.stages is not None for checkpoint in live)
        states = sum(checkpoint.state is not None for checkpoint in live)
        parts = [f"states of {states}"]
        parts += [f"stages of {stages}"] if stages else []
        parts += [f"graphs of {graphs}"] if graphs else []
        return f"{', '.join(parts)} of {len(live)} steps"

    def _recalled(self, checkpoint: Checkpoint, advance: Advance) -> StateAndSlope:
        if checkpoint.state is not None:
            slope = None if checkpoint.slope is None else self.storage.get(checkpoint.slope)
            return self.storage.get(checkpoint.state), slope
        if self._reversal is None or not self._reversal[0] or self._reversal[0][-1] is not checkpoint:
            self._reversal = self._reversed(checkpoint, advance)
        segment, states = self._reversal
        segment.pop()
        if not segment:
            self._reversal = None
        return next(states)

    def _reversed(self, checkpoint: Checkpoint, advance: Advance) -> tuple[list[Checkpoint], Iterator[StateAndSlope]]:
        segment = [checkpoint]
        while segment[-1].state is None:
            previous = segment[-1].previous
            if previous is None:
                raise RuntimeError("symplectic_adjoint: what is needed for the backward pass has been freed")
            segment.append(previous)
        segment.reverse()
        stretch = list(segment)
        states = reversed_states(
            self._recalled(segment[0], advance),
            len(stretch),
            self._snapshots() - self.budget.states + 1,
            lambda n, pair: advance(stretch[n], *pair),
            self._put,
            lambda pair: tuple(None if x is None else self.storage.get(x) for x in pair),
        )
        return segment, states

    def _put(self, pair: StateAndSlope) -> tuple[Any, Any]:
        """Put a state into storage, with the slope only where it can't be evaluated again."""
        state, slope = pair
        return self.storage.put(state), self.storage.put(slope) if slope is not None and self.keeps_slope else None

    def _snapshots(self) -> int:
        if self.budget.limit is None or not self.budget.state:
            return DEFAULTS.snapshots
        return max(FEWEST_STATES, int(self.budget.room() // self.budget.state))

    def _takes(self, index: int) -> bool:
        """Return whether the state of a step with this index is kept."""
        if self._positions is not None:
            return index in self._positions
        if self.policy == "binomial" and self.budget.states >= self._snapshots():
            self._thin()
        return index % self._spacing == 0

    def _drop(self) -> None:
        """Make room."""
        if (checkpoint := _oldest(self._with_graphs)) is not None:
            is_live = isinstance(checkpoint.graphs, LiveStep)
            self._turn_into_states(checkpoint)
            while is_live and (checkpoint := _oldest_live(self._with_graphs)) is not None:
                self._turn_into_states(checkpoint)  # a step of the live graph alone would free nothing
        elif self.policy != "stages" and (checkpoint := _oldest(self._with_stages)) is not None:
            checkpoint.drop_stages()
        elif self._slopes_are_spare:
            self._drop_slopes()
        elif self.policy in ("auto", "binomial") and self.budget.states > FEWEST_STATES and self._thin():
            pass
        elif self.recomputes_graphs:
            self._evaluations_again = 0
            self.budget.reserve_recomputed_graphs(0)
        else:
            self.budget.refuse(self.budget.working + self.budget.used)

    def _turn_into_states(self, checkpoint: Checkpoint) -> None:
        stages = checkpoint.drop_graphs()
        self._reserve()
        if self.keeps_stages and checkpoint.step.draws is None:
            checkpoint.put_stages(stages)
            self._with_stages.append(weakref.ref(checkpoint))

    def _thin(self) -> bool:
        """Drop every other state that can be recomputed; return whether there was one."""
        dropped = False
        self._checkpoints = [ref for ref in self._checkpoints if ref() is not None]
        while not dropped and self._spacing < 2 * len(self._checkpoints):
            self._spacing *= 2
            for ref in self._checkpoints:
                checkpoint = ref()
                if checkpoint is None or checkpoint.state is None or checkpoint.previous is None:
                    continue
                if checkpoint.index % self._spacing:
                    checkpoint.drop_state()
                    dropped = True
        return dropped

    def _drop_slopes(self) -> None:
        """Drop the slopes that can be evaluated again."""
        self._slopes_are_spare = self.keeps_slope = False
        self.budget.add_slopes(-1)
        for ref in self._checkpoints:
            if (checkpoint := ref()) is not None:
                checkpoint.drop_slope()


def _oldest_live(refs: deque[weakref.ref[Checkpoint]]) -> Checkpoint | None:
    while refs:
        checkpoint = refs[0]()
        if checkpoint is not None and not isinstance(checkpoint.graphs, LiveStep):
            return None
        refs.popleft()
        if checkpoint is not None:
            return checkpoint
    return None


def _oldest(refs: deque[weakref.ref[Checkpoint]]) -> Checkpoint | None:
    while refs:
        checkpoint = refs.popleft()()
        if checkpoint is not None and (checkpoint.graphs is not None or checkpoint.stages is not None):
            return checkpoint
    return None
