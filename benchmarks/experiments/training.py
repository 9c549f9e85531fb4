"""Training, with whichever method computes the gradient."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.experiments.measure import synchronize


def train(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    iterations: int,
    *,
    label: str,
    seed: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    one_cycle: bool = False,
) -> tuple[Any, list[float], float]:
    """A trained copy of the model, the loss of every iteration, and the median seconds an iteration took.

    `loss` draws its own batch from torch's generator, which starts from `seed`: every method sees the same batches.
    """
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = None
    if one_cycle:  # rises to the learning rate in a tenth of the iterations, then falls to nothing
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations, pct_start=0.1)
    losses, seconds = [], []
    progress = tqdm(range(iterations), desc=label, unit="it", leave=False)
    for _ in progress:
        start = time.perf_counter()
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(value.item())
        progress.set_postfix(loss=f"{losses[-1]:.4g}")
    return model, losses, statistics.median(seconds)
