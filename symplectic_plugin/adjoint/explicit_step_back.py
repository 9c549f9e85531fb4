"""The step back of an explicit method: its symplectic partner's step, one graph of f at a time.

With kappa_i = h b_i Lambda_i, the cotangent dL/dk_i of the slope, no weight is divided by, so that weights may be zero:

    kappa_i = h (b_i lambda_{n+1} + sum_m b_i(theta_m) g_m + sum_j a_ji xi_j) + phi_i
    xi_i = (df/dx)^T kappa_i  at (t_n + c_i h, X_i)
    lambda_n = lambda_{n+1} + sum_m g_m + sum_i xi_i,   phi = kappa_1 of the step after where the slope is handed on

g_m is the cotangent of an output at t_n + theta_m h, phi_i what acts on slope i from outside the step. A first slope
that is handed on from the step before has no xi: its cotangent goes to the slope that it is. (Matsubara, Miyatake,
Yaguchi, NeurIPS 2021, eq. 7 and algorithm 2, with outputs inside steps and slopes handed on.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..field.evaluation import Evaluation
from ..field.random_numbers import GeneratorStates
from ..methods.explicit import weighted_sum
from ..methods.tableau import ButcherTableau
from ..record.checkpoint import Checkpoint
from ..record.stage_graphs import StageGraphs
from .recompute import StepEvaluations
from .step_back import StepBack, StepEnd, StepStart
from .times import StepTimeCotangents


@dataclass
class _Stages:
    """The stages of a step as the backward pass has them.

    Args:
        evaluations: evaluates f at them.
        slopes: slopes that are known, None for the others. Given up from the last one on where no states are kept.
        states: states of the stages but the first, None where they are made of the slopes.
        graphs: graphs of the evaluations, if they are kept.
        draws: states of the random number generators before each evaluation, None where f does not draw.
    """

    evaluations: StepEvaluations
    slopes: list[Tensor | None]
    states: Sequence[Tensor] | None
    graphs: StageGraphs | None
    draws: Sequence[GeneratorStates | None]


class ExplicitStepBack(StepBack):
    """The step back of an explicit method, for one sweep. Arguments and attributes are `StepBack`'s."""

    @functools.cached_property
    def _with_end(self) -> ButcherTableau:
        """The tableau of a step with outputs in it: one stage more, if the interpolant needs the slope at the end."""
        method = self._trajectory.method
        return method.tableau.with_end_stage() if method.dense.end_stage else method.tableau

    def __call__(self, at: StepEnd) -> StepStart:
        """Carry the adjoint from the end of a step to its start."""
        trajectory, outputs = self._trajectory, self._outputs
        checkpoint = trajectory.checkpoints[at.n]
        step, h = checkpoint.step, checkpoint.step.h
        tableau = self._with_end if at.end > at.begin else trajectory.method.tableau
        start = at.state.to(outputs.given.dtype)
        times = outputs.times(at)
        stages = self._stages(at, checkpoint, tableau, start)
        xi: list[Tensor | None] = [None] * tableau.stages
        first_slope: Tensor | None = None
        for i in reversed(range(tableau.stages)):
            over_h, of_slope = self._slope_cotangents(at, tableau, h, xi, i)
            if i == 0 and step.slope_handed_on:
                if times is not None and stages.slopes[0] is not None:
                    times.add_slope(0, stages.slopes[0], over_h)
                first_slope = of_slope
                break
            if of_slope is not None or (times is not None and times.needs_slope(i)):
                evaluation = self._evaluation(stages, tableau, start, i)
                if self._field.draws and (known := stages.slopes[i]) is not None:
                    # Another thread may have drawn in between.
                    self._note(evaluation.slope.detach() - known, known)
                stages.slopes[i] = evaluation.slope.detach()
                if times is not None:
                    times.add_slope(i, evaluation.slope.detach(), over_h)
                xi[i] = self._through(evaluation, of_slope, float(tableau.c[i]), times, kept=stages.graphs is not None)
                del evaluation
            if stages.states is None:
                if i == trajectory.method.tableau.stages - 1:
                    self._compare(trajectory.method.tableau, h, start, stages.slopes)
                stages.slopes[i:] = []  # with `xi` they take the memory of s states, and no earlier stage needs them
        if stages.states is not None and stages.graphs is None:
            self._compare_kept(tableau, h, start, stages, slope_handed_on=step.slope_handed_on)
        # A step that follows no other may start elsewhere.
        self._following = None if checkpoint.previous is None else at.state
        adjoint = at.adjoint + outputs.in_step(at).sum(0) if at.end > at.begin else at.adjoint
        moved = _sum(xi)  # first: each by itself would be rounded to the adjoint's last digit
        return StepStart(adjoint if moved is None else adjoint + moved, first_slope, times)

    def _stages(self, at: StepEnd, checkpoint: Checkpoint, tableau: ButcherTableau, start: Tensor) -> _Stages:
        """Have the stages of a step: from the graphs or the states that are kept, or recomputed."""
        step, own = checkpoint.step, checkpoint.method.tableau
        evaluations = StepEvaluations(self._field, checkpoint, self._times[at.n])
        s, added = tableau.stages, tableau.stages - own.stages
        nothing: list[None] = [None] * s
        if added == 0 or step.draws is None:  # else numbers must be drawn again for the added stage, in the same order
            graphs = self._graphs(at, checkpoint, evaluations, start)
            if graphs is not None:
                draws = [step.draws_before(0), *nothing[1:]]  # the first slope may have been evaluated outside the step
                return _Stages(evaluations, [*graphs.slopes, *nothing[:added]], graphs.stages[1:], graphs, draws)
        if checkpoint.stages is None or added or step.draws is not None:
            slopes, draws = evaluations.slopes(tableau, start, at.slope)
            return _Stages(evaluations, slopes, None, None, draws)
        slopes = list(nothing)
        if step.slope_handed_on and self._outputs.want_times:
            given = self._field(evaluations.times[0], start, evaluations.keywords[0]) if at.slope is None else at.slope
            slopes[0] = given
        return _Stages(evaluations, slopes, checkpoint.stages, None, nothing)

    def _graphs(
        self, at: StepEnd, checkpoint: Checkpoint, evaluations: StepEvaluations, start: Tensor
    ) -> StageGraphs | None:
        """Have the graphs of a step's evaluations, if they are kept or to be recomputed, and can be used."""
        kept, stand_ins = checkpoint.graphs, self._sums.stand_ins
        if isinstance(kept, StageGraphs) and kept.stand_ins is stand_ins:
            return kept
        if kept is not None or checkpoint.stages is not None or not self._trajectory.store.recomputes_graphs:
            return None
        tableau = checkpoint.method.tableau
        graphs = evaluations.graphs(tableau, start, at.slope, stand_ins, want_time=self._outputs.want_times)
        self._compare(tableau, checkpoint.step.h, start, graphs.slopes)
        return graphs

    def _slope_cotangents(
        self, at: StepEnd, tableau: ButcherTableau, h: float, xi: Sequence[Tensor | None], i: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute dL/dk_i / h, without what acts on the slope from outside the step, and dL/dk_i.

        The first is what the cotangent of the step's size is made of, which may be 0. Where that is not wanted, the
        first is not either.
        """
        a, b = tableau.numbers
        scale = 1.0 if self._outputs.want_times else h
        over_h = at.adjoint * (scale * b[i]) if b[i] != 0 else None
        for j in tableau.later[i]:
            if (later := xi[j]) is not None:
                weight = scale * a[j][i]
                over_h = later * weight if over_h is None else over_h.add_(later, alpha=weight)
        if self._outputs.act_on(at, i):
            outside = self._outputs.on_slope(at, i).mul_(scale)
            over_h = outside if over_h is None else over_h.add_(outside)
        of_slope = over_h * h if over_h is not None and self._outputs.want_times else over_h
        if (phi := at.slopes.get(i)) is not None:
            of_slope = phi if of_slope is None else of_slope + phi
        return over_h, of_slope

    def _evaluation(self, stages: _Stages, tableau: ButcherTableau, start: Tensor, i: int) -> Evaluation:
        """Have f at stage i with its graph: kept, or evaluated again."""
        if stages.graphs is not None and i < len(stages.graphs.evaluations):
            kept = stages.graphs.evaluations[i]
            if kept is not None:
                return kept
        evaluations, field = stages.evaluations, self._field
        if stages.states is not None and 0 < i <= len(stages.states):
            stage = stages.states[i - 1]
        else:
            stage = weighted_sum(start, tableau.numbers[0][i], stages.slopes, evaluations.step.h)
        if (draw := stages.draws[i]) is not None:
            field.generators.draw_again_from(draw)
        field.report.recomputed += 1
        return field.differentiable(
            evaluations.times[i],
            stage,
            evaluations.keywords[i],
            self._sums.stand_ins,
            want_time=self._outputs.want_times,
        )

    def _through(
        self,
        evaluation: Evaluation,
        cotangent: Tensor | None,
        c: float,
        times: StepTimeCotangents | None,
        *,
        kept: bool,
    ) -> Tensor | None:
        """Carry a slope's cotangent, None for zero, through f to the stage and its time: xi_i, None for zero."""
        if cotangent is None:
            return None
        self._field.report.vjps += 1
        want_time, keep_graph = times is not None, kept and self._keep
        xi, tau = self._field.vjp(evaluation, cotangent, self._sums, want_time=want_time, keep_graph=keep_graph)
        if times is not None:
            times.add_stage_time(c, tau)
        return xi

    def _compare_kept(
        self, tableau: ButcherTableau, h: float, start: Tensor, stages: _Stages, *, slope_handed_on: bool
    ) -> None:
        if slope_handed_on and stages.slopes[0] is None and tableau.stages > 1 and h * tableau.numbers[0][1][0] != 0:
            assert stages.states is not None
            # The second stage is made of the first slope alone.
            stages.slopes[0] = (stages.states[0] - start) / (h * tableau.numbers[0][1][0])
        self._compare(tableau, h, start, stages.slopes)

    def _compare(self, tableau: ButcherTableau, h: float, start: Tensor, slopes: Sequence[Tensor | None]) -> None:
        """Note how far a step ends now from where the solve went on, if all slopes that make its end are known."""
        expected, b = self._following, tableau.numbers[1]
        unknown = any(slope is None and weight != 0 for slope, weight in zip(slopes, b, strict=True))
        if expected is None or unknown or not any(b):
            return
        moved = weighted_sum(None, b, slopes, h)
        end = start + moved
        if end.device.type == "cpu" and torch.equal(end, expected):  # elsewhere the result would have to be waited for
            return
        # Relative to the summands, of which little may be left in the sum.
        self._note(end - expected, start, expected, moved)

    def _note(self, off: Tensor, *summands: Tensor) -> None:
        """Note how far something is off, relative to its summands."""
        norm = torch.linalg.vector_norm
        self.deviation = torch.fmax(self.deviation, norm(off) / torch.stack([norm(x) for x in summands]).sum())


def _sum(terms: Iterable[Tensor | None]) -> Tensor | None:
    """Add up the tensors that are there, None if there is none."""
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
