"""What a solve leaves behind for the adjoint sweep: its method, accepted steps, checkpoints and output places.

A host adapter fills a `Trajectory` while the host solves; nothing below it knows the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..field.random_numbers import GeneratorStates
from ..methods.tableau import ButcherTableau
from .checkpoints import Checkpoints
from .implicit_solve import ImplicitSolve
from .kept import Kept
from .step_graph import StepGraph


@dataclass(frozen=True, slots=True)
class Step:
    """One accepted step.

    Args:
        t0: the time at its start.
        t1: the time at its end.
        h: its size, as the host used it.
        slope_handed_on: whether its first slope is the last one of the step before, so that f was not evaluated for it.
        first_keywords: keyword arguments with which the host evaluated f for the first slope, wherever it did.
        first_draw: where the random number generators were when it did, if that was outside the step and f draws.
        draws: where they were when it evaluated f first in the step, if f draws.
    """

    t0: float
    t1: float
    h: float
    slope_handed_on: bool
    first_keywords: Mapping[str, Any]
    first_draw: GeneratorStates | None = None
    draws: GeneratorStates | None = None

    @property
    def draws_size(self) -> int:
        """The bytes of what is noted of the random number generators."""
        return sum(state.numel() for states in (self.first_draw, self.draws) if states is not None for state in states)

    def draws_before(self, stage: int) -> GeneratorStates | None:
        """Where the random number generators are to be put before a stage is evaluated again, if anywhere."""
        first_is_outside = self.first_draw is not None or self.slope_handed_on
        if stage == 0:
            return self.first_draw if first_is_outside else self.draws
        return self.draws if stage == 1 and first_is_outside else None


class DenseOutput(ABC):
    """A host's interpolant inside a step: x(t_n + theta h) = x_n + h sum_i b_i(theta) k_i."""

    end_stage: bool = False
    """Whether it also uses the slope at (t_n + h, x_{n+1}), evaluated for it: one stage more than the method has."""
    linear: bool = False
    """Whether it is x_n + theta (x_{n+1} - x_n)."""
    start_stage: bool = False
    """Whether it also uses the slope at (t_n, x_n), which is no stage of the method: one more, before the end's."""

    def times(self, c: Tensor) -> Tensor:
        """The times of a method's stages, in units of the step, and of those that it adds."""
        return torch.cat([c, c.new_zeros(int(self.start_stage)), c.new_ones(int(self.end_stage))])

    @abstractmethod
    def weights(self, theta: Tensor) -> Tensor:
        """b_i(theta), shape (m, s), for theta of shape (m,), both float64 on the CPU."""

    def is_end(self, b: Tensor) -> bool:
        """Whether it is the state at the step's end and no more, at theta = 1.

        Args:
            b: the method's weights.
        """
        if self._is_end is None:
            (weights,) = self.weights(torch.ones(1, dtype=torch.float64))
            self._is_end = bool((weights[: len(b)] == b).all() and (weights[len(b) :] == 0).all())
        return self._is_end

    _is_end: bool | None = None

    def derivatives(self, theta: Tensor) -> Tensor:
        """db_i/dtheta, of the same shape."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            weights = self.weights(theta)
            # Row m depends on theta_m alone, so the gradient of sum(u * weights) in theta, linear in u, holds them all.
            u = torch.zeros_like(weights).requires_grad_()
            (linear,) = torch.autograd.grad(weights, theta, u, create_graph=True)
            return torch.autograd.grad(linear.sum(), u)[0]


class NoOutputs(DenseOutput):
    """For a trajectory whose outputs, if any, the host makes by itself."""

    def __init__(self, stages: int) -> None:
        self.stages = stages

    def weights(self, theta: Tensor) -> Tensor:
        return torch.zeros(len(theta), self.stages, dtype=torch.float64)

    def derivatives(self, theta: Tensor) -> Tensor:
        return self.weights(theta)


class TimesOfSteps:
    """The times of the stages of steps, made for many steps at once.

    Args:
        steps: the steps.
        stage_times: makes them, as for `Trajectory`.
    """

    def __init__(
        self, steps: Sequence[Step], stage_times: Callable[[Sequence[Step]], Sequence[Sequence[Tensor]]]
    ) -> None:
        self._steps = steps
        self._stage_times = stage_times
        self._chunks: dict[int, Sequence[Sequence[Tensor]]] = {}

    def __getitem__(self, n: int) -> Sequence[Tensor]:
        chunk = n // _CHUNK
        if chunk not in self._chunks:
            if len(self._chunks) > 1:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[chunk] = self._stage_times(self._steps[chunk * _CHUNK : (chunk + 1) * _CHUNK])
        return self._chunks[chunk][n % _CHUNK]


_CHUNK = 64

TakeStep = Callable[[Callable[..., Tensor], Step, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass
class Trajectory:
    """A recorded solve.

    Args:
        tableau: the method's.
        hands_on_slope: whether the method takes each step's first slope from the step before.
        keywords: what the host passes to f at each stage, beside time and state; and at the start, if outputs add that.
        dense: the interpolant that made the outputs.
        stage_times: the times of the stages of some steps, on the state's device, in the shapes and dtypes in which the
            host hands them to f. The first is that of the first slope, also where it was handed on.
        take_step: the host's step, `take_step(f, step, state, first slope)`: the state at its end, and the slope there
            if that is handed on.
        checkpoints: what is kept of the steps.
        implicit: how the stages are solved for, if they have to be.
        steps: the accepted steps, in order.
        kept: what is kept of each.
        outputs: for each output but the initial state, the step that it lies in and its place theta there, in order.
        at_once: has a step's graph made at once, `at_once(graph, times, keywords, whether the first slope is in it)`;
            returns whether it was.
    """

    tableau: ButcherTableau
    hands_on_slope: bool
    keywords: list[dict[str, Any]]
    dense: DenseOutput
    stage_times: Callable[[Sequence[Step]], Sequence[Sequence[Tensor]]]
    take_step: TakeStep
    checkpoints: Checkpoints
    implicit: ImplicitSolve | None = None
    steps: list[Step] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    outputs: list[tuple[int, float]] = field(default_factory=list)
    at_once: Callable[[StepGraph, Sequence[Tensor], Sequence[Mapping[str, Any]], bool], bool] | None = None

    @property
    def end(self) -> Tensor | None:
        """The state at the end of the last step, if it is known."""
        return self.kept[-1].end if self.kept else None

    def ends(self) -> list[bool]:
        """Whether each output but the initial state is the state at a step's end and no more."""
        at_end = self.dense.is_end(self.tableau.b)
        return [at_end and theta == 1 for _, theta in self.outputs]

    @property
    def keeps_slope(self) -> bool:
        """Whether a slope that was handed on is kept: it can't be had again by evaluating f at the step's start.

        An implicit method's last slope is f there only as far as the stage's equation is solved.
        """
        return self.hands_on_slope and (self.implicit is not None or not self.tableau.first_same_as_last)

    def stage_keywords(self, step: Step) -> list[Mapping[str, Any]]:
        """The keyword arguments for f at each stage of a step, those that outputs add to it included."""
        return [step.first_keywords, *self.keywords[1:], {}]
