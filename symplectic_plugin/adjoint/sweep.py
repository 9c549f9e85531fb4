"""The adjoint sweep: the symplectic partner's steps, backwards over a recorded solve, one graph of f at a time.

With kappa_i = h b_i Lambda_i, the cotangent of the slope k_i, no weight is divided by, so that weights may be zero:

    kappa_i = h (b_i lambda_{n+1} + sum_m b_i(theta_m) g_m + sum_j a_ji xi_j) + [i last] phi_{n+1}
    xi_i = (df/dx)^T kappa_i  at (t_n + c_i h, X_i)
    lambda_n = lambda_{n+1} + sum_m g_m + sum_i xi_i,   phi_n = kappa_1 where the first slope was handed on

g_m is the cotangent of an output at t_n + theta_m h. Where the first slope is handed on from the step before, it has no
xi of its own: its cotangent phi goes to the slope that it is. (Matsubara, Miyatake, Yaguchi, NeurIPS 2021, eq. 7 and
algorithm 2, with outputs inside steps and slopes handed on.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..field.cotangents import CotangentSums, wide
from ..field.graphs import in_type_of
from ..field.random_numbers import GeneratorStates
from ..field.vector_field import VectorField
from ..methods.explicit import combined
from ..methods.tableau import ButcherTableau
from ..record.stage_graphs import StageGraphs
from ..record.step_graph import StepGraph
from ..record.trajectory import Trajectory
from .implicit_step_back import ImplicitStepBack
from .recompute import Retaker
from .times import StepTimes, TimeCotangents, gathered, zero


def sweep(
    trajectory: Trajectory,
    field: VectorField,
    sums: CotangentSums,
    cotangent: Tensor,
    want_times: bool,
    keep: bool = False,
) -> tuple[Tensor, TimeCotangents | None]:
    """Carry the outputs' cotangents back to the initial state.

    Args:
        trajectory: the solve.
        field: its vector field.
        sums: takes the cotangents of what f depends on.
        cotangent: of the outputs, shape (M + 1, *state).
        want_times: whether the cotangents of the times are needed.
        keep: whether the checkpoints must stay, for another sweep.

    Returns:
        The cotangent of the initial state, and those of the times if wanted.
    """
    given = cotangent.contiguous()
    back = _step_back(trajectory)(trajectory, field, sums, given, want_times, keep)
    places = trajectory.outputs
    times: list[StepTimes] = []
    adjoint = torch.zeros_like(given[0], dtype=wide(given.dtype))
    slope_cotangent: Tensor | None = None
    last = trajectory.tableau.stages - 1
    end = len(places)
    n = len(trajectory.steps)
    while n > 0:
        n -= 1
        recalled: tuple[Tensor, Tensor | None] | None = None
        if isinstance(back, _StepBack) and back.makes_graph(n):
            recalled = trajectory.checkpoints.recall(trajectory.kept[n], back.retaker.advance)
            back.make_graph(n, *recalled)
        pulled = back.pull(n, end, adjoint, {last: slope_cotangent})
        if pulled is not None:
            first, end, adjoint, slope_cotangent = pulled
        else:
            first = n
            while end > 0 and places[end - 1][0] == n and back.is_end[end - 1]:
                adjoint = adjoint + given[end]
                end -= 1
            begin = end
            while begin > 0 and places[begin - 1][0] == n:
                begin -= 1
            state, slope = recalled or trajectory.checkpoints.recall(trajectory.kept[n], back.retaker.advance)
            adjoint, slope_cotangent, of_step = back(n, state, slope, begin, end, adjoint, {last: slope_cotangent})
            if of_step is not None:
                times.append(of_step)
            end = begin
        if not keep:
            for kept in trajectory.kept[first : n + 1]:
                trajectory.checkpoints.release(kept)
        elif recalled is not None:
            trajectory.kept[n].graph = None
        n = first
    trajectory.checkpoints.end_of_recall()
    field.require_same(back.worst_deviation)
    # The first output is the initial state, and so is an event that is met at once.
    adjoint = (adjoint + given[: end + 1].sum(0)).to(given.dtype)
    return adjoint, gathered(times[::-1], given) if want_times else None


def sweep_step(
    trajectory: Trajectory,
    field: VectorField,
    sums: CotangentSums,
    state: Tensor,
    slope: Tensor | None,
    cotangent: Tensor,
    slope_cotangents: Mapping[int, Tensor | None],
    want_times: bool,
    keep: bool = False,
    following: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, TimeCotangents | None]:
    """Carry cotangents back over a trajectory's only step.

    Args:
        trajectory: the step, without outputs.
        field, sums, want_times, keep: as for `sweep`.
        state: at its start.
        slope: there, if it was handed on and is not to be evaluated again.
        cotangent: of the state at its end.
        slope_cotangents: by stage, of its slopes, in the state's shape; None for zero.
        following: the state that it ended in, if it is known.

    Returns:
        The cotangent of the state at its start, that of its first slope if that was handed on, and those of its times.
    """
    nothing = cotangent.new_zeros(1, *cotangent.shape)
    back = _step_back(trajectory)(trajectory, field, sums, nothing, want_times, keep)
    back.following = following
    adjoint, first_slope, times = cotangent, None, None
    made_again = isinstance(back, _StepBack) and back.makes_graph(0)
    if isinstance(back, _StepBack) and made_again:
        back.make_graph(0, state, slope)
    pulled = back.pull(0, 0, adjoint, slope_cotangents)
    if pulled is not None:
        _, _, adjoint, first_slope = pulled
    else:
        adjoint, first_slope, times = back(0, state, slope, 0, 0, adjoint, slope_cotangents)
    if made_again:
        trajectory.kept[0].graph = None
    field.require_same(back.worst_deviation)
    return adjoint, first_slope, None if times is None else gathered([times], nothing)


_NO_OUTPUTS = torch.zeros(0)


def _step_back(trajectory: Trajectory) -> type[_StepBack] | type[ImplicitStepBack]:
    return _StepBack if trajectory.implicit is None else ImplicitStepBack


class _StepBack:
    """One step of the partner method."""

    def __init__(
        self,
        trajectory: Trajectory,
        field: VectorField,
        sums: CotangentSums,
        given: Tensor,
        want_times: bool,
        keep: bool,
    ) -> None:
        self.trajectory = trajectory
        self.field = field
        self.sums = sums
        self.given = given
        self.keep = keep
        dense, tableau = trajectory.dense, trajectory.tableau
        self.theta = self.device_theta = self.weights = self.device_weights = _NO_OUTPUTS
        self.derivatives = _NO_OUTPUTS if want_times else None
        self.is_end: list[bool] = []
        if trajectory.outputs:
            self.theta = torch.tensor([theta for _, theta in trajectory.outputs], dtype=torch.float64)
            self.weights = dense.weights(self.theta)
            self.device_theta, self.device_weights = self.theta.to(given), self.weights.to(given)
            self.derivatives = dense.derivatives(self.theta) if want_times else None
            self.is_end = [is_end and not want_times for is_end in trajectory.ends()]
        self.retaker = Retaker(trajectory, field)
        self.with_end = tableau.with_end_stage() if dense.end_stage else tableau
        self.following = trajectory.end
        self.worst_deviation = zero(given)

    def __call__(
        self,
        n: int,
        state: Tensor,
        slope: Tensor | None,
        begin: int,
        end: int,
        adjoint: Tensor,
        slope_cotangents: Mapping[int, Tensor | None],
    ) -> tuple[Tensor, Tensor | None, StepTimes | None]:
        """Carry the adjoint from the end of step n to its start.

        Args:
            n: which step.
            state: the state at its start.
            slope: the slope there, if it was handed on and is not to be evaluated again.
            begin, end: which outputs lie in it.
            adjoint: the cotangent of x_{n+1}.
            slope_cotangents: by stage, the cotangents of slopes that are used outside the step, None for zero: that of
                the last one, where it is handed on.

        Returns:
            The cotangent of x_n; that of the slope that was handed on to step n, None where none was; and those of the
            step's times, if wanted.
        """
        trajectory, field, sums = self.trajectory, self.field, self.sums
        step, kept = trajectory.steps[n], trajectory.kept[n]
        h, given = step.h, self.given[begin + 1 : end + 1]
        tableau = trajectory.tableau if end == begin else self.with_end
        s, later, (a, b) = tableau.stages, tableau.later, tableau.numbers
        weighted = [False] * s if end == begin else (self.weights[begin:end] != 0).any(0).tolist()
        stage_times, keywords = self.retaker.stage_times[n], trajectory.stage_keywords(step)
        times = None if self.derivatives is None else StepTimes(given, self.theta, self.derivatives, begin, end)
        start = state.to(given.dtype)
        # Nothing is kept of a stage that was added for outputs; and random numbers must be drawn in the same order.
        added = s - trajectory.tableau.stages
        graphs = None if added and step.draws is not None else self._stage_graphs(n)
        stages = None if step.draws is not None or added else kept.stages
        handed_on = 1 if step.slope_handed_on else 0
        draws: Sequence[GeneratorStates | None]
        slopes: list[Tensor | None]
        if graphs is not None:
            slopes, draws = [*graphs.slopes, *[None] * added], [step.draws_before(0)] * s
            stages = graphs.stages[1:]
        elif stages is None:
            slopes, draws = self.retaker.take(tableau, n, start, slope)
        else:
            slopes, draws = [None] * s, [None] * s
            if times is not None and handed_on:
                slopes[0] = field(stage_times[0], start, keywords[0]) if slope is None else slope

        # By stage, xi; and while it goes back, `slopes` gives up those that no earlier stage is made of, so that both
        # together take the memory of s states, and X_i is formed from the slopes before it once more.
        xi: list[Tensor | None] = [None] * s
        first_slope_cotangent: Tensor | None = None
        # rate is kappa_i / h, less phi: what the size of the step, which may be 0, acts through. Where that does not
        # matter it is h times that.
        scale = h if times is None else 1.0
        for i in reversed(range(s)):
            rate = adjoint * (scale * b[i]) if b[i] != 0 else None
            for j in later[i]:
                if (of_later := xi[j]) is not None:
                    weight = scale * a[j][i]
                    rate = of_later * weight if rate is None else rate.add_(of_later, alpha=weight)
            if weighted[i]:
                outside = _weighted(given, self.device_weights[begin:end, i]).mul_(scale)
                rate = outside if rate is None else rate.add_(outside)
            kappa = rate * h if rate is not None and times is not None else rate
            if (phi := slope_cotangents.get(i)) is not None:
                kappa = phi if kappa is None else kappa + phi

            if i < handed_on:
                if times is not None and slopes[0] is not None:
                    times.add_slope(0, slopes[0], rate)
                first_slope_cotangent = kappa
                break
            if kappa is not None or (times is not None and times.needs_slope(i)):
                is_there = stages is not None and 0 < i <= len(stages)
                at = stages[i - 1] if stages is not None and is_there else combined(start, a[i], slopes, h)
                evaluation = graphs.evaluations[i] if graphs is not None and i < s - added else None
                if evaluation is None:
                    if (draw := draws[i]) is not None:
                        field.generators.set(draw)
                    want_time = times is not None
                    evaluation = field.differentiable(stage_times[i], at, keywords[i], want_time, sums.stand_ins)
                    field.report.recomputed += 1
                slopes[i] = current = evaluation.slope.detach()
                tau = None
                if kappa is not None:
                    xi[i], tau = field.vjp(evaluation, kappa, sums, times is not None, graphs is not None and self.keep)
                    field.report.vjps += 1
                del evaluation
                if times is not None:
                    times.add_slope(i, current, rate)
                    times.add_stage_time(float(tableau.c[i]), tau)
            if stages is None:
                if i == trajectory.tableau.stages - 1:
                    self._compare(trajectory.tableau, h, start, slopes)
                slopes[i:] = []

        if stages is not None and graphs is None:
            if handed_on and slopes[0] is None and s > 1 and h * a[1][0] != 0:
                slopes[0] = (stages[0] - start) / (h * a[1][0])  # the second stage is made of it alone
            self._compare(tableau, h, start, slopes)
        self.following = None if kept.previous is None else state  # a step that follows no other may start elsewhere
        if end > begin:
            adjoint = adjoint + given.sum(0)
        moved = _sum(xi)  # first: each by itself would be rounded to the adjoint's last digit
        return adjoint if moved is None else adjoint + moved, first_slope_cotangent, times

    def makes_graph(self, n: int) -> bool:
        """Whether the graph of step n is to be made again."""
        kept = self.trajectory.kept[n]
        return self.trajectory.checkpoints.makes_graphs_again and kept.graph is None and kept.stages is None

    def make_graph(self, n: int, state: Tensor, slope: Tensor | None) -> None:
        """Make the graph of step n again, which is kept from then on.

        Args:
            n: which step.
            state: the state at its start.
            slope: the slope there, if it was handed on and is not to be evaluated again.
        """
        trajectory, want_time = self.trajectory, self.derivatives is not None
        by_stage, start = want_time or trajectory.dense.end_stage, state.to(self.given.dtype)
        graph = self.retaker.graph(n, start, slope, self.sums.stand_ins, by_stage, want_time)
        self._compare(trajectory.tableau, trajectory.steps[n].h, start, [slope.detach() for slope in graph.slopes])
        trajectory.kept[n].graph = graph

    def _stage_graphs(self, n: int) -> StageGraphs | None:
        """The graphs of step n's evaluations, if they were kept and can be used."""
        graph = self.trajectory.kept[n].graph
        # They end in the leaves that stood in for dependencies then.
        return graph if isinstance(graph, StageGraphs) and graph.stand_ins is self.sums.stand_ins else None

    def pull(
        self, n: int, end: int, adjoint: Tensor, slope_cotangents: Mapping[int, Tensor | None]
    ) -> tuple[int, int, Tensor, Tensor | None] | None:
        """Carry the adjoint back by the graph of step n, and of those that it goes on from, if they were kept.

        Args:
            n, adjoint, slope_cotangents: as for a call.
            end: how many outputs lie in steps up to n.

        Returns:
            The first step that it was carried back over; how many outputs lie in steps before that; the cotangents of
            the state at its start and of the slope that was handed on to it. None without a graph that can be used.
        """
        trajectory, field, report = self.trajectory, self.field, self.field.report
        steps, places = trajectory.steps, trajectory.outputs
        graph = trajectory.kept[n].graph
        if not isinstance(graph, StepGraph) or self.derivatives is not None:
            return None
        if graph.stand_ins is not self.sums.stand_ins:  # it ends in the leaves that stood in for dependencies then
            return None
        first, evaluated = n - graph.index, 0
        is_wide = adjoint.dtype != self.given.dtype
        while is_wide and end > 0 and places[end - 1][0] == n and self.is_end[end - 1]:
            adjoint = adjoint + self.given[end]
            end -= 1
        # In half precision the graph, of this step alone, is to give what is added to the adjoint.
        outputs: list[Tensor] = []
        cotangents: list[Tensor] = []

        def add(output: Tensor, cotangent: Tensor) -> None:
            if output.requires_grad:
                outputs.append(output)
                cotangents.append(in_type_of(output, cotangent))

        add(graph.moved if is_wide else graph.end, adjoint)
        for i, cotangent in slope_cotangents.items():
            if cotangent is not None:
                add(graph.slopes[i], cotangent)
        for j in range(n, first - 1, -1):
            graph = trajectory.kept[j].graph
            assert isinstance(graph, StepGraph)
            evaluated += graph.evaluations
            while end > 0 and places[end - 1][0] == j and self.is_end[end - 1]:
                add(graph.end, self.given[end])
                end -= 1
            begin = end
            while begin > 0 and places[begin - 1][0] == j:
                begin -= 1
            if begin < end:
                if trajectory.dense.end_stage:
                    return None
                given, weights = self.given[begin + 1 : end + 1], self.device_weights[begin:end]
                of_start = given.sum(0)
                if trajectory.dense.linear:
                    of_end = _weighted(given, self.device_theta[begin:end])
                    add(graph.moved if is_wide else graph.end, of_end)
                    of_start = of_start if is_wide else of_start - of_end
                else:
                    for i in (self.weights[begin:end] != 0).any(0).nonzero().flatten().tolist():
                        add(graph.slopes[i], _weighted(given, weights[:, i]).mul_(steps[j].h))
                add(graph.origin, of_start)
            end = begin
        pulled = graph.pull(outputs, cotangents, self.sums, self.keep) if outputs else (None, None)
        if pulled is None:
            return None
        of_state, of_slope = pulled
        before = torch.zeros_like(adjoint) if of_state is None else of_state
        if is_wide:
            before = adjoint if of_state is None else adjoint + of_state
        report.vjps += evaluated
        self.following = None if trajectory.kept[first].previous is None else graph.leaf.detach()
        if of_slope is None or steps[first].slope_handed_on:
            return first, end, before, of_slope
        # The first slope was evaluated outside the step, at its start.
        if (draw := steps[first].draws_before(0)) is not None:
            field.generators.set(draw)
        t, keywords = self.retaker.stage_times[first][0], steps[first].first_keywords
        evaluation = field.differentiable(t, graph.leaf, keywords, False, self.sums.stand_ins)
        report.recomputed += 1
        product, _ = field.vjp(evaluation, of_slope, self.sums, False, self.keep)
        return first, end, before if product is None else before + product, None

    def _compare(self, tableau: ButcherTableau, h: float, start: Tensor, slopes: Sequence[Tensor | None]) -> None:
        """Note how far a step ends now from where the solve went on, if all slopes that it is made of are there."""
        expected, b = self.following, tableau.numbers[1]
        if (
            expected is None
            or not any(b)
            or any(slope is None and weight != 0 for slope, weight in zip(slopes, b, strict=True))
        ):
            return
        moved = combined(None, b, slopes, h)
        end = start + moved
        if end.device.type == "cpu" and torch.equal(end, expected):  # elsewhere it would have to be waited for
            return
        off = torch.linalg.vector_norm(end - expected)
        # Relative to what was added up, of which little may be left.
        size = torch.linalg.vector_norm(start) + torch.linalg.vector_norm(expected) + torch.linalg.vector_norm(moved)
        self.worst_deviation = torch.fmax(self.worst_deviation, off / size)


def _weighted(given: Tensor, weights: Tensor) -> Tensor:
    """sum_m w_m g_m, for g of shape (m, *state)."""
    shape = given.shape[1:]
    return torch.mv(given.reshape(len(given), shape.numel()).T, weights).view(shape)


def _sum(terms: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    total: Tensor | None = None
    is_new = False
    for term in terms:
        if term is None:
            continue
        if total is None:
            total = term
        else:
            total, is_new = (total.add_(term) if is_new else total + term), True
    return total
