"""The step back of an implicit method: its symplectic partner's step, one graph of f at a time.

What acts on slope k_i from outside the stages, and what becomes of it:

    r_i = h (b_i lambda_{n+1} + sum_m b_i(theta_m) g_m) + phi_i
    kappa_i, xi_i from r_i by the transposed equations of the stages (`TransposedSteps.take`)
    lambda_n = lambda_{n+1} + sum_m g_m + sum_i xi_i,   phi = kappa_1 of the step after where the slope is handed on

with g_m the cotangent of an output at t_n + theta_m h, as in `explicit_step_back`. The step's size has the cotangent
sum_i (<r_i, k_i> + <xi_i, X_i - x_n>) / h + sum_i c_i tau_i, where r_i is taken without phi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.check_derivative import check_derivative
from ..methods.implicit_step import total
from ..methods.transposed_step import StepAdjoint, TransposedSteps
from ..record.checkpoint import Checkpoint
from ..record.implicit_solve import Adjoint, ImplicitSolve
from ..record.method import Step
from ..record.trajectory import Trajectory
from .step_back import StepBack, StepEnd, StepStart
from .times import StepTimeCotangents, zero


@dataclass(frozen=True)
class _At:
    """One step, with everything in the layout of its equations.

    Args:
        step: the step.
        times, keywords: of its stages, for f.
        x: state at the start, shape (B, n).
        parts: slopes of the stages, as `TakenStep.parts`.
        stages: states of the stages, shape (s, B, n).
        moved: (X_i - x_n) / h, shape (s, B, n).
        ended: state at the end, shape (B, n).
    """

    step: Step
    times: Sequence[Tensor]
    keywords: Sequence[Mapping[str, Any]]
    x: Tensor
    parts: Tensor
    stages: Tensor
    moved: Tensor
    ended: Tensor


class ImplicitStepBack(StepBack):
    """The step back of an implicit method, for one sweep, whose forward pass has left no graphs.

    Arguments and attributes are `StepBack`'s.
    """

    def __init__(self, trajectory: Trajectory, *arguments: Any, keep: bool) -> None:
        super().__init__(trajectory, *arguments, keep=keep)
        method, outputs = trajectory.method, self._outputs
        assert method.implicit is not None
        self._solve: ImplicitSolve = method.implicit
        self._steps = self._solve.steps_again()
        self._transposed = TransposedSteps(self._solve.method, self._solve.options)
        self._b = method.tableau.b.to(self._solve.layout.flat(outputs.given))

    def __call__(self, at: StepEnd) -> StepStart:
        """Carry the adjoint from the end of a step to its start."""
        outputs, solve, layout = self._outputs, self._solve, self._solve.layout
        checkpoint = self._trajectory.checkpoints[at.n]
        this, were_kept = self._at(at, checkpoint)
        h, given, times = this.step.h, layout.flat(outputs.in_step(at)), outputs.times(at)
        cotangent, of_start = self._through_ends(at, this, times)
        rates = self._b[:, None, None] * cotangent
        if at.end > at.begin:
            weights = outputs.weights_in_step(at)[:, : len(self._b)].to(rates)
            rates = rates + torch.einsum("ms,mbn->sbn", weights, given)
        outside = h * rates
        for i, phi in at.slopes.items():
            if phi is not None:
                outside[i] += layout.flat(phi)

        if 0 < at.n == len(self._trajectory.checkpoints) - 1 and this.x.numel() > 0 and solve.options.check_jacobian:
            # Once more, where f may not be what it was when the solve began; else nothing would notice.
            fields = solve.fields(self._field, this.times, this.keywords, self._recomputed)
            check_derivative(fields.stages[-1], this.stages[-1])
        of_f = Adjoint(self._sums, want_time=times is not None)
        fields = solve.fields(self._field, this.times, this.keywords, self._recomputed, of_f)
        back = self._transposed.take(fields, this.stages, h, outside, first_slope_given=this.step.slope_handed_on)
        if times is not None:
            self._add_times(times, this, rates, back)
        if were_kept:
            norm = torch.linalg.vector_norm
            self._compare_slopes(this, of_f, back, norm(cotangent) + norm(given))
        elif self._following is not None:
            self._compare_ends(this, layout.flat(self._following))
        self._following = None if checkpoint.previous is None else at.state
        before = cotangent + given.sum(0) + back.stages.sum(0) + of_start
        first = layout.shaped(back.slopes[0]) if this.step.slope_handed_on else None
        return StepStart(layout.shaped(before), first, times)

    def _at(self, at: StepEnd, checkpoint: Checkpoint) -> tuple[_At, bool]:
        """Have a step in the layout of its equations; and whether its slopes were kept, or recomputed.

        Raises:
            RuntimeError: if they can't be recomputed.
        """
        solve, step, times = self._solve, checkpoint.step, self._times[at.n]
        keywords = checkpoint.method.stage_keywords(step)
        first = at.slope if step.slope_handed_on else None
        if checkpoint.stages is not None:
            parts = slopes_from(checkpoint.stages[0], first, solve)
        else:
            fields = solve.fields(self._field, times, keywords, self._recomputed)
            taken = solve.take(self._steps, fields, step.h, at.state, first)
            if bool(taken.failed.any()):
                raise RuntimeError(
                    "symplectic_adjoint: Newton's method, which solved a step in the forward pass, does not in the "
                    f"backward pass ({taken.reason}): the vector field is not what it was"
                )
            parts = taken.parts
        x, moved = solve.layout.flat(at.state), self._steps.moved(parts)
        ended = x + step.h * self._steps.rate(total(parts))
        return _At(step, times, keywords, x, parts, x + step.h * moved, moved, ended), checkpoint.stages is not None

    def _through_ends(self, at: StepEnd, this: _At, times: StepTimeCotangents | None) -> tuple[Tensor, Tensor]:
        """Carry the outputs' cotangents through slopes that were evaluated for the outputs alone.

        Those are, after the stages' slopes, the one at the step's start and the one at its end.

        Returns:
            The cotangents of the state at the end, all others included, and of the state at the start.
        """
        layout, dense, s = self._solve.layout, self._trajectory.method.dense, len(self._b)
        cotangent, of_start = layout.flat(at.adjoint), torch.zeros_like(this.x)
        if at.end > at.begin and dense.end_stage:
            c_and_state = 1.0, this.ended
            cotangent = cotangent + self._through(at, this, s + dense.start_stage, c_and_state, times)
        if at.end > at.begin and dense.start_stage:
            of_start = self._through(at, this, s, (0.0, this.x), times)
        return cotangent, of_start

    def _through(
        self, at: StepEnd, this: _At, i: int, place: tuple[float, Tensor], times: StepTimeCotangents | None
    ) -> Tensor:
        """Carry the outputs' cotangents through f at an end of the step: its time in units of the step, and state."""
        layout, field, want_time, (c, x) = self._solve.layout, self._field, times is not None, place
        over_h = layout.flat(self._outputs.on_slope(at, i))
        shaped = layout.shaped(x)
        evaluation = field.differentiable(
            this.times[i], shaped, this.keywords[i], self._sums.stand_ins, want_time=want_time
        )
        self._recomputed()
        if times is not None:
            times.add_slope(i, evaluation.slope.detach(), layout.shaped(over_h))
        field.report.vjps += 1
        product, tau = field.vjp(evaluation, layout.shaped(this.step.h * over_h), self._sums, want_time=want_time)
        if times is not None:
            times.add_stage_time(c, tau)
        return torch.zeros_like(x) if product is None else layout.flat(product)

    def _add_times(self, times: StepTimeCotangents, this: _At, rates: Tensor, back: StepAdjoint) -> None:
        shaped, slopes, c = self._solve.layout.shaped, total(this.parts), self._trajectory.method.tableau.c.tolist()
        for i, slope in enumerate(slopes):
            times.add_slope(i, shaped(slope), shaped(rates[i]))
            times.add_stage_time(c[i], back.times[i])
        times.add_size((back.stages * this.moved).sum())

    def _recomputed(self) -> None:
        self._field.report.recomputed += 1

    def _compare_ends(self, this: _At, expected: Tensor) -> None:
        """Note how far a recomputed step ends from where the solve went on."""
        norm = torch.linalg.vector_norm
        self._note(norm(this.ended - expected), norm(this.x) + norm(expected) + norm(this.ended - this.x))

    def _compare_slopes(self, this: _At, of_f: Adjoint, back: StepAdjoint, cotangents: Tensor) -> None:
        """Note how far slopes that were kept are from f's values now, by what the difference makes of the loss.

        Not by the slopes themselves, whose rounding the stiffness magnifies; in kappa that is taken off again.
        """
        norm, h, stages, parts = torch.linalg.vector_norm, this.step.h, this.stages, this.parts
        off, size = zero(parts), cotangents * norm(stages[0])
        for (p, i), now in of_f.slopes.items():
            if p == 0:
                off = off + (back.slopes[i] * (now - parts[0, i])).sum()
                size = size + norm(back.stages[i]) * norm(stages[i]) + norm(back.slopes[i]) * norm(now)
            else:
                self._note(h * norm(now - parts[p, i]), norm(stages[i]) + h * norm(now))
        self._note(off.abs(), size)

    def _note(self, off: Tensor, size: Tensor) -> None:
        self.deviation = torch.fmax(self.deviation, off / size)


def slopes_from(kept: Tensor, first: Tensor | None, solve: ImplicitSolve) -> Tensor:
    """Join the slopes that are kept of a step with the first one, if that is kept by itself."""
    return kept if first is None else torch.cat([solve.layout.flat(first)[None, None], kept], 1)
