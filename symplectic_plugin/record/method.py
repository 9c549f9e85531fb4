"""A host's Runge-Kutta method as the backward pass sees it, its interpolant, and one accepted step of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..field.random_numbers import GeneratorStates
from ..field.vector_field import VectorField
from ..methods.tableau import ButcherTableau
from .implicit_solve import ImplicitSolve


@dataclass(frozen=True, slots=True)
class Step:
    """One accepted step.

    Args:
        t0: time at the step's start.
        t1: time at the step's end.
        h: step size, as the host used it.
        slope_handed_on: whether the first slope is the last one of the step before, so that f was not evaluated for it.
        first_keywords: keyword arguments with which the host evaluated f for the first slope, wherever it did.
        first_draw: states of the random number generators before that evaluation, if it lay outside the step and f
            draws.
        draws: states of the random number generators before each evaluation in the step, if f draws; None where the
            evaluation before left them.
    """

    t0: float
    t1: float
    h: float
    slope_handed_on: bool = False
    first_keywords: Mapping[str, Any] = field(default_factory=dict)
    first_draw: GeneratorStates | None = None
    draws: Sequence[GeneratorStates | None] | None = None

    @property
    def draws_bytes(self) -> int:
        """Bytes of the generators' states."""
        noted = (self.first_draw, *(self.draws or ()))
        return sum(state.numel() for states in noted if states is not None for state in states)

    def draws_before(self, stage: int) -> GeneratorStates | None:
        """Return the states that the generators need before a stage is evaluated again, None to leave them alone."""
        first_is_outside = self.first_draw is not None or self.slope_handed_on
        if stage == 0 and first_is_outside:
            return self.first_draw
        place = stage - 1 if first_is_outside else stage
        return self.draws[place] if self.draws is not None and place < len(self.draws) else None


class DenseOutput(ABC):
    """A host's interpolant inside a step: x(t_n + theta h) = x_n + h sum_i b_i(theta) k_i.

    Attributes:
        end_stage: whether it also uses the slope at (t_n + h, x_{n+1}): one stage more than the method has.
        start_stage: whether it also uses the slope at (t_n, x_n), which is no stage of the method: one more, before
            the end's.
        linear: whether it is x_n + theta (x_{n+1} - x_n).
    """

    end_stage: bool = False
    start_stage: bool = False
    linear: bool = False
    _is_end: bool | None = None

    @property
    def added_times(self) -> tuple[float, ...]:
        """Times of the added stages, in units of the step."""
        return (0.0,) * self.start_stage + (1.0,) * self.end_stage

    @abstractmethod
    def weights(self, theta: Tensor) -> Tensor:
        """Return b_i(theta), shape (m, s), for theta of shape (m,); both float64 on the CPU."""

    def is_end(self, b: Tensor) -> bool:
        """Return whether the interpolant at theta = 1 is the state at the step's end, for a method with weights b."""
        if self._is_end is None:
            (weights,) = self.weights(torch.ones(1, dtype=torch.float64))
            self._is_end = bool((weights[: len(b)] == b).all() and (weights[len(b) :] == 0).all())
        return self._is_end

    def derivatives(self, theta: Tensor) -> Tensor:
        """Return db_i/dtheta, shape (m, s), for theta of shape (m,); both float64 on the CPU."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            weights = self.weights(theta)
            # Row m depends on theta_m alone, so the gradient of sum(u * weights) in theta, linear in u, holds all rows.
            u = torch.zeros_like(weights).requires_grad_()
            (linear,) = torch.autograd.grad(weights, theta, u, create_graph=True)
            return torch.autograd.grad(linear.sum(), u)[0]


class NoOutputs(DenseOutput):
    """The interpolant of a trajectory whose outputs, if any, the host makes by itself."""

    def __init__(self, stages: int) -> None:
        self.stages = stages

    def weights(self, theta: Tensor) -> Tensor:
        return torch.zeros(len(theta), self.stages, dtype=torch.float64)


StageTimes = Callable[[Sequence[Step]], Sequence[Sequence[Tensor]]]
"""Times of the stages of steps, as scalar tensors on the state's device, in the shapes and dtypes in which the host
hands them to f. The first is the first slope's, even if that was handed on."""


class Reevaluation:
    """f as a host's step calls it when the step is taken again: counted, and without graphs.

    Args:
        field: the vector field.
        draws: states of the random number generators before each evaluation, None to go on from the one before.
    """

    def __init__(self, field: VectorField, draws: Sequence[GeneratorStates | None] | None = None) -> None:
        self.field = field
        self._draws = iter(draws or ())

    def __call__(self, t: Tensor, x: Tensor, **keywords: Any) -> Tensor:
        self.count()
        if (states := next(self._draws, None)) is not None:
            self.field.generators.draw_again_from(states)
        return self.field(t, x, keywords)

    def count(self) -> None:
        """Count an evaluation."""
        self.field.report.recomputed += 1


TakeStep = Callable[[Reevaluation, Step, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""The host's step, `take_step(f, step, state, first slope)`: the state at the end, and the slope there if that is
handed on."""


@dataclass(frozen=True, eq=False)
class Method:
    """A host's Runge-Kutta method.

    Args:
        tableau: coefficients.
        stage_times: times of the stages of steps.
        take_step: the host's step.
        dense: the interpolant that makes the outputs.
        keywords: keyword arguments that the host passes to f at each stage, and at the start if outputs add that.
        hands_on_slope: whether each step takes its first slope from the step before.
        implicit: how the stages are solved for, if they have to be.
    """

    tableau: ButcherTableau
    stage_times: StageTimes
    take_step: TakeStep
    dense: DenseOutput
    keywords: Sequence[Mapping[str, Any]]
    hands_on_slope: bool = False
    implicit: ImplicitSolve | None = None

    @property
    def keeps_slope(self) -> bool:
        """Return whether a slope that was handed on must be kept, since f at the step's start does not give it again.

        An implicit method's last slope is f there only as far as the stage's equation is solved.
        """
        return self.hands_on_slope and (self.implicit is not None or not self.tableau.first_same_as_last)

    @property
    def evaluations(self) -> int:
        """Number of evaluations of f that a step of an explicit method makes; 0 for an implicit one, not known."""
        return 0 if self.implicit is not None else self.tableau.stages - (1 if self.hands_on_slope else 0)

    def stage_keywords(self, step: Step) -> list[Mapping[str, Any]]:
        """Return the keyword arguments for f at each stage of a step, those that outputs add included."""
        return [step.first_keywords, *self.keywords[1:], {}]


class StageTimeCache:
    """Times of the stages of a sequence of steps, made for many steps at once.

    Args:
        steps: the steps.
        stage_times: makes the times.
    """

    _CHUNK = 64

    def __init__(self, steps: Sequence[Step], stage_times: StageTimes) -> None:
        self._steps = steps
        self._stage_times = stage_times
        self._chunks: dict[int, Sequence[Sequence[Tensor]]] = {}

    def __getitem__(self, n: int) -> Sequence[Tensor]:
        chunk, place = divmod(n, self._CHUNK)
        if chunk not in self._chunks:
            if len(self._chunks) > 1:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[chunk] = self._stage_times(self._steps[chunk * self._CHUNK : (chunk + 1) * self._CHUNK])
        return self._chunks[chunk][place]
