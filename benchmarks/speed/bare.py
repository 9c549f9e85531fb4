"""The cost of the evaluations alone: calls of the field and its vector-Jacobian products, with no solver around them.

No method that makes the same calls can be faster by more than what it accumulates more cleverly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.passes import TorchPass
from benchmarks.speed.problems import Field


@dataclass(frozen=True)
class Calls:
    """Numbers of evaluations in a pass.

    Args:
        kept: those that keep their graph on the way forward, which are none or all.
        plain: those that make no graph.
        again_plain: those made again without a graph on the way back.
        again: those made again with a graph and a vector-Jacobian product.
    """

    kept: int = 0
    plain: int = 0
    again_plain: int = 0
    again: int = 0


class BareCalls(TorchPass):
    """The calls, all at the initial state. Its gradient is of no use."""

    def __init__(self, field: Field, y0: Tensor, calls: Calls) -> None:
        super().__init__(field, y0, lambda y: y)
        self.calls = calls
        self.t = torch.zeros((), dtype=y0.dtype, device=y0.device)
        self.cotangent = torch.ones_like(y0)
        self.kept: list[Tensor] = []

    def forward(self) -> Tensor:
        self.kept = [self.field(self.t, self.y0) for _ in range(self.calls.kept)]
        self._evaluate(self.calls.plain)
        return self.cotangent

    def backward(self, value: Tensor) -> tuple[Tensor, ...]:
        while self.kept:
            torch.autograd.grad(self.kept.pop(), self.inputs, value)
        self._evaluate(self.calls.again_plain)
        for _ in range(self.calls.again):
            torch.autograd.grad(self.field(self.t, self.y0), self.inputs, value)
        return ()

    def _evaluate(self, times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                self.field(self.t, self.y0)
