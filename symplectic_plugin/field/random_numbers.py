"""The random number generators that a vector field may draw from, so that a draw can be made again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

GeneratorStates = tuple[Tensor, ...]


class Generators:
    """torch's default generators for the CPU and for the state's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type in ("cuda", "xpu") else None

    def states(self) -> GeneratorStates:
        """Where the generators are in their sequences."""
        cpu = torch.get_rng_state()
        if self._device is None:
            return (cpu,)
        return cpu, torch.get_device_module(self._device.type).get_rng_state(self._device)

    def set(self, states: GeneratorStates) -> None:
        """Put the generators to where they were."""
        torch.set_rng_state(states[0])
        if self._device is not None:
            torch.get_device_module(self._device.type).set_rng_state(states[1], self._device)

    def are_at(self, states: GeneratorStates) -> bool:
        """Whether nothing was drawn since."""
        return all(torch.equal(now, then) for now, then in zip(self.states(), states, strict=True))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the generators as they are now, whatever is drawn within."""
        states = self.states()
        try:
            yield
        finally:
            self.set(states)
