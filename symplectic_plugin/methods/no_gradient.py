"""Solutions of forward solves by implicit methods, which refuse to be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def without_gradient(solution: Tensor, inputs: Sequence[Tensor], name: str, instead: str) -> Tensor:
    """Give a solution a graph that raises in the backward pass, as the solver's iterations leave none.

    Args:
        solution: tensor computed without a graph.
        inputs: tensors that the solution depends on. If none requires a gradient, the solution is returned as it is.
        name: name of the method, for the error.
        instead: arguments that give a gradient, for the error.
    """
    inputs = [x for x in inputs if x.requires_grad]
    return _NoGradient.apply(name, instead, solution, *inputs) if inputs else solution


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, instead: str, solution: Tensor, *_: Tensor) -> Tensor:
        ctx.name, ctx.instead = name, instead
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name}: the solver's iterations have no gradient: use {ctx.instead} for an exact one")
