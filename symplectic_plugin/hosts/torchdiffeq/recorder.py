"""Mixed into torchdiffeq's solver classes, this notes the steps that a solve accepts, and leaves it as it is."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq._impl import misc

from ...field.cotangents import wide
from ...field.evaluation import Evaluation
from ...field.graphs import depends_on_another
from ...methods.tableau import ButcherTableau
from ...record.checkpoints import Checkpoints
from ...record.defaults import DEFAULTS
from ...record.implicit_solve import ImplicitSolve
from ...record.kept import Graph, Kept
from ...record.stage_graphs import StageGraphs
from ...record.step_graph import StepGraph
from ...record.trajectory import Step, TakeStep, Trajectory
from .methods import hands_on_slope, read_dense_output, read_method
from .recorded_field import RecordedField
from .step_at_once import StepAtOnce
from .times import StageTimes


class Method(NamedTuple):
    """What has to be known of a method to take a step of it."""

    tableau: ButcherTableau
    keywords: list[dict[str, Any]]
    stage_times: StageTimes


class Recorder(ABC):
    """What the recorders of both families share."""

    base: Any
    trajectory: Trajectory | None = None
    is_own = True
    checkpoints: Checkpoints
    func: RecordedField
    y0: Tensor

    @abstractmethod
    def step_alone(self, method: Method, dtype: torch.dtype) -> TakeStep:
        """The step, taken by itself.

        Args:
            method: the solver's.
            dtype: in which the solver keeps time.
        """

    def has_callbacks(self, *names: str) -> bool:
        """Whether func has a callback of one of these names."""
        none = getattr(misc, "_null_callback", None)  # torchdiffeq 0.2.3 has no callbacks
        return any(getattr(self.func, name, none) is not none for name in names)

    @abstractmethod
    def end_state(self) -> Tensor:
        """The state at the end of the last step."""

    @abstractmethod
    def read_times(self) -> None:
        """Have the steps' times as numbers."""

    def record(
        self, solver_dtype: torch.dtype, stage_dtype: torch.dtype, outputs: int, steps: int | None = None
    ) -> None:
        """Begin to note steps.

        Args:
            solver_dtype: in which the solver keeps time.
            stage_dtype: in which it computes the times of stages.
            outputs: how many output times there are.
            steps: how many steps there will be, if that is known.

        Raises:
            ValueError: if the method is not a Runge-Kutta method.
        """
        tableau, keywords = read_method(self)
        dense = read_dense_output(self, tableau)
        stage_times = StageTimes(dense.times(tableau.c), solver_dtype, stage_dtype, self.y0.device)
        handed_on, checkpoints, field = hands_on_slope(self), self.checkpoints, self.func.field
        take_step = self.step_alone(Method(tableau, keywords, stage_times), solver_dtype)
        self.trajectory = Trajectory(
            tableau, handed_on, keywords, dense, stage_times, take_step, checkpoints, self.implicit_solve()
        )
        self._evaluations = tableau.stages - (1 if handed_on else 0)
        self._planned = steps
        if (compiled := field.compiled) is not None and tableau.explicit:
            self.func.at_once = self.trajectory.at_once = StepAtOnce(field, compiled, tableau, not dense.linear)
        slope_kept = self.trajectory.keeps_slope
        # Outputs may be made of slopes that are in no graph.
        may_link = self.is_own and not dense.end_stage and wide(self.y0.dtype) == self.y0.dtype
        self.func.whole = DEFAULTS.live_graphs and may_link and checkpoints.storage.on_device and self._wants_graph()

        def begin(evaluation: Evaluation) -> bool:
            # A program returns all stages and slopes at once.
            at_once = tableau.stages * self.y0.numel() * self.y0.element_size() if self.func.at_once else 0
            solving = self.discovered(evaluation) + at_once
            slopes_kept = slope_kept or (handed_on and field.draws)
            again = 0 if self.trajectory is None or self.trajectory.implicit else self._evaluations
            checkpoints.measure(field, evaluation, self.y0, tableau.stages, slopes_kept, outputs, steps, solving, again)
            # Within a graph autograd sums in the tensors' precision: of half precision that is to be no long sum.
            self._links_graphs = may_link and all(wide(x.dtype) == x.dtype for x in field.dependencies)
            wanted = self._wants_graph()
            self.func.whole = self.func.whole and wanted and self._links_graphs and not field.left_out
            return wanted

        self.func.on_discovery = begin
        self.func.has_room_for = checkpoints.has_room_for

    def implicit_solve(self) -> ImplicitSolve | None:
        """How the stages are solved for, if they have to be."""
        return None

    def discovered(self, evaluation: Evaluation) -> int:
        """Called with the first evaluation; returns the bytes that solving for the stages takes."""
        return 0

    def kept_stages(self, step: Step) -> list[Tensor]:
        """What is kept of the stages of the step that was taken last."""
        assert self.trajectory is not None
        return self.func.stages[0 if self.trajectory.hands_on_slope else 1 :]

    def _wants_graph(self) -> bool:
        assert self.trajectory is not None
        remaining = 0 if self._planned is None else self._planned - len(self.trajectory.steps) - 1
        return self.checkpoints.wants_graphs(self._evaluations, remaining)

    def begin_step(self, start: Tensor, first_slope: Tensor | None, h: Any, follows: bool) -> None:
        """Begin a step, or another attempt at it.

        Args:
            start: the state at its start.
            first_slope: the slope there, if it is not evaluated in the step.
            h: its size, None if that is not known yet.
            follows: whether the state is where the step before ended, and the slope the last one of that.
        """
        if (trajectory := self.trajectory) is None:
            return
        func, before = self.func, None
        graph: Graph | None = None
        if self._wants_graph():
            if h is None or func.want_time:
                graph = StageGraphs(func.field, start, first_slope, func.want_time)
            else:
                before = self._graph_before() if follows else None
                graph = StepGraph(func.field, trajectory.tableau, start, float(h), first_slope, before)
            if first_slope is not None and before is not None:
                before.end_as(start)
            elif first_slope is not None and func.first is not None:
                func.take_first(graph, func.first)
        func.begin_step(self._evaluations, graph)

    def _graph_before(self) -> StepGraph | None:
        """The graph of the step before, if this step's is to go on from it."""
        assert self.trajectory is not None
        graph = self.trajectory.kept[-1].graph
        if not isinstance(graph, StepGraph) or not self._links_graphs:
            return None
        # Where it is known how many steps there will be, the graphs of all of them fit.
        return graph if self._planned is not None or self.checkpoints.may_go_on(graph) else None

    def note(self, step: Step, state: Tensor, slope: Tensor | None, follows: bool = True) -> None:
        """Add an accepted step to the trajectory, with the state at its start and, if it has to be kept, the slope.

        Args:
            step: the step.
            state: the state at its start.
            slope: the slope there, None if it can be evaluated again.
            follows: whether the state is where the step before ended, if there is one.
        """
        trajectory, checkpoints, func = self.trajectory, self.checkpoints, self.func
        assert trajectory is not None
        stages: list[Tensor] | None = None
        graph, size = func.graph, 0
        if func.whole and (not isinstance(graph, StepGraph) or (graph.before is None and trajectory.kept)):
            self._give_up_whole_graph(trajectory)
        if graph is not None:
            state = state if graph.before is None else graph.origin.detach()  # the same, which the graph has anyway
            size = checkpoints.size_of(graph)
        elif checkpoints.wants_stages() and step.draws is None:  # else they must be evaluated again, in the same order
            stages = self.kept_stages(step)
        func.first, func.stages, func.graph = None, [], None
        previous = trajectory.kept[-1] if trajectory.kept and follows else None
        kept = Kept(previous, state, slope, stages, graph, len(trajectory.kept))
        trajectory.steps.append(step)
        trajectory.kept.append(kept)
        checkpoints.add(kept, size, step.draws_size)

    def _give_up_whole_graph(self, trajectory: Trajectory) -> None:
        """The graphs of all steps are not to be one after all: have the sweep go through them, if it can."""
        self.func.whole = False
        graphs = [kept.graph for kept in trajectory.kept if kept.graph is not None and kept.graph.stand_ins is None]
        initial, field = self.func.initial, self.func.field
        # What is behind the initial state would be counted twice, if f depends on that too.
        shared = any(tensor is initial for tensor in field.dependencies)
        if graphs and (field.stand_ins or shared or depends_on_another(initial, field.dependencies)):
            self.checkpoints.drop_graphs()
        for graph in graphs:
            graph.stand_ins = field.stand_ins

    def is_whole(self, trajectory: Trajectory) -> bool:
        """Whether the graphs of all steps of a solve are one."""
        whole = self.func.whole and bool(trajectory.kept) and trajectory.kept[-1].graph is not None
        if whole and not self.checkpoints.may_join():
            self._give_up_whole_graph(trajectory)
        return whole and self.func.whole

    def places(self, times: Tensor) -> list[tuple[int, float]]:
        """The step that each output after the first is made from, the first one to reach it, and its place there."""
        assert self.trajectory is not None
        self.read_times()
        steps = self.trajectory.steps
        ends = [step.t1 for step in steps]
        outputs = times.tolist()[1:]
        in_step, n = [], 0
        for t in outputs:
            while ends[n] < t:  # not by bisection: a grid may go back
                n += 1
            in_step.append(n)
        for n, following in itertools.pairwise(in_step):
            if n == following and self.trajectory.dense.end_stage and steps[n].draws is not None:
                raise RuntimeError(
                    "symplectic_adjoint: func draws random numbers, and interp='cubic' evaluates it anew for each "
                    "output time: with several in one step there is no gradient. Use interp='linear' or smaller steps"
                )
        if all(ends[n] == t for n, t in zip(in_step, outputs, strict=True)):
            return [(n, 1.0) for n in in_step]
        return self._thetas(in_step, times[1:])

    def place_of_event(self, t: Tensor) -> list[tuple[int, float]]:
        """The place of an event, which is in the last step, or at the start (step -1)."""
        assert self.trajectory is not None
        self.read_times()
        n = len(self.trajectory.steps) - 1
        return self._thetas([n], t.reshape(1)) if n >= 0 else [(-1, 0.0)]

    def _thetas(self, in_step: list[int], times: Tensor) -> list[tuple[int, float]]:
        """Steps, and the places of times in them, computed in the solver's precision as torchdiffeq does."""
        assert self.trajectory is not None
        steps = [self.trajectory.steps[n] for n in in_step]
        t0, t1 = (torch.tensor([getattr(step, end) for step in steps], dtype=times.dtype) for end in ("t0", "t1"))
        return list(zip(in_step, ((times.cpu() - t0) / (t1 - t0)).tolist(), strict=True))

    def finish(self, places: list[tuple[int, float]]) -> Trajectory:
        """The trajectory, with the places of its outputs."""
        trajectory, self.trajectory = self.trajectory, None
        assert trajectory is not None
        trajectory.outputs = places
        if trajectory.kept:
            trajectory.kept[-1].end = self.end_state()
        report, checkpoints = self.func.field.report, self.checkpoints
        report.accepted = len(trajectory.steps)
        report.checkpoint_bytes, report.graph_bytes = checkpoints.most_states, checkpoints.most_graphs
        report.budget_bytes, report.kept = checkpoints.budget, checkpoints.chosen()
        return trajectory
