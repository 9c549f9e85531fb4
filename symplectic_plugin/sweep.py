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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .randomness import GeneratorStates
from .tableau import ButcherTableau
from .trajectory import Trajectory
from .vector_field import CotangentSums, VectorField


@dataclass(frozen=True)
class TimeCotangents:
    """Cotangents of a solve's times.

    Args:
        starts: of each step's start t_n, its size held, shape (N,).
        sizes: of each step's size h, its start held, shape (N,).
        outputs: of the time of each output but the first, shape (M,).
    """

    starts: Tensor
    sizes: Tensor
    outputs: Tensor


def sweep(
    trajectory: Trajectory, field: VectorField, sums: CotangentSums, cotangent: Tensor, want_times: bool
) -> tuple[Tensor, TimeCotangents | None]:
    """Carry the outputs' cotangents back to the initial state.

    Args:
        trajectory: the solve.
        field: its vector field.
        sums: takes the cotangents of what f depends on.
        cotangent: of the outputs, shape (M + 1, *state).
        want_times: whether the cotangents of the times are needed.

    Returns:
        The cotangent of the initial state, and those of the times if wanted.
    """
    given = cotangent.reshape(len(cotangent), cotangent[0].numel())
    back = _StepBack(trajectory, field, sums, given, cotangent.shape[1:], want_times)
    places = trajectory.outputs
    times: list[_StepTimes] = []
    adjoint = torch.zeros_like(given[0])
    slope_cotangent: Tensor | None = None
    last = trajectory.tableau.stages - 1
    end = len(places)
    for n in reversed(range(len(trajectory.steps))):
        begin = end
        while begin > 0 and places[begin - 1][0] == n:
            begin -= 1
        adjoint, slope_cotangent, of_step = back(n, begin, end, adjoint, {last: slope_cotangent})
        if of_step is not None:
            times.append(of_step)
        end = begin
    field.require_same(back.worst_deviation)
    # The first output is the initial state, and so is an event that is met at once.
    adjoint = adjoint + given[: end + 1].sum(0)
    return adjoint.view(cotangent.shape[1:]), _gathered(times[::-1], given) if want_times else None


def sweep_step(
    trajectory: Trajectory,
    field: VectorField,
    sums: CotangentSums,
    cotangent: Tensor,
    slope_cotangents: Mapping[int, Tensor | None],
    want_times: bool,
) -> tuple[Tensor, Tensor | None, TimeCotangents | None]:
    """Carry cotangents back over a trajectory's only step.

    Args:
        trajectory: the step, without outputs.
        field, sums, want_times: as for `sweep`.
        cotangent: of the state at its end.
        slope_cotangents: by stage, of its slopes, in the state's shape; None for zero.

    Returns:
        The cotangent of the state at its start, that of its first slope if that was handed on, and those of its times.
    """
    flat = {i: None if slope is None else slope.reshape(-1) for i, slope in slope_cotangents.items()}
    nothing = cotangent.new_zeros(1, cotangent.numel())
    back = _StepBack(trajectory, field, sums, nothing, cotangent.shape, want_times)
    adjoint, first_slope, times = back(0, 0, 0, cotangent.reshape(-1), flat)
    field.require_same(back.worst_deviation)
    first_slope = None if first_slope is None else first_slope.view(cotangent.shape)
    return adjoint.view(cotangent.shape), first_slope, None if times is None else _gathered([times], nothing)


class _Coefficients:
    """A tableau as the sweep reads it: numbers for what is decided on the host, a matrix where the state is."""

    def __init__(self, tableau: ButcherTableau, like: Tensor) -> None:
        self.stages = tableau.stages
        self.a = tableau.a.tolist()
        self.b = tableau.b.tolist()
        self.c = tableau.c.tolist()
        self.matrix = tableau.a.to(like)
        self.vector = tableau.b.to(like)
        self.used_later = (tableau.a != 0).any(0).tolist()


