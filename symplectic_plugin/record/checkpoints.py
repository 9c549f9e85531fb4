"""What is kept of a solve for its backward pass, and how the rest is got back: the memory dial.

A step can be kept as the state at its start; as the states of its stages too, so that they need not be evaluated
again; or as the graphs of their evaluations, so that nothing has to be. Per byte, stages save more work than graphs.
Where there are many of them, room for the graph of one step does so too: each step is taken again with it when its
turn comes, which evaluates each stage once more, and not twice. Where even the states of all steps are too much, some
are dropped and had again by taking steps from the one before (binomial.py).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from ..field.cotangents import wide
from ..field.evaluation import Evaluation, Kind
from ..field.vector_field import VectorField
from .defaults import DEFAULTS
from .kept import Graph, Kept
from .schedules import positions, reversed_states
from .step_graph import StepGraph
from .storage import DeviceMemory, Storage

POLICIES = ("auto", "stages", "steps", "binomial")

_FEWEST = 3
"""With fewer states than this, the time grows beyond measure."""

Advance = Callable[["Kept", Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""Takes a step again, without graphs: from the state and, where it was handed on, the slope at its start to those at
its end."""


class Lent:
    """Bytes that somebody keeps as long as this: see `Checkpoints.lend`."""

    __slots__ = ("_checkpoints", "_size")

    def __init__(self, checkpoints: weakref.ref[Checkpoints], size: int) -> None:
        self._checkpoints = checkpoints
        self._size = size

    def __del__(self) -> None:
        if (checkpoints := self._checkpoints()) is not None:
            checkpoints.give_back(self._size)


