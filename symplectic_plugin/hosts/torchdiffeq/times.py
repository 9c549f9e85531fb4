"""The times of a solve by torchdiffeq: of its stages, and as functions of the times that the solve was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adjoint.times import SolveTimes
from ...record.method import Step
from ...record.trajectory import Trajectory


class StageTimes:
    """The times that torchdiffeq hands to f in a step.

    Args:
        c: times of the stages in units of the step, float64.
        solver_dtype: in which the solver keeps time.
        dtype: in which it computes the times of stages.
        device: the state's.
    """

    def __init__(self, c: Tensor, solver_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
        self._at_end = c == 1 if bool((c == 1).any()) else None
        self._c = c.to(dtype)
        self._solver_dtype = solver_dtype
        self._device = device

    def __call__(self, steps: Sequence[Step]) -> list[Sequence[Tensor]]:
        numbers = [[step.t0 for step in steps], [step.t1 for step in steps], [step.h for step in steps]]
        t0, t1, h = torch.tensor(numbers, dtype=self._solver_dtype).to(self._c.dtype).unsqueeze(-1)
        times = t0 + self._c * h
        if self._at_end is not None:  # as torchdiffeq does, so that a stage at the step's end is at t1 to the last bit
            times = torch.where(self._at_end, t1, times)
        return [of_step.unbind() for of_step in times.to(self._device).unbind()]


class TimesFromStart:
    """The times of a solve whose step sizes are constants: all steps move with the start.

    Args:
        t: the output times, or the start alone of a solve up to an event.
        cut_steps: steps that were cut, by their numbers: to end at the output time of an index, or (None) at a step_t
            or jump_t, which does not move. The step's size takes up the moves of both its ends.
    """

    def __init__(self, t: Tensor) -> None:
        self.inputs = (t,)
        self.cut_steps: dict[int, int | None] = {}

    def cut(self, n: int, output: int | None) -> None:
        """Note that step n was cut."""
        self.cut_steps[n] = output

    def __call__(self, trajectory: Trajectory, t: Tensor) -> SolveTimes:
        """Return the solve's times as functions of t."""
        steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
        given = t.reshape(-1).double()
        # What a time may move with: an entry of t, or at the end of these nothing.
        moved = torch.cat([given - given.detach(), given.new_zeros(1)])
        starts, sizes = (
            torch.tensor([getattr(step, name) for step in steps], dtype=torch.float64, device=t.device)
            for name in ("t0", "h")
        )
        with_which, cuts = [0], list(self.cut_steps)
        for n in range(len(starts)):
            end = self.cut_steps.get(n, with_which[-1])
            with_which.append(len(given) if end is None else end)
        moves = moved[with_which]
        if cuts:
            cut = torch.tensor(cuts, device=t.device)
            sizes = sizes.index_add(0, cut, moves[cut + 1] - moves[cut])
        outputs = torch.tensor(
            [steps[n].t0 + theta * steps[n].h for n, theta in trajectory.outputs if n >= 0],
            dtype=torch.float64, device=t.device,
        )  # fmt: skip
        # An event's time is a constant, as in torchdiffeq.
        return SolveTimes(starts + moves[:-1], sizes, t[1:].double() if t.ndim else outputs)


class TimesFromGrid:
    """The times of a solve over a grid: each step's size moves with both its ends.

    Args:
        t: the output times.
        grid: the grid.
    """

    def __init__(self, t: Tensor, grid: Tensor) -> None:
        self.inputs = (t, grid)

    def __call__(self, trajectory: Trajectory, t: Tensor, grid: Tensor) -> SolveTimes:
        """Return the solve's times as functions of the output times and the grid."""
        return SolveTimes(grid[:-1].double(), grid.diff().double(), t[1:].double())
