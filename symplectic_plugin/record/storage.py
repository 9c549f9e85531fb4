"""Storage of checkpoints: in the memory of the state's device, in the host's, or on a disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .defaults import DEFAULTS


class Storage(ABC):
    """A place to put tensors into, and to get them back from, on their device and with the same values."""

    on_device: bool
    """True where stored tensors take memory of the state's device."""

    @abstractmethod
    def put(self, tensor: Tensor) -> Any:
        """Store a tensor. Returns a handle for `get`; with the last reference to the handle the tensor is forgotten."""

    @abstractmethod
    def get(self, handle: Any) -> Tensor:
        """Get a tensor back.

        Raises:
            RuntimeError: if the tensor was changed in place.
        """


def storage(offload: str | os.PathLike[str] | None, device: torch.device) -> Storage:
    """Return the storage for a value of the option `offload`: None, "cpu", or a directory that exists.

    Raises:
        ValueError: if the value is none of these.
    """
    offload = DEFAULTS.offload if offload is None else offload
    if offload is None or (offload == "cpu" and device.type == "cpu"):
        return DeviceMemory()
    if offload == "cpu":
        return HostMemory()
    if isinstance(offload, str | os.PathLike) and os.path.isdir(offload):
        return Disk(offload)
    raise ValueError(f'symplectic_adjoint: offload must be "cpu" or a directory that exists, got {offload!r}')


class DeviceMemory(Storage):
    """Tensors stay where they are."""

    on_device = True

    def put(self, tensor: Tensor) -> tuple[Tensor, int]:
        return tensor, tensor._version

    def get(self, handle: tuple[Tensor, int]) -> Tensor:
        tensor, version = handle
        if tensor._version != version:
            raise RuntimeError(
                "symplectic_adjoint: one of the states needed for gradient computation has been modified by an inplace "
                "operation: a callback, an event function or the vector field changes the state that it is handed"
            )
        return tensor


class HostMemory(Storage):
    """Pinned memory of the host, to and from which the device copies while it goes on with other things."""

    on_device = False

    def put(self, tensor: Tensor) -> tuple[Tensor, torch.device]:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor, non_blocking=True)
        return pinned, tensor.device

    def get(self, handle: tuple[Tensor, torch.device]) -> Tensor:
        # On the stream that made the copy, which comes first.
        tensor, device = handle
        return tensor.to(device, non_blocking=True)


class Disk(Storage):
    """Files in a directory of its own, which goes when the storage does: after the backward pass, with a graph that is
    dropped without one, after an exception, and when the interpreter exits."""

    on_device = False

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = tempfile.mkdtemp(prefix="symplectic_adjoint_", dir=directory)
        self._files = 0
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)

    def put(self, tensor: Tensor) -> _File:
        path = os.path.join(self._directory, f"{self._files}.pt")
        self._files += 1
        try:
            torch.save(tensor.detach().cpu().clone(), path)
        except OSError as error:
            raise OSError(f"symplectic_adjoint: a checkpoint could not be written to {path}: {error}") from error
        return _File(path, tensor.device)

    def get(self, handle: _File) -> Tensor:
        return torch.load(handle.path, weights_only=True).to(handle.device)


class _File:
    """A tensor in a file, which goes with it."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.path = path
        self.device = device
        weakref.finalize(self, _remove, path)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