class Checkpoints:
    """What is kept of the steps of one solve, within a budget.

    Args:
        policy: one of `POLICIES`, by default the first.
        budget: in bytes, for the solve and its backward pass together. By default the larger of `Defaults.budget` and
            twice the least that "steps" needs, for "auto"; without limit for the others.
        storage: where states are put.

    Attributes:
        used: bytes of what is kept on the device.
        keeps_slope: whether a slope that is handed on is kept with the state at its step's start.
        most_states, most_graphs: the most bytes that states (of steps and stages) and graphs took.

    Raises:
        ValueError: if there is no such policy, or the budget is no positive number of bytes.
    """

    def __init__(self, policy: str | None = None, budget: int | None = None, storage: Storage | None = None) -> None:
        policy = DEFAULTS.checkpoint if policy is None else policy
        if policy not in POLICIES:
            raise ValueError(
                f"symplectic_adjoint: checkpoint must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}"
            )
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0):
            raise ValueError(f"symplectic_adjoint: memory_budget must be a positive number of bytes, got {budget!r}")
        self.policy = policy
        self.storage = storage or DeviceMemory()
        self._me = weakref.ref(self)
        self.used = self.most_states = self.most_graphs = 0
        self.working = self.evaluation = self._state = self._outputs = 0
        self._sizes: dict[Kind, int] = {}
        self._largest = 0
        self._states_alone = policy == "steps"
        self._budget = budget
        self._graph_bytes = self._state_bytes = self._lent = 0
        self._states = 0
        self.keeps_slope = True
        self._evaluations_again = 0
        self._makes_again = self._slopes_are_spare = False
        self._spacing = 1
        self._positions: set[int] | None = None
        self._kept: list[weakref.ref[Kept]] = []
        self._with_graphs: deque[weakref.ref[Kept]] = deque()
        self._with_stages: deque[weakref.ref[Kept]] = deque()
        self._reversal: tuple[list[Kept], Iterator[Any]] | None = None
        self._last: tuple[weakref.ref[Kept], Tensor] | None = None

    def only_states(self) -> None:
        """Keep the states of steps alone, on the device: somebody's hooks are to have them."""
        self._states_alone = True
        self.storage = DeviceMemory()

    def measure(
        self,
        field: VectorField,
        evaluation: Evaluation,
        state: Tensor,
        stages: int,
        keeps_slope: bool,
        outputs: int,
        steps: int | None = None,
        solving: int = 0,
        evaluations: int = 0,
    ) -> None:
        """Find out from the first evaluation of f what a solve needs.

        Args:
            field: f, with its dependencies discovered.
            evaluation: the first one.
            state: the initial state.
            stages: how many a step has.
            keeps_slope: whether a slope is kept with each state.
            outputs: how many output times there are.
            steps: how many steps there will be, if that is known.
            solving: the bytes that solving for the stages of a step takes, if they have to be.
            evaluations: how many a step makes, if its graph could be made again.

        Raises:
            ValueError: if the budget is too small.
        """
        self.keeps_slope = keeps_slope
        size, sizes = _bytes(state), field.memory_of(evaluation)
        gradients = sum(x.numel() * max(4, x.element_size()) for x in field.dependencies)
        # Beside a graph: what its backward pass makes; the sums of gradients, and those to be added; the slopes of a
        # step, and what the host makes of them; the outputs and their cotangents.
        self.working = sum(sizes) + 2 * max(sizes, default=0) + 2 * gradients + (3 * stages + 12 + 2 * outputs) * size
        # Through a graph with branches, such as one of derivatives, it has more in hand than what comes and goes at one
        # node.
        if self._budget is not None or sum(sizes) > DEFAULTS.budget // 64:
            cotangents = field.cotangents_of(evaluation)
            self.working += cotangents if cotangents > 2.1 * max(sizes, default=0) else 0
        self.working += solving + (10 * size if wide(state.dtype) != state.dtype else 0)  # the adjoint is wide
        self.evaluation = sum(sizes) + size
        self._outputs = outputs * size
        self._sizes[evaluation.kind] = self._largest = self.evaluation
        self._state = size * (2 if keeps_slope else 1) if self.storage.on_device else 0
        field.report.evaluation_bytes = sum(sizes)
        least = self._least(steps) * self._state
        if field.draws:  # for each step, whatever is dropped, as `add` has it
            least += (steps or _FEWEST) * sum(state.numel() for state in field.generators.states())
        if self._budget is not None and self._room() < least:
            self._refuse(self.working + least)
        self._plan_graphs_again(evaluations, size, stages, steps)
        if steps is None or self._state == 0:
            return
        if self.policy == "binomial" or (self._budget is not None and self.policy == "auto"):
            snapshots = self._snapshots()
            if steps > snapshots:
                self._positions = positions(steps, snapshots)

    def _plan_graphs_again(self, evaluations: int, size: int, stages: int, steps: int | None) -> None:
        """Plan to make the graphs of steps again, one at a time, if the graph of a whole step is less than stages.

        Args:
            evaluations: how many a step makes.
            size: of a state.
            stages, steps: as for `measure`.
        """
        if self.policy != "auto" or self._states_alone or evaluations == 0:
            return
        more, room = (evaluations - 1) * self._largest, self._room()
        fits = steps is not None and more + steps * size <= self._room(steps * size)
        if steps is not None and more > steps * (stages - 1) * size:
            return
        if not fits and (more > room / 3 or more + self._least(steps) * self._state > room):
            return
        self._evaluations_again = evaluations
        self._makes_again = steps is not None and not fits  # then there are snapshots, whose number is planned
        if evaluations < stages and not self.keeps_slope:
            # The first slope, that of the step before, is kept rather than evaluated again.
            self.keeps_slope = self._slopes_are_spare = True
            self._state *= 2

    @property
    def makes_graphs_again(self) -> bool:
        """Whether the graphs of steps are to be made again, where they were not kept."""
        return self._evaluations_again > 0

    def size_of(self, graph: Graph) -> int:
        """The bytes that a step's graph keeps, where evaluations of a kind are taken to be as large."""
        return sum(self._sizes[kind] for kind in graph.kinds)

    def has_room_for(self, graph: Graph) -> bool:
        """Whether a graph in the making can be kept, even if its latest evaluation is larger than those before."""
        if not graph.kinds or graph.kinds[-1] in self._sizes:
            return True
        working, latest = self.working, graph.latest
        self.bytes_of(graph.field, latest)
        if self.used + self.size_of(graph) <= self._room():
            return True
        if latest.at_once:  # it is the program that keeps more, not f that has grown
            self.working = working
        return False

    def bytes_of(self, field: VectorField, evaluation: Evaluation) -> int:
        """The bytes that an evaluation keeps with its graph, as for `size_of`."""
        kind = evaluation.kind
        if kind not in self._sizes:
            self._sizes[kind] = sum(field.memory_of(evaluation)) + self._state
            others = sum(map(_bytes, evaluation.others))  # which are counted apart, as the slopes of a step
            each = -(-(self._sizes[kind] - others) // max(1, evaluation.at_once))
            # Beside it there will be what its backward pass makes.
            self.working += 3 * max(0, each - self._largest)
            self._largest = max(self._largest, each)
        return self._sizes[kind]

    def may_go_on(self, graph: StepGraph) -> bool:
        """Whether another step's graph may go on from one: they can only be dropped together."""
        return graph.size <= self._room() / 4

    def may_join(self) -> bool:
        """Whether there is room for the outputs once more, as they are joined with their graphs."""
        return self.used + self._outputs <= self._room()

    def may_lend(self, evaluations: int) -> bool:
        """Whether there is room for the graph of a step that can't be dropped any more once it is there.

        Args:
            evaluations: how many a step makes.
        """
        if not DEFAULTS.live_graphs:
            return False
        if self.policy != "auto" or self._states_alone or self._is_binomial() or not self.storage.on_device:
            return False
        # The other half is for what follows, however much that is.
        return self._lent + evaluations * self._largest + self._state <= self._room() / 2

    def lend(self, size: int) -> Lent:
        """Count bytes that somebody else keeps, as long as what is returned is kept."""
        self.used += size
        self._graph_bytes += size
        self._lent += size
        self.most_graphs = max(self.most_graphs, self._graph_bytes)
        while self.used > self._room():
            self._drop()
        return Lent(self._me, size)

    def give_back(self, size: int) -> None:
        """Count bytes no longer that were lent."""
        self.used -= size
        self._graph_bytes -= size
        self._lent -= size

    def wants_graphs(self, evaluations: int, remaining: int = 0) -> bool:
        """Whether there is room for the graphs of the step to come and of those that will follow it.

        Args:
            evaluations: how many a step makes.
            remaining: how many steps follow, as far as that is known.
        """
        if self.policy != "auto" or self._states_alone or self._is_binomial():
            return False
        each = evaluations * self._largest + self._state
        return self.used + (remaining + 1) * each <= self._room((remaining + 1) * self._state)

    def wants_stages(self) -> bool:
        """Whether the states of stages are to be kept as far as there is room."""
        if self._states_alone or self._is_binomial() or self.makes_graphs_again:
            return False
        return self.policy in ("auto", "stages")

    def add(self, kept: Kept, graph_size: int = 0, lasting: int = 0) -> None:
        """Keep a step, and drop what there is no room for.

        Args:
            kept: the step.
            graph_size: the bytes of its graph.
            lasting: bytes that are held for it whatever is dropped: the states of random number generators.

        Raises:
            ValueError: if there is no room, and nothing that may be dropped.
        """
        kept._checkpoints = self._me
        self.working += lasting
        state, slope = kept.state, kept.slope
        if kept.previous is not None and not self._takes(kept.index):
            kept.state = kept.slope = None
        else:
            kept.state = self.storage.put(state)
            kept.slope = None if slope is None else self.storage.put(slope)
            self._states += 1
            self._count_state(kept, _bytes(state) + (0 if slope is None else _bytes(slope)))
        me = weakref.ref(kept)
        self._kept.append(me)
        if (graph := kept.graph) is not None:
            graph.size = graph_size + (graph.before.size if graph.before is not None else 0)
            self._count_graphs(kept, graph_size)
            self._with_graphs.append(me)
        elif kept.stages is not None:
            self._count_stages(kept, sum(map(_bytes, kept.stages)))
            self._with_stages.append(me)
        else:
            self._makes_again = True
        while self.used > self._room():
            self._drop()

    def recall(self, kept: Kept, advance: Advance) -> tuple[Tensor, Tensor | None]:
        """The state at a step's start, and the slope if it is needed. In the reverse order of the steps."""
        state, slope = self._recalled(kept, advance)
        # Weakly and without a history: both may lead back here.
        self._last = None if kept.previous is None else (weakref.ref(kept.previous), state.detach())
        return state, slope

    def end_of_recall(self) -> None:
        """No state will be recalled any more: what recalls them may hold on to whom it does so for."""
        self._reversal = None

    def end_of(self, kept: Kept) -> Tensor | None:
        """The state at a step's end, if it is kept or was recalled last."""
        if kept.end is not None:
            return kept.end
        if self._last is not None and self._last[0]() is kept:
            return self._last[1]
        return None

    def _recalled(self, kept: Kept, advance: Advance) -> tuple[Tensor, Tensor | None]:
        if kept.state is not None:
            slope = None if kept.slope is None else self.storage.get(kept.slope)
            return self.storage.get(kept.state), slope
        if self._reversal is None or not self._reversal[0] or self._reversal[0][-1] is not kept:
            self._reversal = self._reversed(kept, advance)
        segment, states = self._reversal
        segment.pop()
        if not segment:
            self._reversal = None
        return next(states)

    def release(self, kept: Kept) -> None:
        """Keep nothing of a step any more."""
        self._drop_state(kept)
        kept.stages = kept.graph = kept.end = None
        self._count_stages(kept, 0)
        self._count_graphs(kept, 0)

    def chosen(self) -> str:
        """What is kept, in words."""
        live = [kept for ref in self._kept if (kept := ref()) is not None]
        if not live:
            return "nothing"
        graphs = sum(kept.graph is not None for kept in live)
        stages = sum(kept.stages is not None and kept.graph is None for kept in live)
        states = sum(kept.state is not None for kept in live)
        parts = [f"states of {states}"]
        parts += [f"stages of {stages}"] if stages else []
        parts += [f"graphs of {graphs}"] if graphs else []
        return f"{', '.join(parts)} of {len(live)} steps"

    @property
    def budget(self) -> float:
        """The bytes that may be used by now."""
        return self.working + self._room()

    def _least(self, steps: int | None) -> int:
        """How many states there must be room for."""
        few = _FEWEST if steps is None else min(steps, _FEWEST)
        return few if self.policy in ("auto", "binomial") else (steps or 1)

    def _room(self, more_states: int = 0) -> float:
        """The bytes that what is kept may take, when that many more have been added for states."""
        if self._budget is None and self.policy != "auto":
            return float("inf")
        # A step's graph that is made again takes more than that of one evaluation.
        again = (self._evaluations_again - 1) * self._largest if self._makes_again and self.makes_graphs_again else 0
        if self._budget is not None:
            return self._budget - self.working - again
        least = self.working + self._state_bytes + more_states
        return max(DEFAULTS.budget, 2 * least) - self.working - again

    def _snapshots(self) -> int:
        if self._budget is not None:
            return max(_FEWEST, int(self._room() // self._state)) if self._state else DEFAULTS.snapshots
        return DEFAULTS.snapshots

    def _is_binomial(self) -> bool:
        return self.policy == "binomial" or self._spacing > 1 or self._positions is not None

    def _takes(self, index: int) -> bool:
        """Whether the state of a step with this index is kept."""
        if self._positions is not None:
            return index in self._positions
        if self.policy == "binomial" and self._states >= self._snapshots():
            self._thin()
        return index % self._spacing == 0

    def _drop(self) -> None:
        """Make room."""
        if (kept := _oldest(self._with_graphs)) is not None:
            self._drop_graph(kept)
            # Those that go on from it hold it.
            while self._with_graphs and (kept := self._with_graphs[0]()) and kept.graph and kept.graph.before:
                self._with_graphs.popleft()
                self._drop_graph(kept)
        elif self.policy != "stages" and (kept := _oldest(self._with_stages)) is not None:
            kept.stages = None
            self._count_stages(kept, 0)
        elif self._slopes_are_spare:
            self._drop_slopes()
        elif self.policy in ("auto", "binomial") and self._states > _FEWEST and self._thin():
            pass
        elif self.makes_graphs_again:
            self._evaluations_again = 0
        else:
            self._refuse(self.working + self.used)

    def drop_graphs(self) -> None:
        """Keep the states of stages instead of all graphs so far."""
        while (kept := _oldest(self._with_graphs)) is not None:
            self._drop_graph(kept)

    def _drop_graph(self, kept: Kept) -> None:
        """Keep the states of its stages instead."""
        assert kept.graph is not None
        stages = [stage.detach() for stage in kept.graph.stages[1:]]
        kept.graph = None
        self._count_graphs(kept, 0)
        self._makes_again = True
        if self.wants_stages():
            kept.stages = stages
            self._count_stages(kept, sum(map(_bytes, stages)))
            self._with_stages.append(weakref.ref(kept))

    def _thin(self) -> bool:
        """Drop every other state that can be had again; returns whether there was one."""
        dropped = False
        self._kept = [ref for ref in self._kept if ref() is not None]
        while not dropped and self._spacing < 2 * len(self._kept):
            self._spacing *= 2
            for ref in self._kept:
                kept = ref()
                if kept is None or kept.state is None or kept.previous is None or kept.index % self._spacing == 0:
                    continue
                self._drop_state(kept)
                dropped = True
        return dropped

    def _drop_slopes(self) -> None:
        """Have slopes evaluated again that could be."""
        self._slopes_are_spare = self.keeps_slope = False
        self._state //= 2
        for ref in self._kept:
            if (kept := ref()) is not None and kept.slope is not None:
                kept.slope = None
                self._count_state(kept, kept.size // 2)

    def _drop_state(self, kept: Kept) -> None:
        if kept.state is not None:
            self._states -= 1
            kept.state = kept.slope = None
            self._count_state(kept, 0)

    def _reversed(self, kept: Kept, advance: Advance) -> tuple[list[Kept], Iterator[Any]]:
        segment = [kept]
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
            self._snapshots() - self._states + 1,
            lambda n, pair: advance(stretch[n], *pair),
            self._put,
            lambda pair: tuple(None if x is None else self.storage.get(x) for x in pair),
        )
        return segment, states

    def _put(self, pair: tuple[Tensor, Tensor | None]) -> tuple[Any, Any]:
        """A state and a slope into storage, the slope only where it can't be evaluated again."""
        state, slope = pair
        return self.storage.put(state), self.storage.put(slope) if slope is not None and self.keeps_slope else None

    def _count_state(self, kept: Kept, size: int) -> None:
        size = size if self.storage.on_device else 0
        self._state_bytes += size - kept.size
        self.used += size - kept.size
        kept.size = size
        self.most_states = max(self.most_states, self.used - self._graph_bytes)

    def _count_stages(self, kept: Kept, size: int) -> None:
        self.used += size - kept.stages_size
        kept.stages_size = size
        self.most_states = max(self.most_states, self.used - self._graph_bytes)

    def _count_graphs(self, kept: Kept, size: int) -> None:
        self.used += size - kept.graph_size
        self._graph_bytes += size - kept.graph_size
        kept.graph_size = size
        self.most_graphs = max(self.most_graphs, self._graph_bytes)

    def _refuse(self, least: float) -> None:
        advice = "" if self.policy in ("auto", "binomial") else ', or checkpoint="auto", which does with less'
        raise ValueError(
            f"symplectic_adjoint: memory_budget={self._budget} is too small: with checkpoint={self.policy!r} this "
            f"solve needs at least {int(least)} bytes ({self.working} of them beside checkpoints: the graph of one "
            f"evaluation of func, the stages of a step, the sums of gradients). Use a larger one{advice}."
        )


def _oldest(refs: deque[weakref.ref[Kept]]) -> Kept | None:
    while refs:
        if (kept := refs.popleft()()) is not None and (kept.graph is not None or kept.stages is not None):
            return kept
    return None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
