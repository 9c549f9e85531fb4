"""The vector field without the outermost of torchdiffeq's wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._compat import Perturb, _PerturbFunc


class Unperturbed:
    """The vector field without the outermost of torchdiffeq's wrappers, where times need no gradient.

    That moves a time to its neighbour on request, and puts it into the state's precision, at a cost that a small
    network feels.
    """

    def __init__(self, func: Any) -> None:
        self.func = func
        self.inner = func.base_func if type(func) is _PerturbFunc else func

    def __call__(self, t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Any:
        if self.inner is self.func or t.dtype != y.dtype or t.is_complex():
            return self.func(t, y) if perturb is Perturb.NONE else self.func(t, y, perturb=perturb)
        if perturb is not Perturb.NONE:
            if t.requires_grad:
                return self.func(t, y, perturb=perturb)
            t = torch.nextafter(t, t + 1 if perturb is Perturb.NEXT else t - 1)
        return self.inner(t, y)
