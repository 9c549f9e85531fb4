"""The equations of an implicit method's solve, for steps forward, recomputed steps, and steps back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..field.cotangents import CotangentSums, StandIns
from ..field.evaluation import Evaluation
from ..field.vector_field import VectorField
from ..methods.implicit_step import ImplicitSteps, StepFields, TakenStep
from ..methods.implicit_tableaux import ImplicitMethod
from ..methods.newton import NewtonOptions
from ..methods.stage_field import GraphOf, Layout, Linearized, StageField, rows_at_a_time

_NO_STAND_INS = StandIns()

Keywords = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ImplicitSolve:
    """The equations of the stages of a recorded solve.

    Under the policies that keep stages, the slopes of the stages are kept, `TakenStep.parts`. The states follow from
    the slopes without loss; slopes follow from states only with rounding that a small step magnifies.

    Args:
        method: the method.
        options: of Newton's method.
        layout: how the host's states are laid out.
        weights: the error that the tolerances allow in each component in a step from a state, shape (B, n).
    """

    method: ImplicitMethod
    options: NewtonOptions
    layout: Layout
    weights: Callable[[Tensor], Tensor]

    def fields(
        self,
        field: VectorField,
        times: Sequence[Tensor],
        keywords: Keywords,
        evaluated: Callable[[], None],
        adjoint: Adjoint | None = None,
    ) -> StepFields:
        """f at the stages of one step.

        Args:
            field: the vector field.
            times: of the stages.
            keywords: for f at each of them.
            evaluated: called for each evaluation.
            adjoint: what a step back needs of f besides.
        """
        functions = [field.part(part) for part in field.parts] or [field]
        stages, *others = [
            [
                self._stage_field(function, times[i], keywords[i], evaluated, adjoint, (p, i))
                for i in range(self.method.tableau.stages)
            ]
            for p, function in enumerate(functions)
        ]
        return StepFields(stages, others[0] if others else None)

    def take(
        self, steps: ImplicitSteps, fields: StepFields, h: float, state: Tensor, first_slope: Tensor | None
    ) -> TakenStep:
        """Take a step of size h from a host's state, with the slope there if it is known."""
        layout = self.layout
        slope = None if first_slope is None or self.method.nonstiff is not None else layout.flat(first_slope)
        with torch.no_grad():
            return steps.take(fields, layout.flat(state), h, self.weights(state), slope)

    def steps_again(self) -> ImplicitSteps:
        """Return a stepper for recomputed steps, which keeps no more than the last matrix that it made."""
        return ImplicitSteps(self.method, replace(self.options, check_jacobian=False))

    def bytes_for_solving(self, evaluation: Sequence[int], itemsize: int) -> int:
        """Return the bytes that solving for the stages takes, beside the stages.

        Args:
            evaluation: the bytes of each storage that the graph of one evaluation of f keeps.
            itemsize: the bytes of a number.
        """
        layout, s = self.layout, self.method.tableau.stages
        together = 1 if self.method.diagonally_implicit else s
        n, unknowns = layout.size, together * layout.size
        state = layout.batch * n * itemsize
        # Stages, their slopes and the cotangents of both; and what they are made from.
        working = (10 if self.method.nonstiff is None else 14) * s * state
        if self.options.dense(unknowns):
            # A Jacobian and factors that are kept, and others in the making, with the matrix and its norm.
            matrices = layout.batch * (7 * unknowns**2 + 2 * together * n**2) * itemsize
            # f's graph goes back for many unit vectors at a time.
            return working + matrices + rows_at_a_time(layout.batch, n) * 2 * (max(evaluation, default=0) + state)
        # Two bases of GMRES with their projections, and the graph that products are made with.
        columns = min(self.options.krylov_dimension, unknowns)
        vectors = 2 * columns + 12
        return working + layout.batch * (vectors * unknowns + 4 * columns**2) * itemsize + sum(evaluation)

    def require_equations(self, field: VectorField, evaluation: Evaluation) -> int:
        """The bytes that solving for the stages takes.

        Args:
            field: the vector field.
            evaluation: its first one.

        Raises:
            ValueError: if the stages can't be solved for to rounding.
        """
        name, slope, state = self.method.name, evaluation.slope, evaluation.argument
        if slope.dtype != state.dtype:
            raise ValueError(
                f"symplectic_adjoint: func returned {slope.dtype} for a state of {state.dtype}, but {name} solves "
                "equations with it, in the state's precision: return that, and leave autocast off for the solve"
            )
        if field.draws:
            raise ValueError(
                f"symplectic_adjoint: func draws random numbers (dropout in training mode), but {name} solves "
                "equations with it, which have no solution then: put it in eval mode, or use an explicit method"
            )
        return self.bytes_for_solving(field.memory_of(evaluation), slope.element_size())

    def _stage_field(
        self,
        field: VectorField,
        t: Tensor,
        keywords: Mapping[str, Any],
        evaluated: Callable[[], None],
        adjoint: Adjoint | None,
        place: tuple[int, int],
    ) -> StageField:
        layout = self.layout

        def value(x: Tensor) -> Tensor:
            evaluated()
            return layout.flat(field(t, layout.shaped(x), keywords))

        def graph(x: Tensor) -> Tensor:
            # Only its derivative in the state is used, which no stand-in makes a difference to.
            evaluated()
            return layout.flat(field.evaluate(t, layout.shaped(x), keywords, _NO_STAND_INS))

        def linearize(x: Tensor) -> Linearized:
            if adjoint is None:
                return GraphOf(graph, x)
            evaluated()
            linearized = _Linearization(field, t, layout.shaped(x), keywords, layout, adjoint)
            adjoint.slopes[place] = linearized.slope
            return linearized

        return StageField(value, graph, linearize)