class _StepBack:
    """One step of the partner method."""

    def __init__(
        self,
        trajectory: Trajectory,
        field: VectorField,
        sums: CotangentSums,
        given: Tensor,
        shape: torch.Size,
        want_times: bool,
    ) -> None:
        self.trajectory = trajectory
        self.field = field
        self.sums = sums
        self.given = given
        self.shape = shape
        dense, tableau = trajectory.dense, trajectory.tableau
        self.theta = torch.tensor([theta for _, theta in trajectory.outputs], dtype=torch.float64)
        self.weights = dense.weights(self.theta)
        self.device_weights = self.weights.to(given)
        self.derivatives = dense.derivatives(self.theta) if want_times else None
        self.plain = _Coefficients(tableau, given)
        self.with_end = _Coefficients(tableau.with_end_stage(), given) if dense.end_stage else self.plain
        # A row a stage: its slope while the step is taken forward again, then, on the way back, xi in its place. So the
        # stages need s states, and X_i is formed from the slopes before it once more when its turn comes.
        self.rows = given.new_empty(self.with_end.stages, given.shape[1])
        self.worst_deviation = _zero(given)

    def __call__(
        self,
        n: int,
        begin: int,
        end: int,
        adjoint: Tensor,
        slope_cotangents: Mapping[int, Tensor | None],
    ) -> tuple[Tensor, Tensor | None, _StepTimes | None]:
        """Carry the adjoint from the end of step n to its start.

        Args:
            n: which step.
            begin, end: which outputs lie in it.
            adjoint: the cotangent of x_{n+1}, flat.
            slope_cotangents: by stage, the cotangents of slopes that are used outside the step, flat, None for zero:
                that of the last one, where it is handed on.

        Returns:
            The cotangent of x_n; that of the slope that was handed on to step n, None where none was; and those of the
            step's times, if wanted.
        """
        trajectory, field, rows, shape = self.trajectory, self.field, self.rows, self.shape
        step = trajectory.steps[n]
        coefficients = self.with_end if end > begin else self.plain
        a, b, s = coefficients.a, coefficients.b, coefficients.stages
        h = step.h
        scaled = coefficients.matrix * h
        stage_times = trajectory.stage_times(step)
        keywords = [step.first_keywords, *trajectory.keywords[1:], {}]
        start = trajectory.states[n].reshape(-1).to(rows.dtype)
        given = self.given[begin + 1 : end + 1]
        weights = self.device_weights[begin:end]
        weighted = (self.weights[begin:end] != 0).any(0).tolist()
        times = None if self.derivatives is None else _StepTimes(given, self.theta, self.derivatives, begin, end)

        def stage(i: int) -> Tensor:
            return (torch.addmv(start, rows[:i].T, scaled[i, :i]) if i else start).view(shape)

        # Forward, without graphs, for the slopes that later stages are made of. Where f draws random numbers, all
        # evaluations are made in the order in which the host made them, and what each will draw is noted.
        draws: list[GeneratorStates | None] = [None] * s
        for i in range(s):
            if (before := step.draws_before(i)) is not None:
                field.generators.set(before)
            if step.draws is not None:
                draws[i] = field.generators.states()
            slope = trajectory.slopes[n] if i == 0 else None
            if slope is None and (coefficients.used_later[i] or (step.draws is not None and i < s - 1)):
                slope = field(stage_times[i], stage(i), keywords[i])
            rows[i] = 0 if slope is None else slope.reshape(-1)

        # Backward, one graph at a time.
        handed_on = 1 if step.slope_handed_on else 0
        last = trajectory.tableau.stages - 1
        nonzero = [False] * s
        first_slope_cotangent: Tensor | None = None
        for i in reversed(range(s)):
            rate: Tensor | None = None  # kappa_i / h, less phi: what the size of the step, which may be 0, acts through
            if any(nonzero[j] and a[j][i] != 0 for j in range(i + 1, s)):
                rate = torch.mv(rows[i + 1 : s].T, coefficients.matrix[i + 1 :, i])
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
                    times.add_slope(0, rows[0], rate)
                first_slope_cotangent = kappa
                break
            if (draw := draws[i]) is not None:
                field.generators.set(draw)
            if kappa is not None:
                slope, product, tau = field.vjp(
                    stage_times[i], stage(i), keywords[i], kappa.view(shape), self.sums, times is not None
                )
            elif times is not None and times.needs_slope(i):
                slope, product, tau = field(stage_times[i], stage(i), keywords[i]), None, None
            else:
                slope = product = tau = None
            if times is not None and slope is not None:
                times.add_slope(i, slope.reshape(-1).to(rows.dtype), rate)
                times.add_stage_time(coefficients.c[i], tau)
            if i == last:
                self._compare(n, start, coefficients, slope)
            nonzero[i] = product is not None
            rows[i] = 0 if product is None else product.reshape(-1)

        adjoint = adjoint + given.sum(0) if end > begin else adjoint
        if any(nonzero):
            adjoint = adjoint + rows[handed_on:s].sum(0)
        return adjoint, first_slope_cotangent, times

    def _compare(self, n: int, start: Tensor, coefficients: _Coefficients, last_slope: Tensor | None) -> None:
        """Note how far from the state that the solve went on with the step ends now."""
        last = self.trajectory.tableau.stages - 1
        weighted = [i for i in range(last) if coefficients.b[i] != 0 and not coefficients.used_later[i]]
        if n + 1 == len(self.trajectory.states) or weighted or (last_slope is None and coefficients.b[last] != 0):
            return  # there is none to compare with, or not all slopes are there
        expected = self.trajectory.states[n + 1].reshape(-1)
        weights = coefficients.vector[: last + 1] * self.trajectory.steps[n].h
        moved = torch.mv(self.rows[:last].T, weights[:last])
        if coefficients.b[last] != 0 and last_slope is not None:
            moved = torch.add(moved, last_slope.reshape(-1).to(moved.dtype) * weights[last])
        off = torch.linalg.vector_norm(start + moved - expected)
        # Relative to what was added up, of which little may be left.
        size = torch.linalg.vector_norm(start) + torch.linalg.vector_norm(expected) + torch.linalg.vector_norm(moved)
        self.worst_deviation = torch.fmax(self.worst_deviation, off / size)


