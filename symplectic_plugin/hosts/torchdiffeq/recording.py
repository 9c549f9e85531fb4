"""A mixin for torchdiffeq's solver classes that records the steps which a solve accepts."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...field.evaluation import Evaluation
from ...methods.tableau import ButcherTableau
from ...record.budget import Demand
from ...record.implicit_solve import ImplicitSolve
from ...record.method import Method, Step, TakeStep
from ...record.recorder import Plan, Recorder
from ...record.store import CheckpointStore
from ...record.trajectory import Trajectory
from ._compat import NULL_CALLBACK
from .methods import hands_on_slope, read_dense_output, read_method
from .recorded_function import RecordedFunction
from .times import StageTimes


class Recording(ABC):
    """The recording of a solve, as far as all families of solvers share it.

    Attributes:
        base: the solver class that this is mixed into.
        func: the vector field.
        initial: initial state, with its history.
        store: keeps the checkpoints.
        is_own: whether the step is torchdiffeq's own, of which nothing but the tableau matters.
    """

    base: Any
    start_keywords: Any
    func: RecordedFunction
    y0: Tensor
    initial: Tensor
    store: CheckpointStore
    is_own = True

    def prepare(self, initial: Tensor, store: CheckpointStore) -> None:
        """Take the initial state with its history, and where checkpoints are kept."""
        self.initial = initial
        self.store = store

    @abstractmethod
    def step_alone(self, method: Method, dtype: torch.dtype) -> TakeStep:
        """Return the step, taken by itself.

        Args:
            method: the solver's, without a step.
            dtype: in which the solver keeps time.
        """

    @abstractmethod
    def end_state(self) -> Tensor:
        """Return the state at the end of the last step."""

    @abstractmethod
    def output_times(self, t: Tensor) -> Tensor:
        """Return output times as the solver sees them."""

    @property
    def recorder(self) -> Recorder:
        """The solve's recorder."""
        assert self.func.recorder is not None
        return self.func.recorder

    def implicit_solve(self) -> ImplicitSolve | None:
        """Return how the stages are solved for, if they have to be."""
        return None

    def has_callbacks(self, *names: str) -> bool:
        """Return whether func has a callback of one of these names."""
        return any(getattr(self.func, name, NULL_CALLBACK) is not NULL_CALLBACK for name in names)

    def record(
        self, dtypes: tuple[torch.dtype, torch.dtype], outputs: int, steps: int | None, *, want_time: bool
    ) -> None:
        """Begin to record.

        Args:
            dtypes: in which the solver keeps time, and in which it computes the times of stages.
            outputs: number of output times.
            steps: number of steps, if it is known.
            want_time: whether gradients of times are wanted.

        Raises:
            ValueError: if the method is not a Runge-Kutta method.
        """
        tableau, keywords = read_method(self)
        dense = read_dense_output(self, tableau)
        keywords = [*keywords, self.start_keywords()] if dense.start_stage else keywords
        make = _own_stage_times if self.base.__module__.startswith("torchdiffeq.") else _own_stage_times.__wrapped__
        stage_times = make(tableau, dense.added_times, *dtypes, self.y0.device)
        implicit, handed_on = self.implicit_solve(), hands_on_slope(self)
        take_step = self.step_alone(Method(tableau, stage_times, _no_step, dense, keywords), dtypes[0])
        method = Method(tableau, stage_times, take_step, dense, keywords, handed_on, implicit)
        field, y0 = self.func.field, self.y0

        # Without a reference to the solver, which refers to the recorder and so to this.
        def demand(evaluation: Evaluation) -> Demand:
            slope, state = evaluation.slope, evaluation.argument
            if torch.promote_types(slope.dtype, state.dtype) != state.dtype:
                raise ValueError(
                    f"symplectic_adjoint: func returned {slope.dtype} for a state of {state.dtype}: return the "
                    "state's dtype, or give y0 in the wider one"
                )
            solving = 0 if implicit is None else implicit.require_equations(field, evaluation)
            keeps_slope = method.keeps_slope or (handed_on and field.draws)
            return Demand(y0, tableau.stages, keeps_slope, outputs, steps, solving, method.evaluations)

        # Outputs may be made of slopes that are in no graph; beyond a jump the slope is evaluated anew.
        live = self.is_own and not dense.end_stage and implicit is None and getattr(self, "jump_t", None) is None
        plan = Plan(self.initial, demand, want_time, steps, may_be_live=live)
        self.func.record(Recorder(field, self.store, method, plan))

    def places(self, times: Tensor) -> list[tuple[int, float]]:
        """Return the step that each output after the first is made from, the first one to reach it, and its place."""
        trajectory = self.recorder.trajectory
        steps = [checkpoint.step for checkpoint in trajectory.checkpoints]
        ends = [step.t1 for step in steps]
        outputs = times.tolist()[1:]
        in_step, n = [], 0
        for t in outputs:
            while ends[n] < t:  # not by bisection: a grid may go back
                n += 1
            in_step.append(n)
        for n, following in itertools.pairwise(in_step):
            if n == following and trajectory.method.dense.end_stage and steps[n].draws is not None:
                raise RuntimeError(
                    "symplectic_adjoint: func draws random numbers, and interp='cubic' evaluates it anew for each "
                    "output time: with several in one step there is no gradient. Use interp='linear' or smaller steps"
                )
        if all(ends[n] == t for n, t in zip(in_step, outputs, strict=True)):
            return [(n, 1.0) for n in in_step]
        return self._thetas(in_step, times[1:])

    def place_of_event(self, t: Tensor) -> list[tuple[int, float]]:
        """Return the place of an event, which is in the last step, or at the start (step -1)."""
        n = len(self.recorder.trajectory.checkpoints) - 1
        return self._thetas([n], t.reshape(1)) if n >= 0 else [(-1, 0.0)]

    def _thetas(self, in_step: list[int], times: Tensor) -> list[tuple[int, float]]:
        """Return steps, and the places of times in them, computed in the solver's precision as torchdiffeq does."""
        steps: list[Step] = [self.recorder.trajectory.checkpoints[n].step for n in in_step]
        t0, t1 = (torch.tensor([getattr(step, end) for step in steps], dtype=times.dtype) for end in ("t0", "t1"))
        return list(zip(in_step, ((times.cpu() - t0) / (t1 - t0)).tolist(), strict=True))

    def finish(self, places: list[tuple[int, float]]) -> Trajectory:
        """End the solve, whose outputs have these places."""
        taken = bool(self.recorder.trajectory.checkpoints)
        return self.recorder.finish(self.end_state() if taken else None, places)


@functools.cache
def _own_stage_times(
    tableau: ButcherTableau,
    added: tuple[float, ...],
    solver_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> StageTimes:
    """Make the times of the stages of a method, once for each of torchdiffeq's own, whose tableaux are read once."""
    return StageTimes(torch.cat([tableau.c, tableau.c.new_tensor(added)]), solver_dtype, dtype, device)


def _no_step(*_: Any) -> tuple[Tensor, None]:
    raise AssertionError("a method without a step")
