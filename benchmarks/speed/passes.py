"""One forward and one backward pass, as it is timed: the interface, and what all but diffrax have in common."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import symplectic_plugin
from benchmarks.experiments.measure import VectorField, peak_bytes, synchronize
from benchmarks.speed.problems import Field, loss


@dataclass(frozen=True)
class Timing:
    """Seconds of the forward pass and of both; of both on the processor, all threads together; evaluations of the field
    on the way forward and back, where known."""

    forward: float
    total: float
    processor: float
    evaluations: tuple[int, int | None] | None = None


class Pass(ABC):
    """A forward and a backward pass, repeatable.

    Attributes:
        note: what a reader of its figures has to know.
    """

    note: str = ""

    @abstractmethod
    def run(self, *, count: bool = False) -> Timing:
        """Once; leaves the gradient behind."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """Of the initial state and then the parameters, as one vector on the CPU; of the last run."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Most memory of a run, above what was held before it."""


class TorchPass(Pass):
    """Of a function from the initial state to the final one, which holds the field.

    Attributes:
        counter: how its evaluations are counted.
    """

    def __init__(self, field: Field, y0: Tensor, solve: Callable[[Tensor], Tensor]) -> None:
        self.field, self.y0, self.solve = field, y0, solve
        self.counter: Callable[[bool], AbstractContextManager[Callable[[], int]]] = counted
        self.inputs = [y0, *field.parameters()]
        self.gradients: tuple[Tensor, ...] = ()

    def run(self, *, count: bool = False) -> Timing:
        self.gradients = ()
        with self.counter(count) as calls:
            synchronize(self.y0.device)
            begin, processor = time.perf_counter(), time.process_time()
            value = self.forward()
            synchronize(self.y0.device)
            middle, forward_calls = time.perf_counter(), calls()
            self.gradients = self.backward(value)
            synchronize(self.y0.device)
            end, all_calls, processor = time.perf_counter(), calls(), time.process_time() - processor
        return Timing(
            middle - begin, end - begin, processor, (forward_calls, all_calls - forward_calls) if count else None
        )

    def forward(self) -> Tensor:
        return loss(self.solve(self.y0))

    def backward(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, self.inputs)

    def gradient(self) -> Tensor:
        return torch.cat([part.detach().flatten().cpu() for part in self.gradients])

    def peak_bytes(self) -> int:
        self.gradients = ()
        gc.collect()
        return peak_bytes(self.run, self.y0.device)


@contextmanager
def counted(count: bool) -> Iterator[Callable[[], int]]:
    """Count the evaluations of a field since; by a hook only where they are counted, as a hook takes time."""
    calls = 0

    def hook(module: nn.Module, *_: object) -> None:
        nonlocal calls
        calls += isinstance(module, VectorField)

    if not count:
        yield lambda: 0
        return
    with torch.nn.modules.module.register_module_forward_hook(hook):
        yield lambda: calls


@contextmanager
def reported(count: bool) -> Iterator[Callable[[], int]]:
    """The same, as the plugin reports it: torch.compile would compile the hook as well, and again for each count."""
    if not count:
        yield lambda: 0
        return
    with symplectic_plugin.profile() as solves:
        yield lambda: sum(solve.evaluations + solve.recomputed for solve in solves)
