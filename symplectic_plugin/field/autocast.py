"""The autocast state that a vector field is evaluated in, and the sweep's own arithmetic without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Autocast:
    """The autocast state of now, for later.

    Args:
        device: the state's.
    """

    def __init__(self, device: torch.device) -> None:
        self._states = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
            if torch.amp.is_autocast_available(kind)
        ]

    def again(self) -> contextlib.AbstractContextManager[None]:
        """It once more, without its cache, which may hold casts that have no graph."""
        for kind, enabled, _ in self._states:
            if enabled or torch.is_autocast_enabled(kind):
                return self._again()
        return _NOTHING

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
                elif torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context for the sweep's own arithmetic, which must not be done in half precision."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        else contextlib.nullcontext()
    )
