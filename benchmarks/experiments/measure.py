"""One training iteration with each method: gradient error, peak memory, time, evaluations of the vector field."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import peak_memory
from benchmarks.experiments.methods import BACKPROPAGATION, METHODS, Solve, Solver

Loss = Callable[[Any, Solve], Tensor]  # of a model, which it evaluates in the precision of the model's parameters


class VectorField(nn.Module):
    """Vector field that counts its evaluations."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that `work()` held at one time, above what was held when it began."""
    if device.type != "cuda":
        return peak_memory.peak_bytes(work)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Iteration:
    """The forward and backward pass of a training iteration, on a copy of the model."""

    def __init__(self, model: nn.Module, loss: Loss, solve: Solve, dtype: torch.dtype | None = None) -> None:
        self.model = copy.deepcopy(model).to(dtype) if dtype else copy.deepcopy(model)
        self.loss, self.solve = loss, solve
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device

    def __call__(self) -> Tensor:
        """The loss; leaves the gradient in the parameters."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss(self.model, self.solve)
        loss.backward()
        return loss.detach()

    def gradient(self) -> Tensor:
        """Of all parameters, as one vector in float64."""
        self()
        return torch.cat([_gradient(parameter).flatten() for parameter in self.parameters])

    def seconds(self) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        self()
        synchronize(self.device)
        return time.perf_counter() - start

    def evaluations(self) -> int:
        """Count the evaluations of a vector field in one iteration."""
        calls = 0

        def count(module: nn.Module, *_: object) -> None:
            nonlocal calls
            calls += isinstance(module, VectorField)

        with torch.nn.modules.module.register_module_forward_hook(count):
            self()
        return calls

    def peak_bytes(self) -> int:
        self()  # once beforehand, so that lazily created buffers do not count
        for parameter in self.parameters:
            parameter.grad = None
        gc.collect()
        return peak_bytes(self, self.device)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter).double() if parameter.grad is None else parameter.grad.double()


def relative_error(gradient: Tensor, reference: Tensor) -> float:
    """Norm of the difference, relative to the norm of the reference."""
    return float((gradient - reference).norm() / reference.norm())


def compare(
    model: nn.Module, loss: Loss, solver: Solver, *, rounds: int = 5, rows: tuple[str, ...] = tuple(METHODS)
) -> dict[str, dict[str, float]]:
    """Of every method: `loss`, `gradient_error_float64` and `gradient_error` in the model's own precision (both against
    backpropagation in that precision, relative), `peak_bytes`, `seconds` (median of the rounds), `evaluations`."""
    doubles = {row: Iteration(model, loss, solver.solve(row), torch.float64).gradient() for row in rows}
    iterations = {row: Iteration(model, loss, solver.solve(row)) for row in rows}
    gradients = {row: iteration.gradient() for row, iteration in iterations.items()}
    figures: dict[str, dict[str, float]] = {}
    for row, iteration in tqdm(iterations.items(), desc="measuring", leave=False):
        figures[row] = {
            "loss": float(iteration()),
            "gradient_error_float64": relative_error(doubles[row], doubles[BACKPROPAGATION]),
            "gradient_error": relative_error(gradients[row], gradients[BACKPROPAGATION]),
            "peak_bytes": iteration.peak_bytes(),
            "evaluations": iteration.evaluations(),
        }
    # One iteration of each method in turn, so that whatever else the machine does falls on all of them.
    times = [
        {row: iteration.seconds() for row, iteration in iterations.items()}
        for _ in tqdm(range(rounds), desc="timing", leave=False)
    ]
    for row in rows:
        figures[row]["seconds"] = statistics.median(each[row] for each in times)
    return figures
