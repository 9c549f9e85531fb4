"""The recorder of a solve: evaluates f for a host's solver, decides what is kept of each step, and keeps it.

One recorder serves every host and family of methods. Three kinds of things are kept: the live graph of the whole solve,
the graphs of single evaluations, or states.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..field._torch_compat import sequence_number
from ..field.cotangents import NO_STAND_INS, wide
from ..field.evaluation import Evaluation, Keywords
from ..field.random_numbers import GeneratorStates
from ..field.vector_field import VectorField
from ..methods.explicit import explicit_step, weighted_sum
from .budget import Demand
from .checkpoint import Checkpoint
from .live_graph import LiveStep
from .method import Method, Step
from .stage_graphs import StageGraphs
from .store import CheckpointStore
from .trajectory import Trajectory

_MOST_KINDS = 16
"""Number of kinds of evaluations that are measured in a live graph. Measuring makes Python see the nodes of one."""


@dataclass(frozen=True)
class Plan:
    """A host's knowledge of a solve that begins.

    Args:
        initial: the initial state, with its history.
        demand: returns what the solve needs memory for, called with the first evaluation.
        want_time: whether gradients of times are wanted.
        steps: number of steps, if it is known.
        may_be_live: whether the steps' arithmetic can be a part of autograd's graph.
        live_share: share of the room for what is kept that a live graph may fill, if the number of steps is not known.
        live_by_host: whether the host's own arithmetic makes the live graph, so that it can't be dropped.
    """

    initial: Tensor
    demand: Callable[[Evaluation], Demand]
    want_time: bool = False
    steps: int | None = None
    may_be_live: bool = True
    live_share: float = 0.25
    live_by_host: bool = False


class Recorder:
    """The recorder of one solve.

    Args:
        field: the vector field.
        store: keeps the checkpoints.
        method: the method.
        plan: what the host knows of the solve.

    Attributes:
        trajectory: the solve, as far as it has got.
        is_discovered: whether f has been evaluated for the first time.
        is_live: whether the solve's graph is live: autograd's own, from the initial state on.
        step_is_live: whether the host's arithmetic makes the step that has begun a part of the live graph.
        first: the first evaluation, if it was made outside of a step and gives the first step's first slope.
        first_draw: states of the random number generators before the evaluation outside of a step that gave the step's
            first slope, if f draws.
    """

    def __init__(self, field: VectorField, store: CheckpointStore, method: Method, plan: Plan) -> None:
        self.field = field
        self.store = store
        self.plan = plan
        self.trajectory = Trajectory(method, store)
        self.is_discovered = False
        self.is_live = plan.may_be_live and not plan.want_time and store.may_be_live
        self.step_is_live = False
        self.first: Evaluation | None = None
        self.first_draw: GeneratorStates | None = None
        self._stages: list[Tensor] = []
        self._nodes: list[int] = []
        self._graphs: StageGraphs | None = None
        self._live: LiveStep | None = None
        self._remaining = 0
        self._begun: tuple[Tensor, Tensor | None, float] | None = None
        self._last_live: tuple[weakref.ref[Tensor], int] | None = None

    # Evaluations of f

    def evaluate(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """Evaluate f at a state as the host has computed it, without history: the next stage's, or outside a step.

        Args:
            t: time, a scalar that nobody changes in place.
            x: state.
            keywords: passed on to f.

        Returns:
            The slope, without a graph.
        """
        self.field.report.evaluations += 1
        if not self.is_discovered:
            return self._discover(t, x, keywords).detach()
        if self._remaining == 0:
            return self.field(t, x, keywords)
        self._remaining -= 1
        if self._live is not None:
            with torch.enable_grad():
                stage = self._live.next_stage(x)
                return self._evaluate_live(t, stage, keywords).detach()
        return self._evaluate_stage(t, x, keywords)

    def evaluate_stage(self, t: Tensor, stage: Tensor, keywords: Keywords) -> Tensor:
        """Evaluate f at the next stage, computed with grad enabled from the start of a step that may be live.

        Args:
            t, keywords: as for `evaluate`.
            stage: state of the stage; with its history, if the step is live.

        Returns:
            The slope; with its history, if the step is live.
        """
        self.field.report.evaluations += 1
        if not self.is_discovered:
            return self._discover(t, stage, keywords)
        self._remaining -= 1
        if self._live is not None or self.step_is_live:
            return self._evaluate_live(t, stage, keywords)
        return self._evaluate_stage(t, stage.detach(), keywords)

    def count(self) -> None:
        """Count an evaluation of f that belongs to no stage: solving for stages makes any number of them."""
        self.field.report.evaluations += 1

    def _evaluate_stage(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        self._stages.append(x)
        if (graphs := self._graphs) is None:
            return self.field(t, x, keywords)
        evaluation = self.field.differentiable(t, x, keywords, graphs.stand_ins, want_time=self.plan.want_time)
        slope = graphs.add(evaluation)
        if not self.store.has_room_for(self.field, evaluation, graphs.nodes):
            self._graphs = None
        return slope

    def _evaluate_live(self, t: Tensor, stage: Tensor, keywords: Keywords) -> Tensor:
        first = sequence_number()
        slope = self.field.evaluate(t, stage, keywords, NO_STAND_INS)
        nodes = sequence_number() - first
        self._nodes.append(nodes)
        if (live := self._live) is not None:
            live.stages.append(stage)
            live.slopes.append(slope)
            live.nodes.append(nodes)
        sizes = self.store.budget.sizes
        if nodes not in sizes:
            evaluation = Evaluation(stage, t, stage, keywords, slope, nodes)
            if len(sizes) >= _MOST_KINDS or not self.store.has_room_for(self.field, evaluation, self._nodes):
                self.leave_live_graph()
        return slope

    def _discover(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """Evaluate f for the first time: find its dependencies, measure it, choose what is kept."""
        field, store, plan, in_step = self.field, self.store, self.plan, self._begun is not None
        if not plan.live_by_host:
            is_initial = x.shape == plan.initial.shape and x.data_ptr() == plan.initial.data_ptr()
            self.is_live = self.is_live and is_initial
            x = plan.initial if self.is_live else x.detach()
        evaluation = field.discover(t, x, keywords, want_time=plan.want_time, with_history=self.is_live)
        self.is_discovered = True
        if field.draws:
            self.first_draw = field.generators.last_noted
        store.measure(field, evaluation, plan.demand(evaluation))
        self.is_live = self.is_live and self._may_stay_live(evaluation)
        # The first evaluation was made without stand-ins.
        usable = evaluation if self.is_live or (evaluation.leaf.is_leaf and not field.stand_ins.leaves) else None
        if in_step:
            self._open_step(usable)
            self._graphs = None if usable is None else self._graphs
            self._stages.append(x.detach())
            self._remaining -= 1
        else:
            self.first = usable
        return evaluation.slope if self.is_live else evaluation.slope.detach()

    def _may_stay_live(self, evaluation: Evaluation) -> bool:
        # Within a graph autograd sums in the tensors' precision: of half precision that is to be no long sum.
        dtypes = {x.dtype for x in (evaluation.argument, *self.field.dependencies)}
        is_wide = all(wide(dtype) == dtype for dtype in dtypes)
        if self.plan.live_by_host and not any(x.requires_grad for x in (self.plan.initial, *self.field.dependencies)):
            return False  # the host would return a graph that leads nowhere
        return is_wide and not self.field.left_out and self._has_room_for_live_step(0)

    def _has_room_for_live_step(self, taken: int) -> bool:
        store, plan, evaluations = self.store, self.plan, self.trajectory.method.evaluations
        if not store.keeps_graphs:
            return False
        if plan.live_by_host:
            return store.budget.fits_in_share(plan.live_share, evaluations)
        if plan.steps is not None:
            return store.budget.fits(evaluations, max(1, plan.steps - taken))
        return store.budget.fits_in_share(plan.live_share) and store.budget.fits(evaluations)

    # Steps

    def begin_step(self, start: Tensor, first_slope: Tensor | None, h: float, *, follows: bool = True) -> None:
        """Begin a step, or another attempt at it.

        Args:
            start: state at the step's start.
            first_slope: slope there, if it is not evaluated in the step.
            h: step size.
            follows: whether the state is where the step before ended, and the slope the last one of that.
        """
        self._stages, self._nodes, self._graphs, self._live = [], [], None, None
        if self.field.draws:
            self.field.generators.begin_noting()
        self._begun = start, first_slope, h
        self._remaining = self.trajectory.method.evaluations
        if self._last_live is not None and self._last_live[0]() is start:  # the host has rejected the last step
            self.store.budget.charge("graphs", -self._last_live[1])
            self._last_live = None
        if not self.is_discovered:
            return
        taken = len(self.trajectory.checkpoints)
        # The number of steps was taken into account when the solve began, if it is known.
        fits = self.plan.steps is not None and not self.plan.live_by_host
        last, by_host = self._last_live_step(), self.plan.live_by_host
        if self.is_live and taken and last is None and not by_host:
            self.is_live = False  # the budget has turned the graph into states
        if self.is_live and not (fits or self._has_room_for_live_step(taken)):
            self.is_live = False  # the graph so far stays, as long as there is room
            if last is not None:
                last.end_at(start)
        if taken and not follows and last is not None:
            self.leave_live_graph()
        self._open_step()

    def _open_step(self, evaluation: Evaluation | None = None) -> None:
        """Have what is to be kept of the step that has begun, and of the solve's first evaluation if that is in it."""
        assert self._begun is not None
        start, first_slope, h = self._begun
        made = [x for x in (self.first, evaluation) if x is not None]
        self.step_is_live = self.is_live and self.plan.live_by_host
        if self.is_live:
            self._nodes = [x.nodes for x in made]
            if not self.plan.live_by_host:
                self._live = self._live_step(made, start, h)
        elif self.trajectory.method.implicit is None and self._wants_graphs():
            self._graphs = StageGraphs(self.field.stand_ins, start, None if self.first is not None else first_slope)
            for x in made:
                self._graphs.add(x)

    def _live_step(self, made: list[Evaluation], start: Tensor, h: float) -> LiveStep:
        method = self.trajectory.method
        before = self._last_live_step()
        if before is None:
            return LiveStep(method, made[0].argument, h, made[0].slope, [made[0].nodes])
        before.end_at(start)
        return LiveStep(method, before.end, h, before.slopes[-1] if method.hands_on_slope else None)

    def _last_live_step(self) -> LiveStep | None:
        """Return the step before, if it is a part of the live graph."""
        checkpoints = self.trajectory.checkpoints
        kept = checkpoints[-1].graphs if checkpoints else None
        return kept if isinstance(kept, LiveStep) else None

    def _wants_graphs(self) -> bool:
        plan, taken = self.plan, len(self.trajectory.checkpoints)
        remaining = 1 if plan.steps is None else max(1, plan.steps - taken)
        return self.store.keeps_graphs and self.store.budget.fits(self.trajectory.method.evaluations, remaining)

    def take_step(self, step: Step, times: Sequence[Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
        """Take an explicit step that has begun.

        Args:
            step: the step.
            times: times of its stages.
            start: state at its start, without history.

        Returns:
            What the step adds to the state, and the first slope, without graphs.
        """
        method = self.trajectory.method
        keywords = method.keywords

        def slope_at(i: int, stage: Tensor) -> Tensor:
            return self.evaluate_stage(times[i], stage, keywords[i])

        # The solve's first evaluation decides what the step is made of.
        first = None if self.is_discovered else slope_at(0, start)
        origin = self._live.origin if self._live is not None else start
        with torch.set_grad_enabled(self.is_live):
            slopes = explicit_step(method.tableau, slope_at, origin, step.h, first)
            moved = weighted_sum(None, method.tableau.numbers[1], slopes, step.h)
            if self._live is not None:
                self._live.ends_in(self._live.origin + moved)
        return moved.detach(), slopes[0].detach()

    @property
    def draws(self) -> Sequence[GeneratorStates | None] | None:
        """States of the random number generators before each evaluation in this step, if f draws; see `Step`."""
        return self.field.generators.noted if self.field.draws else None

    @property
    def _given(self) -> int:
        """Number of slopes of the step that has begun which are not evaluated in it."""
        return 0 if self._begun is None or self._begun[1] is None else 1

    def leave_live_graph(self) -> None:
        """Turn the live graph into states, without another evaluation of f: it does not fit any more."""
        self.is_live = False
        if self.plan.live_by_host:
            return
        if self._live is not None:
            self._stages = [stage.detach() for stage in self._live.stages[self._given :]]
            self._live = None
        self.store.turn_graphs_into_states()

    def end_step(
        self,
        step: Step,
        state: Tensor,
        slope: Tensor | None,
        stages: list[Tensor] | None = None,
        *,
        follows: bool = True,
    ) -> Checkpoint:
        """Add an accepted step to the trajectory.

        Args:
            step: the step.
            state: state at its start.
            slope: slope there, if it has to be kept; None if it can be evaluated again.
            stages: slopes of an implicit method's stages, if they may be kept.
            follows: whether the state is where the step before ended, if there is one.
        """
        checkpoints = self.trajectory.checkpoints
        previous = checkpoints[-1] if checkpoints and follows else None
        checkpoint = Checkpoint(self.store.budget, step, self.trajectory.method, previous)
        self.keep(checkpoint, state, slope, stages)
        checkpoints.append(checkpoint)
        return checkpoint

    def keep(self, checkpoint: Checkpoint, state: Tensor, slope: Tensor | None, stages: list[Tensor] | None) -> None:
        """Keep of a step what there is room for.

        Args:
            checkpoint: the step's, with nothing kept.
            state, slope, stages: as for `end_step`.
        """
        kept, store = self._live or self._graphs, self.store
        if kept is not None:
            checkpoint.put_graphs(kept, store.budget.size_of(kept.nodes))
            if self._live is not None:
                state = self._live.origin.detach()  # the same values, in memory that the graph holds anyway
        elif store.keeps_stages and checkpoint.step.draws is None:  # else they are evaluated again, in the same order
            checkpoint.put_stages(self._stages[1 - self._given :] if stages is None else stages)
        self._stages, self._graphs, self._live, self._begun, self.first = [], None, None, None, None
        self._remaining, self.first_draw = 0, self.field.generators.last_noted
        store.add(checkpoint, state, slope)

    def end_live_step(self) -> int:
        """End a step whose live graph the host's arithmetic has made: return its number of evaluations."""
        assert self._begun is not None
        size = self.store.budget.size_of(self._nodes)
        self._last_live = weakref.ref(self._begun[0]), size
        self._begun = None
        self.store.budget.charge("graphs", size)
        self.store.make_room()
        return len(self._nodes)

    def want_time(self) -> None:
        """Keep what gradients of times need, from the next step on."""
        if not self.plan.want_time:
            self.plan = replace(self.plan, want_time=True)
            self.is_live = False

    def live_prefix(self) -> list[LiveStep]:
        """Return the first steps of the solve as far as they are a live graph: none, some or all."""
        steps: list[LiveStep] = []
        for checkpoint in self.trajectory.checkpoints:
            if not isinstance(checkpoint.graphs, LiveStep):
                break
            steps.append(checkpoint.graphs)
        return steps

    def finish(self, end: Tensor | None, outputs: list[tuple[int, float]]) -> Trajectory:
        """End the solve.

        Args:
            end: state at the end of the last step.
            outputs: places of the outputs, as `Trajectory` has them.

        Returns:
            The trajectory.
        """
        trajectory, report, budget = self.trajectory, self.field.report, self.store.budget
        trajectory.place_outputs(outputs)
        if trajectory.checkpoints and end is not None:
            trajectory.checkpoints[-1].set_end(end)
        if self.live_prefix() and not budget.outputs_fit_twice():
            self.leave_live_graph()
        report.accepted = len(trajectory.checkpoints)
        report.checkpoint_bytes, report.graph_bytes = budget.most_states, budget.most_graphs
        report.budget_bytes = budget.total
        if report.is_seen:
            report.kept = self.store.kept()
        return trajectory
