"""The memory budget of a solve and its backward pass: how much may be used, and how much is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..field.cotangents import wide
from ..field.evaluation import Evaluation
from ..field.vector_field import VectorField
from .defaults import DEFAULTS

FEWEST_STATES = 3
"""With fewer states than this, recomputing the others takes beyond measure."""


@dataclass(frozen=True)
class Demand:
    """The memory demand of a solve, as far as it is known at the first evaluation of f.

    Args:
        state: the initial state.
        stages: number of stages of a step.
        keeps_slope: whether a slope is kept with each state.
        outputs: number of output times.
        steps: number of steps, if it is known.
        solving: bytes that solving for the stages of a step takes, if they have to be solved for.
        evaluations: number of evaluations that a step makes, if it can be recomputed with graphs.
    """

    state: Tensor
    stages: int
    keeps_slope: bool
    outputs: int
    steps: int | None = None
    solving: int = 0
    evaluations: int = 0


class Budget:
    """The memory budget of a solve and its backward pass.

    Two parts share it: the working memory, which the backward pass of one step needs whatever is kept, and the room for
    what is kept: states of steps and of stages, and graphs.

    Args:
        policy: one of `POLICIES`.
        limit: in bytes. By default the larger of `Defaults.budget` and twice the least that "steps" needs, for "auto";
            none for the others.
        on_device: whether states that are kept take memory of the device.

    Attributes:
        working: bytes of the working memory.
        used: bytes of all that is kept.
        states: number of states that are kept.
        state: bytes of what is kept of each step under the policy "steps".
        largest: bytes of the largest evaluation so far, with its graph.
        sizes: bytes of evaluations with their graphs, by their numbers of nodes.
        most_states, most_graphs: the most bytes that states (of steps and stages) and graphs took.

    Raises:
        ValueError: if the limit is no positive number.
    """

    def __init__(self, policy: str, limit: float | None, *, on_device: bool) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
            raise ValueError(f"symplectic_adjoint: memory_budget must be a positive number of bytes, got {limit!r}")
        self.policy = policy
        self.limit = limit
        self.on_device = on_device
        self.working = self.state = self.states = self.used = self.largest = self.most_states = self.most_graphs = 0
        self._outputs = self._recomputed_graphs = 0
        self._used = {"states": 0, "stages": 0, "graphs": 0}
        self.sizes: dict[int, int] = {}

    def measure(self, field: VectorField, evaluation: Evaluation, demand: Demand) -> None:
        """Find out from the first evaluation of f how much memory a solve needs.

        Args:
            field: f, with its dependencies discovered.
            evaluation: the first one.
            demand: what is known of the solve.

        Raises:
            ValueError: if the limit is too small.
        """
        size, sizes = demand.state.numel() * demand.state.element_size(), field.memory_of(evaluation)
        largest = max(sizes, default=0)
        gradients = sum(x.numel() * max(4, x.element_size()) for x in field.dependencies)
        # Beside a graph: what its backward pass makes; the sums of gradients, and those to be added; the slopes of a
        # step, and what the host makes of them; the outputs and their cotangents; the adjoint of half-precision states,
        # which is wide.
        states = 3 * demand.stages + 12 + 2 * demand.outputs
        states += 10 if wide(demand.state.dtype) != demand.state.dtype else 0
        self.working = sum(sizes) + 2 * largest + 2 * gradients + states * size + demand.solving
        # Through a graph with branches, such as one of derivatives, a backward pass has more in hand than what comes
        # and goes at one node.
        if self.limit is not None or sum(sizes) > DEFAULTS.budget // 64:
            cotangents = field.cotangents_of(evaluation)
            self.working += cotangents if cotangents > 2.1 * largest else 0
        self.largest = self.sizes[evaluation.nodes] = sum(sizes) + size
        self._outputs = demand.outputs * size
        self.state = size * (2 if demand.keeps_slope else 1) if self.on_device else 0
        field.report.evaluation_bytes = sum(sizes)
        self._require_least(field, demand.steps)

    def _require_least(self, field: VectorField, steps: int | None) -> None:
        least = self.least_states(steps) * self.state
        if field.draws:  # the generators' states are kept for each step, whatever is dropped
            least += (steps or FEWEST_STATES) * sum(state.numel() for state in field.generators.states())
        if self.limit is not None and self.room() < least:
            self.refuse(self.working + least)

    def least_states(self, steps: int | None) -> int:
        """Return the number of states that there must be room for, in a solve of so many steps."""
        few = FEWEST_STATES if steps is None else min(steps, FEWEST_STATES)
        return few if self.policy in ("auto", "binomial") else (steps or 1)

    @property
    def graphs(self) -> int:
        """Bytes of the graphs that are kept."""
        return self._used["graphs"]

    @property
    def total(self) -> float:
        """Bytes that may be used by now."""
        return self.working + self.room()

    @property
    def is_exceeded(self) -> bool:
        """Return whether more is kept than there is room for."""
        return self.used > self.room()

    def charge(self, kind: str, change: int) -> None:
        """Count bytes of "states", "stages" or "graphs" that come (or, if negative, go)."""
        used = self._used
        used[kind] += change
        self.used += change
        if change > 0:
            self.most_states = max(self.most_states, used["states"] + used["stages"])
            self.most_graphs = max(self.most_graphs, used["graphs"])

    def release(self, charged: Mapping[str, int], *, states: int) -> None:
        """Count nothing more of what was charged, by kind, and of so many states."""
        self.states -= states
        for kind, size in charged.items():
            self._used[kind] -= size
            self.used -= size

    def count_states(self, change: int) -> None:
        """Count states that come (or, if negative, go)."""
        self.states += change

    def add_working(self, size: int) -> None:
        """Count bytes that stay whatever is dropped."""
        self.working += size

    def add_slopes(self, change: int) -> None:
        """Count on a slope beside each state (change = 1), or no longer (-1)."""
        self.state = self.state * 2 if change > 0 else self.state // 2

    def reserve_recomputed_graphs(self, evaluations: int) -> None:
        """Reserve room for the graphs of one recomputed step with so many evaluations; none for 0."""
        self._recomputed_graphs = evaluations

    def room(self, more_states: int = 0) -> float:
        """Return the bytes that all that is kept may take, once `more_states` bytes have been added for states."""
        if self.limit is None and self.policy != "auto":
            return float("inf")
        recomputed = max(0, self._recomputed_graphs - 1) * self.largest  # working memory has one of them
        if self.limit is not None:
            return self.limit - self.working - recomputed
        least = self.working + self._used["states"] + more_states
        return max(DEFAULTS.budget, 2 * least) - self.working - recomputed

    def size_of(self, nodes: list[int]) -> int:
        """Return the bytes of evaluations with these numbers of nodes."""
        return sum([self.sizes[n] for n in nodes])

    def measure_again(self, field: VectorField, evaluation: Evaluation) -> None:
        """Measure an evaluation with another number of nodes than those before."""
        size = self.sizes[evaluation.nodes] = sum(field.memory_of(evaluation)) + self.state
        # Beside the graph there will be what its backward pass makes.
        self.working += 3 * max(0, size - self.largest)
        self.largest = max(self.largest, size)

    def fits(self, evaluations: int, steps: int = 1) -> bool:
        """Return whether the graphs of so many more steps fit, each with so many evaluations."""
        states = steps * self.state
        return self.used + steps * evaluations * self.largest + states <= self.room(states)

    def fits_in_share(self, share: float, evaluations: int = 0) -> bool:
        """Return whether the graphs kept, with so many more evaluations, take at most this share of the room."""
        more = evaluations * self.largest + self.state if evaluations else 0
        return self._used["graphs"] + more <= share * self.room()

    def outputs_fit_twice(self) -> bool:
        """Return whether there is room for the outputs once more, as they are joined with their graphs."""
        return self.used + self._outputs <= self.room()

    def refuse(self, least: float) -> None:
        """Refuse the limit.

        Raises:
            ValueError: that names the bytes which are enough.
        """
        advice = "" if self.policy in ("auto", "binomial") else ', or checkpoint="auto", which does with less'
        raise ValueError(
            f"symplectic_adjoint: memory_budget={self.limit} is too small: with checkpoint={self.policy!r} this "
            f"solve needs at least {int(least)} bytes ({self.working} of them beside checkpoints: the graph of one "
            f"evaluation of func, the stages of a step, the sums of gradients). Use a larger one{advice}."
        )
