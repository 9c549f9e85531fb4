"""What autograd does with what a node saves: whether it stays after a backward pass, and hooks that take it over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .kept import Kept


def graph_is_kept() -> bool:
    """Whether the backward pass that is going on leaves the graph for another one (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def hooks_are_active() -> bool:
    """Whether what autograd saves now is handed to somebody's hooks: checkpointing, or offloading to the host."""
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    with torch.enable_grad():  # torch 2.5: a saved tensor takes no second pair of hooks
        probe = torch.ones((), requires_grad=True).exp()
    try:
        probe.grad_fn._raw_saved_result.register_hooks(lambda x: x, lambda x: x)  # type: ignore[union-attr]
    except RuntimeError:
        return True
    return False


def states_for_hooks(kept: Sequence[Kept]) -> StatesForHooks:
    """The states among what is kept, if hooks are to have them, else none."""
    return StatesForHooks([step for step in kept if step.state is not None] if hooks_are_active() else [])


class StatesForHooks:
    """States and slopes that a node saves, so that hooks get them; checkpoints have them only while it needs them."""

    def __init__(self, kept: Sequence[Kept]) -> None:
        self._kept = kept
        self._has_slope = [step.slope is not None for step in kept]

    def take(self) -> list[Tensor]:
        """Take the tensors from the checkpoints, to be saved."""
        taken = []
        for step in self._kept:
            for name in ("state", "slope"):
                if (handle := getattr(step, name)) is not None:
                    taken.append(handle[0])
                    setattr(step, name, None)
        return taken

    @contextlib.contextmanager
    def there(self, saved: Iterator[Tensor]) -> Iterator[None]:
        """Give them back for as long.

        Args:
            saved: the tensors, in the order of `take`.
        """
        for step, has_slope in zip(self._kept, self._has_slope, strict=True):
            for name in ("state", "slope") if has_slope else ("state",):
                tensor = next(saved).detach()
                setattr(step, name, (tensor, tensor._version))
        try:
            yield
        finally:
            for step in self._kept:
                step.state = step.slope = None
