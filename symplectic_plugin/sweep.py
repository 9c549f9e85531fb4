"""The adjoint sweep: the symplectic partner's steps, backwards over a recorded solve, one graph of f at a time.

With kappa_i = h b_i Lambda_i, the cotangent of the slope k_i, no weight is divided by, so that weights may be zero:

    kappa_i = h (b_i lambda_{n+1} + sum_m b_i(theta_m) g_m + sum_j a_ji xi_j) + [i last] phi_{n+1}
    xi_i = (df/dx)^T kappa_i  at (t_n + c_i h, X_i)
    lambda_n = lambda_{n+1} + sum_m g_m + sum_i xi_i,   phi_n = kappa_1 where the first slope was handed on

g_m is the cotangent of an output at t_n + theta_m h. Where the first slope is handed on from the step before, it has no
xi of its own: its cotangent phi goes to the slope that it is. (Matsubara, Miyatake, Yaguchi, NeurIPS 2021, eq. 7 and
algorithm 2, with outputs inside steps and slopes handed on.) That is so for explicit methods; `implicit.step_back` has
the others'.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoints import Kept
from .cotangents import CotangentSums
from .implicit.step_back import ImplicitStepBack
from .randomness import GeneratorStates
from .retake import Retaker
from .runge_kutta import Workspace
from .step_graph import StepGraph
from .step_times import StepTimes, TimeCotangents, gathered, zero
from .trajectory import Step, Trajectory
from .vector_field import VectorField


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
    given = cotangent.reshape(len(cotangent), cotangent[0].numel())
    back = _step_back(trajectory)(trajectory, field, sums, given, cotangent.shape[1:], want_times, keep)
    places = trajectory.outputs
    times: list[StepTimes] = []
    adjoint = torch.zeros_like(given[0])
    slope_cotangent: Tensor | None = None
    last = trajectory.tableau.stages - 1
    end = len(places)
    for n in reversed(range(len(trajectory.steps))):
        begin = end
        while begin > 0 and places[begin - 1][0] == n:
            begin -= 1
        kept = trajectory.kept[n]
        state, slope = trajectory.checkpoints.recall(kept, back.retaker.advance)
        adjoint, slope_cotangent, of_step = back(n, state, slope, begin, end, adjoint, {last: slope_cotangent})
        if not keep:
            trajectory.checkpoints.release(kept)
        if of_step is not None:
            times.append(of_step)
        end = begin
    field.require_same(back.worst_deviation)
    # The first output is the initial state, and so is an event that is met at once.
    adjoint = adjoint + given[: end + 1].sum(0)
    return adjoint.view(cotangent.shape[1:]), gathered(times[::-1], given) if want_times else None


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
    flat = {i: None if slope is None else slope.reshape(-1) for i, slope in slope_cotangents.items()}
    nothing = cotangent.new_zeros(1, cotangent.numel())
    back = _step_back(trajectory)(trajectory, field, sums, nothing, cotangent.shape, want_times, keep)
    back.following = following
    adjoint, first_slope, times = back(0, state, slope, 0, 0, cotangent.reshape(-1), flat)
    field.require_same(back.worst_deviation)
    first_slope = None if first_slope is None else first_slope.view(cotangent.shape)
    return adjoint.view(cotangent.shape), first_slope, None if times is None else gathered([times], nothing)


def _step_back(trajectory: Trajectory) -> type[_StepBack] | type[ImplicitStepBack]:
    return _StepBack if trajectory.implicit is None else ImplicitStepBack


class _StepBack:
    """One step of the partner method, for an explicit one."""

    def __init__(
        self,
        trajectory: Trajectory,
        field: VectorField,
        sums: CotangentSums,
        given: Tensor,
        shape: torch.Size,
        want_times: bool,
        keep: bool,
    ) -> None:
        self.trajectory = trajectory
        self.field = field
        self.sums = sums
        self.given = given
        self.shape = shape
        self.keep = keep
        # Graphs of the forward pass end in the leaves that stood in for dependencies then.
        self.graphs_hold = sums.stand_ins is field.stand_ins
        dense, tableau = trajectory.dense, trajectory.tableau
        self.theta = torch.tensor([theta for _, theta in trajectory.outputs], dtype=torch.float64)
        self.weights = dense.weights(self.theta)
        self.device_weights = self.weights.to(given)
        self.derivatives = dense.derivatives(self.theta) if want_times else None
        # A row a stage: its slope while the step is taken forward again, then, on the way back, xi in its place. So the
        # stages need s states, and X_i is formed from the slopes before it once more when its turn comes.
        self.retaker = Retaker(trajectory, field, given[0], shape)
        self.plain = self.retaker.plain
        self.with_end = Workspace(tableau.with_end_stage(), given[0]) if dense.end_stage else self.plain
        # Where stages were kept nothing is taken again, and the slopes come one by one, the last one first.
        self._slopes: Workspace | None = None
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
            adjoint: the cotangent of x_{n+1}, flat.
            slope_cotangents: by stage, the cotangents of slopes that are used outside the step, flat, None for zero:
                that of the last one, where it is handed on.

        Returns:
            The cotangent of x_n; that of the slope that was handed on to step n, None where none was; and those of the
            step's times, if wanted.
        """
        trajectory, field, report, shape = self.trajectory, self.field, self.field.report, self.shape
        step, kept = trajectory.steps[n], trajectory.kept[n]
        has_outputs = end > begin
        work = self.with_end if has_outputs else self.plain
        b, s = work.b, work.stages
        h = step.h
        work.set_size(h)
        stage_times, keywords = self.retaker.stage_times(n), trajectory.stage_keywords(step)
        start = state.reshape(-1).to(work.rows.dtype)
        # Nothing is kept of a stage that was added for outputs; and random numbers must be drawn in the same order.
        stages = None if step.draws is not None or work.stages > trajectory.tableau.stages else kept.stages
        taken_again = stages is None
        given = self.given[begin + 1 : end + 1]
        weights, weighted = self.device_weights, [False] * s
        if has_outputs:
            weights, weighted = weights[begin:end], (self.weights[begin:end] != 0).any(0).tolist()
        times = None if self.derivatives is None else StepTimes(given, self.theta, self.derivatives, begin, end)

        if kept.graph is not None and self.graphs_hold and times is None and work is self.plain:
            pulled = self._pull(kept.graph, step, adjoint, given, weights, weighted, slope_cotangents)
            if pulled is not None:
                before, of_slope = pulled
                self.following = state
                if of_slope is None or step.slope_handed_on:
                    return before, of_slope, None
                # The first slope was evaluated outside the step, at its start.
                evaluation = kept.graph.first if kept.graph is not None else None
                if evaluation is None:
                    if (draw := step.draws_before(0)) is not None:
                        field.generators.set(draw)
                    evaluation = field.differentiable(stage_times[0], state, keywords[0], False, self.sums.stand_ins)
                    report.recomputed += 1
                product, _ = field.vjp(evaluation, of_slope.view(shape), self.sums, False, self.keep)
                report.vjps += 1
                return before if product is None else before + product.reshape(-1), None, None

        draws: list[GeneratorStates | None] = [None] * s
        if taken_again:
            draws = self.retaker.take(work, n, start, slope)
        elif times is not None and step.slope_handed_on:
            work.put(0, field(stage_times[0], state, keywords[0]) if slope is None else slope)
        slopes = None if taken_again else self._kept_slopes()

        handed_on = 1 if step.slope_handed_on else 0
        last = trajectory.tableau.stages - 1
        nonzero = [False] * s
        first_slope_cotangent: Tensor | None = None
        for i in reversed(range(s)):
            rate: Tensor | None = None  # kappa_i / h, less phi: what the size of the step, which may be 0, acts through
            if any(nonzero[j] for j in work.later[i]):
                rate = work.partner(i)
            if b[i] != 0:
                rate = adjoint * b[i] if rate is None else rate.add_(adjoint, alpha=b[i])
            if weighted[i]:
                rate = torch.mv(given.T, weights[:, i]) if rate is None else rate.addmv_(given.T, weights[:, i])
            kappa = rate
            if rate is not None:
                kappa = rate.mul_(h) if times is None else rate * h
            if (outside := slope_cotangents.get(i)) is not None:
                kappa = outside if kappa is None else kappa + outside

            if i < handed_on:
                if times is not None:
                    times.add_slope(0, work.row[0], rate)
                first_slope_cotangent = kappa
                break
            current = product = tau = None
            if kappa is not None or (times is not None and times.needs_slope(i)):
                at = stages[i - 1] if stages is not None and i > 0 else work.stage(start, i)
                if (draw := draws[i]) is not None:
                    field.generators.set(draw)
                evaluation = field.differentiable(
                    stage_times[i], at.view(shape), keywords[i], times is not None, self.sums.stand_ins
                )
                report.recomputed += 1
                current = evaluation.slope.detach()
                if kappa is not None:
                    product, tau = field.vjp(evaluation, kappa.view(shape), self.sums, times is not None)
                    report.vjps += 1
                del evaluation
            if times is not None and current is not None:
                times.add_slope(i, current.reshape(-1).to(work.rows.dtype), rate)
                times.add_stage_time(work.c[i], tau)
            if slopes is not None:
                slopes.put(i, current)
            elif taken_again and i == last:
                self._compare(work, start, current)
            nonzero[i] = product is not None
            work.put(i, product)

        if slopes is not None:
            self._compare_kept(slopes, h, start, kept, handed_on)
        self.following = state
        if has_outputs:
            adjoint = adjoint + given.sum(0)
        if any(nonzero):
            adjoint = adjoint + work.rows[handed_on:s].sum(0)
        return adjoint, first_slope_cotangent, times

    def _pull(
        self,
        graph: StepGraph,
        step: Step,
        adjoint: Tensor,
        given: Tensor,
        weights: Tensor,
        weighted: list[bool],
        slope_cotangents: Mapping[int, Tensor | None],
    ) -> tuple[Tensor, Tensor | None] | None:
        """The same by the graph that was kept of the step; None if that can't be used."""
        cotangents: dict[int, Tensor] = {
            i: torch.mv(given.T, weights[:, i]).mul_(step.h) for i, is_weighted in enumerate(weighted) if is_weighted
        }
        for i, outside in slope_cotangents.items():
            if outside is not None:
                cotangents[i] = cotangents[i] + outside if i in cotangents else outside
        shaped = [(i, cotangent.view(self.shape)) for i, cotangent in cotangents.items()]
        pulled = graph.pull(adjoint.view(self.shape), shaped, self.sums, self.keep)
        if pulled is None:
            return None
        self.field.report.vjps += len(graph.slopes) - (graph.first_slope is not None)
        of_state, of_slope = (None if x is None else x.reshape(-1) for x in pulled)
        before = adjoint if of_state is None else of_state
        if len(given):
            before = before + given.sum(0)
        return before, of_slope

    def _kept_slopes(self) -> Workspace:
        """Where the slopes of a step are put whose stages were kept."""
        if self._slopes is None:
            self._slopes = Workspace(self.trajectory.tableau, self.given[0])
        return self._slopes

    def _compare(self, work: Workspace, start: Tensor, last_slope: Tensor | None) -> None:
        """Note how far the step ends now from where the solve went on, its slopes but the last being in place."""
        last = self.trajectory.tableau.stages - 1
        missing = any(work.b[i] != 0 and not work.later[i] for i in range(last))
        if self.following is None or missing or (last_slope is None and work.b[last] != 0):
            return
        work.put(last, last_slope)
        self._note_deviation(start, work.combined(last + 1))

    def _compare_kept(self, slopes: Workspace, h: float, start: Tensor, kept: Kept, handed_on: int) -> None:
        """The same for a step whose stages were kept."""
        slopes.set_size(h)
        if handed_on and slopes.b[0] != 0:
            if kept.stages is None or slopes.stages == 1 or h * slopes.a[1][0] == 0:
                return
            # The second stage is made of it alone.
            slopes.put(0, (kept.stages[0] - start) / (h * slopes.a[1][0]))
        if self.following is not None:
            self._note_deviation(start, slopes.combined(slopes.stages))

    def _note_deviation(self, start: Tensor, moved: Tensor) -> None:
        assert self.following is not None
        expected = self.following.reshape(-1)
        off = torch.linalg.vector_norm(start + moved - expected)
        # Relative to what was added up, of which little may be left.
        size = torch.linalg.vector_norm(start) + torch.linalg.vector_norm(expected) + torch.linalg.vector_norm(moved)
        self.worst_deviation = torch.fmax(self.worst_deviation, off / size)
