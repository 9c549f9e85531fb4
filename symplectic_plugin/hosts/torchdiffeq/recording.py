"""Which recorder goes with a solver class of torchdiffeq's."""

from __future__ import annotations

import functools
from typing import Any

from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from .adaptive import Adaptive
from .fixed_grid import FixedGrid
from .implicit import AdaptiveImplicit, FixedGridImplicit
from .implicit_recorders import ImplicitAdaptive, ImplicitFixedGrid


@functools.cache
def recording(base: type) -> Any:
    """The class of a solver that does what `base` does and notes its steps."""
    if issubclass(base, FixedGridImplicit):
        recorder: type = ImplicitFixedGrid
    elif issubclass(base, AdaptiveImplicit):
        recorder = ImplicitAdaptive
    else:
        recorder = Adaptive if issubclass(base, RKAdaptiveStepsizeODESolver) else FixedGrid
    return type(base.__name__, (recorder, base), {"base": base})
