"""Hooks of the user's on what autograd saves (checkpointing, offloading): they get the states that a solve keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..field._torch_compat import saved_tensor_hooks_are_active
from .checkpoint import Checkpoint


class StatesForHooks:
    """States and slopes that autograd's node saves, so that hooks take them over.

    The checkpoints have them only while the node's backward pass needs them. Without hooks there are none.

    Args:
        checkpoints: the solve's.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        active = saved_tensor_hooks_are_active()
        self._checkpoints = [c for c in checkpoints if c.state is not None] if active else []
        self._has_slope = [checkpoint.slope is not None for checkpoint in self._checkpoints]

    def take(self) -> list[Tensor]:
        """Take the tensors from the checkpoints, to be saved."""
        taken: list[Tensor] = []
        for checkpoint in self._checkpoints:
            taken += [handle[0] for handle in (checkpoint.state, checkpoint.slope) if handle is not None]
            checkpoint.put_handles(None, None)
        return taken

    @contextlib.contextmanager
    def restored(self, saved: Iterator[Tensor]) -> Iterator[None]:
        """Give the tensors back for as long.

        Args:
            saved: the tensors, in the order of `take`.
        """

        def handle(tensor: Tensor) -> Any:
            tensor = tensor.detach()
            return tensor, tensor._version

        for checkpoint, has_slope in zip(self._checkpoints, self._has_slope, strict=True):
            checkpoint.put_handles(handle(next(saved)), handle(next(saved)) if has_slope else None)
        try:
            yield
        finally:
            for checkpoint in self._checkpoints:
                checkpoint.put_handles(None, None)