class _StepTimes:
    """The cotangents of one step's times, in the making.

    With tau_i the cotangent of stage i's time: that of the start is sum_i tau_i and that of the size
    sum_i <k_i, rate_i> + sum_i c_i tau_i, with rate_i = kappa_i / h less what comes from outside the step. An output at
    theta in the step has the cotangent <g, dx/dtheta> / h, and takes it, and theta times it, from the two.
    """

    def __init__(self, given: Tensor, theta: Tensor, derivatives: Tensor, begin: int, end: int) -> None:
        self.given = given
        self.theta = theta[begin:end].tolist()
        self.derivatives = derivatives[begin:end].tolist()
        zero = _zero(given)
        self.start = self.size = zero
        self.outputs = [zero] * len(self.theta)

    def needs_slope(self, i: int) -> bool:
        """Whether slope i matters to the outputs' times, if to nothing else."""
        return any(row[i] != 0 for row in self.derivatives)

    def add_slope(self, i: int, slope: Tensor, rate: Tensor | None) -> None:
        """Add what acts through slope i, flat, whose cotangent, without phi, is rate times the step's size."""
        if rate is not None:
            self.size = self.size + _inner(rate, slope)
        for m, (theta, row) in enumerate(zip(self.theta, self.derivatives, strict=True)):
            if row[i] != 0:
                moved = row[i] * _inner(self.given[m], slope)
                self.outputs[m] = self.outputs[m] + moved
                self.start = self.start - moved
                self.size = self.size - theta * moved

    def add_stage_time(self, c: float, tau: Tensor | None) -> None:
        """Add the cotangent of the time of a stage at c."""
        if tau is not None:
            self.start = self.start + tau
            self.size = self.size + c * tau


def _gathered(times: list[_StepTimes], like: Tensor) -> TimeCotangents:
    empty = _zero(like).new_zeros(0)
    outputs = [output for step in times for output in step.outputs]
    return TimeCotangents(
        torch.stack([step.start for step in times]) if times else empty,
        torch.stack([step.size for step in times]) if times else empty,
        torch.stack(outputs) if outputs else empty,
    )


def _zero(like: Tensor) -> Tensor:
    """A real zero in a state's precision."""
    return torch.zeros((), dtype=torch.empty(0, dtype=like.dtype).abs().dtype, device=like.device)


def _inner(cotangent: Tensor, vector: Tensor) -> Tensor:
    """The change of the loss per unit of the vector: autograd's gradient of a complex tensor is the conjugate one."""
    return torch.vdot(cotangent, vector).real if cotangent.is_complex() else torch.dot(cotangent, vector)
