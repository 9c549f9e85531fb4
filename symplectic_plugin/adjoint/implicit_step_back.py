"""The adjoint sweep over a step of an implicit method, one graph of f at a time.

What acts on slope k_i from outside the stages, and what becomes of it:

    r_i = h (b_i lambda_{n+1} + sum_m b_i(theta_m) g_m) + [i last] phi_{n+1}
    kappa_i, xi_i from r_i by the transposed equations of the stages (`TransposedSteps.take`)
    lambda_n = lambda_{n+1} + sum_m g_m + sum_i xi_i,   phi_n = kappa_1 where the first slope was handed on

with g_m the cotangent of an output at t_n + theta_m h, as in `sweep`. The step's size has the cotangent
sum_i (<r_i, k_i> + <xi_i, X_i - x_n>) / h + sum_i c_i tau_i, where r_i is taken without phi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..field.cotangents import CotangentSums
from ..field.vector_field import VectorField
from ..methods.check_derivative import check_derivative
from ..methods.implicit_step import total
from ..methods.transposed_step import StepAdjoint, TransposedSteps
from ..record.implicit_solve import Adjoint, ImplicitSolve
from ..record.kept import Kept
from ..record.trajectory import Trajectory
from .recompute import Retaker
from .times import StepTimes, zero


class ImplicitStepBack:
    """One step of the partner of an implicit method, with the interface that `sweep` goes by."""

    def __init__(
        self,
        trajectory: Trajectory,
        field: VectorField,
        sums: CotangentSums,
        given: Tensor,
        want_times: bool,
        keep: bool,
    ) -> None:
        assert trajectory.implicit is not None
        self.trajectory = trajectory
        self.solve: ImplicitSolve = trajectory.implicit
        self.field = field
        self.sums = sums
        self.steps = self.solve.steps_again()
        self.transposed = TransposedSteps(self.solve.method, self.solve.options)
        self.given = self.solve.layout.flat(given)
        self.theta = torch.tensor([theta for _, theta in trajectory.outputs], dtype=torch.float64)
        self.weights = trajectory.dense.weights(self.theta).to(self.given)
        self.derivatives = trajectory.dense.derivatives(self.theta) if want_times else None
        self.b = trajectory.tableau.b.to(self.given)
        self.retaker = Retaker(trajectory, field)
        self.is_end = [False] * len(trajectory.outputs)
        self.following = trajectory.end
        self.worst_deviation = zero(given)

    def pull(self, *_: Any) -> None:
        """There are no graphs of the forward pass, which has solved equations."""

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
        """Carry the adjoint from the end of step n to its start: arguments and results as those of `_StepBack`."""
        trajectory, solve, layout = self.trajectory, self.solve, self.solve.layout
        step, dense, s = trajectory.steps[n], trajectory.dense, trajectory.tableau.stages
        stage_times, keywords = self.retaker.stage_times[n], trajectory.stage_keywords(step)
        h, x = step.h, layout.flat(state)
        parts, kept = self._slopes(n, stage_times, keywords, state, slope)
        slopes, moved = total(parts), self.steps.moved(parts)
        stages = x + h * moved
        ended = x + h * self.steps.rate(slopes)
        given, weights = self.given[begin + 1 : end + 1], self.weights[begin:end]
        times = None
        if self.derivatives is not None:
            times = StepTimes(given, self.theta, self.derivatives, begin, end)

        cotangent, of_start = layout.flat(adjoint), torch.zeros_like(x)
        if end > begin:
            # Slopes that were evaluated for the outputs alone: after the stages' come that at the start and at the end.
            at_end = s + dense.start_stage
            if dense.end_stage:
                rate = torch.einsum("m,mbn->bn", weights[:, at_end], given)
                cotangent = cotangent + self._through(at_end, 1.0, stage_times, keywords, ended, rate, h, times)
            if dense.start_stage:
                rate = torch.einsum("m,mbn->bn", weights[:, s], given)
                of_start = self._through(s, 0.0, stage_times, keywords, x, rate, h, times)
        rates = self.b[:, None, None] * cotangent + torch.einsum("ms,mbn->sbn", weights[:, :s], given)
        outside = h * rates
        for i, phi in slope_cotangents.items():
            if phi is not None:
                outside[i] += layout.flat(phi)

        if 0 < n == len(trajectory.steps) - 1 and x.numel() > 0 and solve.options.check_jacobian:
            # Once more, where f may not be what it was when the solve began; else it would be noticed by nothing.
            check_derivative(solve.fields(self.field, stage_times, keywords, self._recomputed).stages[-1], stages[-1])
        of_f = Adjoint(self.sums, times is not None)
        fields = solve.fields(self.field, stage_times, keywords, self._recomputed, of_f)
        back = self.transposed.take(fields, stages, h, outside, first_slope_given=step.slope_handed_on)
        if times is not None:
            for i in range(s):
                times.add_slope(i, slopes[i], rates[i])
                times.add_stage_time(float(trajectory.tableau.c[i]), back.times[i])
            times.size = times.size + (back.stages * moved).sum()

        if kept:
            norm = torch.linalg.vector_norm
            self._compare_slopes(parts, of_f, back, stages, norm(cotangent) + norm(given), h)
        else:
            self._compare_ends(x, ended)
        self.following = None if trajectory.kept[n].previous is None else state
        before = cotangent + given.sum(0) + back.stages.sum(0) + of_start
        first = layout.shaped(back.slopes[0]) if step.slope_handed_on else None
        return layout.shaped(before), first, times

    def _slopes(
        self,
        n: int,
        stage_times: Sequence[Tensor],
        keywords: Sequence[Mapping[str, Any]],
        state: Tensor,
        slope: Tensor | None,
    ) -> tuple[Tensor, bool]:
        """The slopes of step n, as `TakenStep.parts`, and whether they were kept or had again.

        Raises:
            RuntimeError: if they can't be had again.
        """
        solve, step, kept = self.solve, self.trajectory.steps[n], self.trajectory.kept[n]
        if kept.stages is not None:
            return slopes_from(kept, slope if step.slope_handed_on else None, solve), True
        fields = solve.fields(self.field, stage_times, keywords, self._recomputed)
        taken = solve.take(self.steps, fields, step.h, state, slope if step.slope_handed_on else None)
        if bool(taken.failed.any()):
            raise RuntimeError(
                "symplectic_adjoint: Newton's method, which solved a step in the forward pass, does not in the "
                f"backward pass ({taken.reason}): the vector field is not what it was"
            )
        return taken.parts, False

    def _through(
        self,
        i: int,
        c: float,
        stage_times: Sequence[Tensor],
        keywords: Sequence[Mapping[str, Any]],
        x: Tensor,
        rate: Tensor,
        h: float,
        times: StepTimes | None,
    ) -> Tensor:
        """The cotangent of an end of the step that acts through f there, of which the outputs make use."""
        layout, field, want_time = self.solve.layout, self.field, times is not None
        evaluation = field.differentiable(stage_times[i], layout.shaped(x), keywords[i], want_time, self.sums.stand_ins)
        self._recomputed()
        if times is not None:
            times.add_slope(i, layout.flat(evaluation.slope.detach()), rate)
        field.report.vjps += 1
        product, tau = field.vjp(evaluation, layout.shaped(h * rate), self.sums, want_time)
        if times is not None:
            times.add_stage_time(c, tau)
        return torch.zeros_like(x) if product is None else layout.flat(product)

    def _recomputed(self) -> None:
        self.field.report.recomputed += 1

    def _compare_ends(self, x: Tensor, ended: Tensor) -> None:
        """Note how far a step that was taken again ends from where the solve went on."""
        if self.following is None:
            return
        norm = torch.linalg.vector_norm
        expected = self.solve.layout.flat(self.following)
        self._note(norm(ended - expected), norm(x) + norm(expected) + norm(ended - x))

    def _compare_slopes(
        self, parts: Tensor, of_f: Adjoint, back: StepAdjoint, stages: Tensor, cotangents: Tensor, h: float
    ) -> None:
        """Note how far slopes that were kept are from what f is now, by what that would make of the loss.

        Not by the slopes themselves, whose rounding the stiffness magnifies; kappa has that taken off again.
        """
        norm = torch.linalg.vector_norm
        off, size = zero(parts), cotangents * norm(stages[0])
        for (p, i), now in of_f.slopes.items():
            if p == 0:
                off = off + (back.slopes[i] * (now - parts[0, i])).sum()
                size = size + norm(back.stages[i]) * norm(stages[i]) + norm(back.slopes[i]) * norm(now)
            else:
                self._note(h * norm(now - parts[p, i]), norm(stages[i]) + h * norm(now))
        self._note(off.abs(), size)

    def _note(self, off: Tensor, size: Tensor) -> None:
        self.worst_deviation = torch.fmax(self.worst_deviation, off / size)


def slopes_to_keep(parts: Tensor, first_is_known: bool) -> list[Tensor]:
    """What is kept of a step's slopes where stages are; the first one is left out where it is kept in any case."""
    return [parts[:, 1:].clone() if first_is_known else parts]


def slopes_from(kept: Kept, first: Tensor | None, solve: ImplicitSolve) -> Tensor:
    """The slopes again."""
    assert kept.stages is not None
    parts = kept.stages[0]
    return parts if first is None else torch.cat([solve.layout.flat(first)[None, None], parts], 1)
