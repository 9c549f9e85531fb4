"""The two checkpointing methods that the paper compares with, as reference implementations on top of torchdiffeq.

Both are exact. They are here to be measured against, not for use: the state is a tensor or a tuple, the times increase,
gradients reach the initial state and f's parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

State = Tensor | tuple[Tensor, ...]


def controls_its_step(method: str) -> bool:
    """Return whether a method of torchdiffeq's is adaptive."""
    return issubclass(SOLVERS[method], RKAdaptiveStepsizeODESolver)


def odeint_checkpoint_per_component(f: nn.Module, y0: State, t: Tensor, **solver: Any) -> State:
    """Keep y0 only, and solve again with a graph in the backward pass: the paper's "baseline scheme".

    Memory: one solve's graph. Cost: 3 evaluations where backpropagation takes 2. As with every reentrant
    torch.utils.checkpoint, the gradient has to be asked for by `.backward()`.
    """
    is_tuple = isinstance(y0, tuple)

    def solve(*parts: Tensor) -> State:
        return odeint(f, parts if is_tuple else parts[0], t, **solver)

    parts = y0 if is_tuple else (y0,)
    if not any(part.requires_grad for part in parts):  # it drops the parameters' gradients otherwise
        parts = (parts[0].detach().requires_grad_(), *parts[1:])
    # Not the other kind, use_reentrant=False: that one takes a derivative that f computes for itself, such as a
    # divergence, for the backward pass, and solves again in the midst of the forward one.
    return checkpoint(solve, *parts, use_reentrant=True)


def odeint_checkpoint_per_step(f: nn.Module, y0: State, t: Tensor, *, method: str, **solver: Any) -> State:
    """Keep each accepted step's state, and take a step again with a graph in the backward pass: ACA.

    (Zhuang et al., Adaptive Checkpoint Adjoint, ICML 2020.) Memory: the states, and one step's graph. Cost: 3
    evaluations where backpropagation takes 2.
    """
    parts = y0 if isinstance(y0, tuple) else (y0,)
    parameters = [p for p in f.parameters() if p.requires_grad]
    outputs = _PerStep.apply(_Solve(f, t, method, solver, isinstance(y0, tuple), len(parts)), *parts, *parameters)
    return outputs if isinstance(y0, tuple) else outputs[0]


class _Solve:
    """A solve that leaves its steps behind, and can take each of them again."""

    def __init__(self, f: nn.Module, t: Tensor, method: str, solver: dict[str, Any], is_tuple: bool, size: int) -> None:
        self.f, self.t, self.method, self.solver, self.is_tuple, self.size = f, t, method, solver, is_tuple, size
        self.tableau = SOLVERS[method].tableau if controls_its_step(method) else None
        if self.tableau is not None:
            weights = self.tableau.c_sol
            if weights[-1] != 0 or not torch.equal(weights[:-1], self.tableau.beta[-1]):
                raise ValueError(f"{method} hands on a slope that is not f at a step's end, so no step stands alone")
        self.steps: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []  # of each: start, state there, size

    def state(self, parts: tuple[Tensor, ...]) -> State:
        return parts if self.is_tuple else parts[0]

    def parts(self, state: State) -> tuple[Tensor, ...]:
        return state if self.is_tuple else (state,)

    def forward(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs at all times; fills `steps`."""

        def recorded(t: Tensor, y: State) -> State:
            return self.f(t, y)

        def record(t: Tensor, y: State, dt: Tensor) -> None:
            self.steps.append((t, self.parts(y), dt))

        setattr(recorded, "callback_step" if self.tableau is None else "callback_accept_step", record)
        return self.parts(odeint(recorded, self.state(parts), self.t, method=self.method, **self.solver))

    def step(self, index: int, parts: tuple[Tensor, ...]) -> tuple[slice, list[tuple[Tensor, ...]]]:
        """Which outputs lie in a step, and these outputs together with the state at the step's end, with a graph."""
        start, _, size = self.steps[index]
        end = self.steps[index + 1][0] if index + 1 < len(self.steps) else start + size
        if self.tableau is None and index + 1 == len(self.steps):
            end = self.t[-1]
        inside = [j for j in range(1, len(self.t)) if start < self.t[j] <= end]
        outputs = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
        if self.tableau is not None and not inside:
            return outputs, [self.runge_kutta(start, size, parts)]
        if self.tableau is None:
            ends = odeint(self.f, self.state(parts), torch.stack([start, end]), method=self.method)
            y1 = tuple(part[1] for part in self.parts(ends))
            weights = [(self.t[j] - start) / (end - start) for j in inside]  # torchdiffeq's interpolation here
            between = [tuple(a + w.to(a) * (b - a) for a, b in zip(parts, y1, strict=True)) for w in weights]
            return outputs, [*between, y1]
        # The same step of the host's, forced upon its step control; outputs are the host's own interpolation.
        times = torch.cat([start[None], self.t[outputs].to(start), end[None]])
        times = times[:-1] if times[-1] == times[-2] else times
        forced = {"first_step": size, "min_step": size}
        found = self.parts(
            odeint(self.f, self.state(parts), times, method=self.method, **{**self.solver, "options": forced})
        )
        rows = [tuple(part[j + 1] for part in found) for j in range(len(times) - 1)]
        return outputs, rows if len(times) - 1 > len(inside) else [*rows, rows[-1]]

    def runge_kutta(self, t: Tensor, h: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step without the last stage, which is the next step's first."""
        slopes: list[tuple[Tensor, ...]] = []
        y = parts
        for alpha, beta in zip([0.0, *self.tableau.alpha], [[], *self.tableau.beta], strict=True):
            if len(beta) > 0:
                y = tuple(
                    part + sum((b * h).to(part) * slope[i] for b, slope in zip(beta, slopes, strict=True) if b != 0)
                    for i, part in enumerate(parts)
                )
            if len(beta) + 1 < len(self.tableau.c_sol):
                slopes.append(self.parts(self.f((t + alpha * h).to(parts[0].dtype), self.state(y))))
        return y


class _PerStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: _Solve, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.solve, ctx.parameters = solve, tensors[solve.size :]
        return solve.forward(tensors[: solve.size])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        solve, parameters = ctx.solve, ctx.parameters
        carried = [torch.zeros_like(given[0]) for given in cotangents]
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for index in reversed(range(len(solve.steps))):
            with torch.enable_grad():
                parts = tuple(part.detach().requires_grad_() for part in solve.steps[index][1])
                outputs, rows = solve.step(index, parts)
            found = [part for row in rows for part in row]
            given = [part[j] for j in range(outputs.start, outputs.stop) for part in cotangents] + carried
            derivatives = torch.autograd.grad(found, [*parts, *parameters], given, materialize_grads=True)
            carried = list(derivatives[: len(parts)])
            for gradient, derivative in zip(gradients, derivatives[len(parts) :], strict=True):
                gradient.add_(derivative)
            del found, rows
        carried = [part + given[0] for part, given in zip(carried, cotangents, strict=True)]
        return None, *carried, *gradients
