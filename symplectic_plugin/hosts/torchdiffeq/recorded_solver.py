"""Which recording goes with a solver class of torchdiffeq's."""

from __future__ import annotations

import functools
from typing import Any

from ._compat import RKAdaptiveStepsizeODESolver
from .adaptive import Adaptive
from .fixed_grid import FixedGrid
from .implicit import AdaptiveImplicit, FixedGridImplicit
from .implicit_recording import ImplicitAdaptive, ImplicitFixedGrid


@functools.cache
def recorded_solver(base: type) -> Any:
    """Make the class of a solver that does what `base` does and records its steps."""
    if issubclass(base, FixedGridImplicit):
        recording: type = ImplicitFixedGrid
    elif issubclass(base, AdaptiveImplicit):
        recording = ImplicitAdaptive
    else:
        recording = Adaptive if issubclass(base, RKAdaptiveStepsizeODESolver) else FixedGrid
    return type(base.__name__, (recording, base), {"base": base})
