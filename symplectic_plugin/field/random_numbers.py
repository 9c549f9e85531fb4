"""The random number generators that a vector field may draw from, so that a draw can be made again.

torch's default generators are shared by all threads. Where a state is noted or set for an evaluation of f, no other
evaluation that the package makes may draw in between.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

GeneratorStates = tuple[Tensor, ...]

_PATIENCE = 2.0
"""Seconds to wait for another thread's evaluation."""


class _Turn:
    """The turn of a thread to evaluate a field that draws.

    f may wait for a thread of its own that needs a turn too. So no thread waits long, nor twice for the same thread:
    what two evaluations at once draw wrongly, the comparison with the forward pass finds.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder = 0
        self._gave_up: set[tuple[int, int]] = set()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the turn."""
        me, holder = threading.get_ident(), self._holder
        acquired = self._lock.acquire(timeout=0 if (holder, me) in self._gave_up else _PATIENCE)
        if acquired:
            self._holder = me
        else:
            self._gave_up.add((holder, me))
        try:
            yield
        finally:
            if acquired:
                self._lock.release()


_turn = _Turn()


class Generators:
    """torch's default generators for the CPU and for the state's device.

    Args:
        device: the state's.

    Attributes:
        last_noted: where the generators were before the latest evaluation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type in ("cuda", "xpu") else None
        self._place: GeneratorStates | None = None
        self._noted: list[GeneratorStates | None] = []
        self._left: GeneratorStates | None = None
        self.last_noted: GeneratorStates | None = None

    def states(self) -> GeneratorStates:
        """Return where the generators are in their sequences."""
        cpu = torch.get_rng_state()
        if self._device is None:
            return (cpu,)
        return cpu, torch.get_device_module(self._device.type).get_rng_state(self._device)

    def are_at(self, states: GeneratorStates) -> bool:
        """Return whether nothing was drawn since the generators were at these states."""
        return _are_equal(self.states(), states)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the generators as they are now, whatever is drawn within."""
        states = self.states()
        try:
            yield
        finally:
            self._set(states)

    def begin_noting(self) -> None:
        """Begin to note where the generators are before each evaluation."""
        self._noted = []

    def note(self, states: GeneratorStates) -> None:
        """Note where the generators were before an evaluation."""
        goes_on = bool(self._noted) and self._left is not None and _are_equal(states, self._left)
        self._noted.append(None if goes_on else states)
        self.last_noted = states

    @property
    def noted(self) -> tuple[GeneratorStates | None, ...]:
        """States of the generators before each evaluation since `begin_noting`.

        None where the evaluation before left them. They are elsewhere if another thread draws too.
        """
        return tuple(self._noted)

    @contextlib.contextmanager
    def drawing_noted(self) -> Iterator[None]:
        """Note where the generators are, and draw from there."""
        with _turn.taken():
            self.note(self.states())
            yield
            self._left = self.states()

    @property
    def place(self) -> GeneratorStates | None:
        """States from which the next draw is made again."""
        return self._place

    def draw_again_from(self, states: GeneratorStates) -> None:
        """Have draws made again from these states on."""
        self._place = states

    @contextlib.contextmanager
    def drawing_again(self) -> Iterator[None]:
        """Draw from where the last draws that were made again ended, and leave the generators as they are."""
        with _turn.taken(), self.kept():
            if self._place is not None:
                self._set(self._place)
            yield
            self._place = self.states()

    def _set(self, states: GeneratorStates) -> None:
        torch.set_rng_state(states[0])
        if self._device is not None:
            torch.get_device_module(self._device.type).set_rng_state(states[1], self._device)


def _are_equal(states: GeneratorStates, others: GeneratorStates) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
