"""Checks of a backward pass: that f is what it was in the forward pass, and that its derivatives exist."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._torch_compat import has_storage, is_batch_of_cotangents, is_transformed
from .autocast import without_autocast
from .cotangents import CotangentSums
from .vector_field import VectorField


def refuse_transforms() -> None:
    """Refuse derivatives that would leave out a solve.

    Raises:
        RuntimeError: inside a transform of torch.func, or in forward mode.
    """
    if is_transformed():
        raise RuntimeError(
            "symplectic_adjoint: a solve can't be differentiated in forward mode (torch.autograd.forward_ad) or by "
            "torch.func's transforms: use torch.autograd, or the base method itself"
        )


def refuse_batches(cotangents: Sequence[Tensor | None]) -> None:
    """Refuse batches of cotangents: the sweep decides by the values of single ones.

    Raises:
        RuntimeError: in a backward pass of many cotangents at once.
    """
    if any(x is not None and is_batch_of_cotangents(x) for x in cotangents):
        raise RuntimeError(
            "symplectic_adjoint: the backward pass takes one cotangent at a time: call torch.autograd.grad for each "
            "instead of is_grads_batched=True, and torch.autograd.functional's functions with vectorize=False"
        )


class Addresses:
    """The memory addresses of tensors' values: setting `.data` changes them, and autograd does not see that.

    Args:
        tensors: the tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._addresses = _addresses(tensors)

    def require_same(self) -> None:
        """Require the addresses to be what they were.

        Raises:
            RuntimeError: if one is not.
        """
        if self._addresses != _addresses(self._tensors):
            raise RuntimeError(_CHANGED.format("was given other memory (its .data was set, or it was moved)"))


class Witness:
    """The state of a vector field's dependencies at the end of the forward pass, for the backward pass to check.

    Args:
        field: the vector field, with its dependencies discovered.

    Attributes:
        saved: dependencies that f has been seen to use. Autograd's node saves them, and raises if they are changed in
            place.
    """

    def __init__(self, field: VectorField) -> None:
        field.settle()
        self.field = field
        self.saved = field.used
        self._spare = field.dependencies[len(self.saved) :]
        self._addresses = Addresses(self.saved)
        self._versions = [tensor._version for tensor in self._spare]

    @contextlib.contextmanager
    def checked(self, needed: Sequence[bool], device: torch.device) -> Iterator[tuple[VectorField, CotangentSums]]:
        """Return the context of a sweep: autocast off, and checks of the dependencies before and after.

        Args:
            needed: for each dependency whether it needs a gradient.
            device: the state's.

        Yields:
            The vector field as it was in the forward pass, and the sums of its dependencies' cotangents.

        Raises:
            RuntimeError: if a tensor that f depends on is not what it was.
        """
        field = self.field.as_recorded()
        now = field.stand_ins_now()
        stand_ins = field.stand_ins if now.stand_for_the_same(field.stand_ins) else now
        sums = CotangentSums(field.dependencies, needed, stand_ins)
        with without_autocast(device):
            self._addresses.require_same()
            yield field, sums
        if field.function is self.field.function and threading.active_count() > 1 and not field.is_as_recorded():
            raise RuntimeError(
                "symplectic_adjoint: another thread changed what the vector field holds during its backward pass, so "
                "the gradient may be wrong: let it do so before or after that, or give each thread a copy of the module"
            )
        used = sums.used()[len(self.saved) :]
        for tensor, version, is_used in zip(self._spare, self._versions, used, strict=True):
            if is_used and tensor._version != version:
                raise RuntimeError(_CHANGED.format("was modified by an inplace operation"))


_CHANGED = (
    "symplectic_adjoint: a tensor that the vector field depends on {} between the forward and the backward pass, so "
    "the gradient can't be had. Call backward() before changing it."
)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return the memory addresses of tensors' values, 0 for those without."""
    return [tensor.data_ptr() if has_storage(tensor) else 0 for tensor in tensors]
