"""The autocast state that a vector field is evaluated in, and the package's own arithmetic without autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ._torch_compat import any_autocast_enabled


class Autocast:
    """The autocast state at the time of construction, to be entered again.

    Args:
        device: the state's.

    Attributes:
        is_on: whether autocast was on for any kind of device.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_on: bool = any_autocast_enabled()
        self._kinds = [kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
        self._dtypes = {kind: torch.get_autocast_dtype(kind) for kind in self._kinds if torch.is_autocast_enabled(kind)}

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Enter the recorded state with its weight cache off: casts cached under no_grad have no graph."""
        with contextlib.ExitStack() as stack:
            for kind in self._kinds:
                if (dtype := self._dtypes.get(kind)) is not None:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
                elif torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context for the package's own arithmetic, which must not be done in half precision."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        else contextlib.nullcontext()
    )
