"""Vector fields for implicit methods, and one step's gradient by the implicit function theorem with dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from symplectic_plugin.methods.implicit_step import ImplicitSteps, StepFields
from symplectic_plugin.methods.implicit_tableaux import ImplicitMethod
from symplectic_plugin.methods.newton import NewtonOptions
from symplectic_plugin.methods.stage_field import GraphOf, StageField
from symplectic_plugin.methods.transposed_step import TransposedSteps

Field = Callable[[Tensor, Tensor], Tensor]


class RandomField:
    """Sum of a stiff, nearly linear part and a nonstiff part that depends on time, with random parameters."""

    def __init__(self, n: int, seed: int, stiffness: float = 100.0) -> None:
        random = torch.Generator().manual_seed(seed)
        rates = -torch.logspace(0, torch.log10(torch.tensor(stiffness)).item(), n, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random))
        self.linear = (rotation * rates @ rotation.T).requires_grad_()
        self.w1 = torch.randn(5, n + 1, dtype=torch.float64, generator=random).requires_grad_()
        self.w2 = torch.randn(n, 5, dtype=torch.float64, generator=random).requires_grad_()

    def stiff(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.linear.T + 0.1 * torch.sin(x) * t

    def nonstiff(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1) @ self.w1.T) @ self.w2.T

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.stiff(t, x) + self.nonstiff(t, x)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.linear, self.w1, self.w2]


class Linearization(GraphOf):
    """Evaluation with a graph back to the state, the time and the parameters.

    Args:
        function: vector field.
        t: time.
        x: state, shape (B, n).
        parameters: tensors that the field depends on.
        sums: sums of the parameters' cotangents, which `pull_all` adds to.

    Attributes:
        alive: number of instances alive.
        most_alive: largest number of instances alive at one time.
    """

    alive = 0
    most_alive = 0

    def __init__(self, function: Field, t: Tensor, x: Tensor, parameters: Sequence[Tensor], sums: list[Tensor]) -> None:
        self.t = t.detach().requires_grad_()
        super().__init__(lambda x: function(self.t, x), x)
        self.parameters, self.sums = parameters, sums
        Linearization.alive += 1
        Linearization.most_alive = max(Linearization.most_alive, Linearization.alive)

    def __del__(self) -> None:
        Linearization.alive -= 1

    def pull_all(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = [self.leaf, self.t, *self.parameters]
        xi, tau, *shares = torch.autograd.grad(self.result, inputs, cotangent, allow_unused=True)
        for total, share in zip(self.sums, shares, strict=True):
            if share is not None:
                total += share
        return xi, tau


class OneStep:
    """Step of size h from time t, and its partner's step back.

    Args:
        method: method of the step.
        field: vector field.
        t: time at the step's start.
        h: size of the step.
        options: options of the solvers.
        steps: takes the step, to share factors with other steps; by default new.
        transposed: takes the step back; by default new.
    """

    def __init__(
        self,
        method: ImplicitMethod,
        field: RandomField,
        t: float,
        h: float,
        options: NewtonOptions | None = None,
        *,
        steps: ImplicitSteps | None = None,
        transposed: TransposedSteps | None = None,
    ) -> None:
        options = options or NewtonOptions()
        self.method, self.field, self.t, self.h = method, field, t, h
        self.steps = steps or ImplicitSteps(method, options)
        self.transposed = transposed or TransposedSteps(method, options)
        self.sums = [torch.zeros_like(parameter) for parameter in field.parameters]
        self.functions = [field] if method.nonstiff is None else [field.stiff, field.nonstiff]
        stages, *others = [[self._stage(function, c) for c in method.tableau.c.tolist()] for function in self.functions]
        self.fields = StepFields(stages, others[0] if others else None)

    def _stage(self, function: Field, c: float) -> StageField:
        t = torch.tensor(self.t + c * self.h, dtype=torch.float64)

        def value(x: Tensor) -> Tensor:
            with torch.no_grad():
                return function(t, x)

        return StageField(
            value,
            lambda x: function(t, x),
            lambda x: Linearization(function, t, x, self.field.parameters, self.sums),
        )

    def take(self, x: Tensor, first_slope: Tensor | None = None):
        return self.steps.take(self.fields, x, self.h, 1e-6 + 1e-6 * x.abs(), first_slope)

    def back(self, x: Tensor, cotangent: Tensor):
        """Take the step and its partner's; returns the step and the cotangents of x, t, h and the parameters."""
        taken = self.take(x)
        assert not taken.failed.any(), taken.reason
        b, c = self.method.tableau.b, self.method.tableau.c
        cotangents = self.h * b[:, None, None] * cotangent
        adjoint = self.transposed.take(self.fields, taken.stages, self.h, cotangents)
        taus = [torch.zeros(()) if tau is None else tau for tau in adjoint.times]
        size = (cotangents * taken.slopes).sum() + (adjoint.stages * (taken.stages - x)).sum()
        size = size / self.h + sum(c_i * tau for c_i, tau in zip(c, taus, strict=True))
        return taken, cotangent + adjoint.stages.sum(0), sum(taus), size, self.sums

    def by_the_implicit_function_theorem(self, x: Tensor, stages: Tensor, cotangent: Tensor):
        """Compute the step's end and all cotangents, with dG/dK of G(K; x, t, h, parameters) = 0 as a dense matrix.

        K are the slopes, and G = 0 the equations of the stages.
        """
        x, t, h = (torch.as_tensor(v, dtype=torch.float64).clone().requires_grad_() for v in (x, self.t, self.h))
        tableaux = [self.method.tableau] + ([self.method.nonstiff] if self.method.nonstiff is not None else [])
        times = [self.t + c * self.h for c in self.method.tableau.c.tolist()]
        with torch.no_grad():
            at = [
                torch.stack([f(torch.tensor(s, dtype=torch.float64), z) for s, z in zip(times, stages, strict=True)])
                for f in self.functions
            ]
        slopes = torch.stack(at).requires_grad_()

        def equations(slopes: Tensor) -> Tensor:
            states = x + h * sum(torch.einsum("ij,jbn->ibn", p.a, k) for p, k in zip(tableaux, slopes, strict=True))
            c = self.method.tableau.c
            return slopes - torch.stack(
                [torch.stack([f(t + c[i] * h, states[i]) for i in range(len(c))]) for f in self.functions]
            )

        # One Newton correction takes the slopes at the given stages to the solution of the equations, to rounding.
        matrix = torch.autograd.functional.jacobian(equations, slopes.detach()).reshape(slopes.numel(), -1)
        correction = torch.linalg.solve(matrix, equations(slopes).detach().flatten())
        slopes = (slopes.detach() - correction.view_as(slopes)).requires_grad_()
        matrix = torch.autograd.functional.jacobian(equations, slopes.detach()).reshape(slopes.numel(), -1)
        end = x + h * torch.einsum("i,pibn->bn", self.method.tableau.b, slopes)
        variables = [x, t, h, *self.field.parameters]
        *direct, of_slopes = torch.autograd.grad(end, [*variables[:3], slopes], cotangent, allow_unused=True)
        dual = torch.linalg.solve(matrix.T, of_slopes.flatten()).view_as(slopes)
        through = torch.autograd.grad(equations(slopes), variables, -dual, allow_unused=True)
        total = [g if g is not None else torch.zeros_like(v) for g, v in zip(through, variables, strict=True)]
        for i, g in enumerate(direct):
            if g is not None:
                total[i] = total[i] + g
        return end.detach(), total
