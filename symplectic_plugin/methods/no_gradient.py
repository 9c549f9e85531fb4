"""What a forward solve returns where a gradient would be expected: its iterations leave no graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def without_gradient(solution: Tensor, inputs: Sequence[Tensor], name: str, instead: str) -> Tensor:
    """A solution that was computed without a graph, with one that raises where it is differentiated.

    Args:
        solution: it.
        inputs: what it depends on; if none of that requires a gradient, nothing is to be raised.
        name: the method's.
        instead: what is to be used for a gradient.
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