def require_exact(options: NewtonOptions) -> NewtonOptions:
    """The options of a solve that is to have a gradient.

    Raises:
        ValueError: if stages are not solved for to rounding with them.
    """
    if options.newton_tol is not None:
        raise ValueError(
            f"symplectic_adjoint: the option newton_tol={options.newton_tol} leaves an error in the stages, and "
            "the gradient would be off by as much: leave it out, or solve under torch.no_grad()"
        )
    return options


class Adjoint:
    """The needs and findings of a step back with respect to f.

    Args:
        sums: takes the cotangents of what f depends on.
        want_time: whether the cotangents of the stages' times are needed.

    Attributes:
        slopes: f at the stages, shape (B, n), by part and stage, as it was found to be.
    """

    def __init__(self, sums: CotangentSums, *, want_time: bool) -> None:
        self.sums = sums
        self.want_time = want_time
        self.slopes: dict[tuple[int, int], Tensor] = {}


class _Linearization:
    """`Linearized` by one evaluation of a vector field."""

    def __init__(
        self,
        field: VectorField,
        t: Tensor,
        x: Tensor,
        keywords: Mapping[str, Any],
        layout: Layout,
        adjoint: Adjoint,
    ) -> None:
        self._field, self._layout, self._adjoint = field, layout, adjoint
        self._evaluation: Evaluation = field.differentiable(
            t, x, keywords, adjoint.sums.stand_ins, want_time=adjoint.want_time
        )
        self.slope = layout.flat(self._evaluation.slope.detach())

    def pull(self, cotangent: Tensor, *, batched: bool = False) -> Tensor:
        slope = self._evaluation.slope
        if not slope.requires_grad:
            return torch.zeros_like(cotangent)
        self._field.report.vjps += len(cotangent) if batched else 1
        (product,) = torch.autograd.grad(
            slope,
            self._evaluation.leaf,
            self._layout.shaped(cotangent),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return torch.zeros_like(cotangent) if product is None else self._layout.flat(product)

    def pull_all(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        adjoint = self._adjoint
        self._field.report.vjps += 1
        product, tau = self._field.vjp(
            self._evaluation, self._layout.shaped(cotangent), adjoint.sums, want_time=adjoint.want_time
        )
        return torch.zeros_like(cotangent) if product is None else self._layout.flat(product), tau


def slopes_to_keep(parts: Tensor, *, first_is_known: bool) -> list[Tensor]:
    """Return the slopes of a step to keep where stages are: not the first one, where that is kept in any case."""
    return [parts[:, 1:].clone() if first_is_known else parts]
