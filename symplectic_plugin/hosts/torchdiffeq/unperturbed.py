"""The vector field without the outermost of torchdiffeq's wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb, _PerturbFunc


class Unperturbed:
    """The vector field without the outermost of torchdiffeq's wrappers, where times need no gradient.

    That moves a time to its neighbour on request, and puts it into the state's precision, at a cost that a small
    network feels.
    """

    def __init__(self, func: Any) -> None:
        self.func = func
        self.inner = func.base_func if type(func) is _PerturbFunc else func

    def __call__(self, t: Tensor, y: Tensor, perturb: Perturb = Perturb.NONE) -> Any:
        if self.inner is self.func and perturb is Perturb.NONE:
            return self.func(t, y)
        if not self.leaves(t, y) or (t.requires_grad and perturb is not Perturb.NONE):
            return self.func(t, y, perturb=perturb)
        return self.inner(self.moved(t, perturb), y)

    def leaves(self, t: Tensor, y: Tensor) -> bool:
        """Whether the wrapper is there, and does nothing but move a time t for a state y."""
        return self.inner is not self.func and t.dtype == y.dtype and not t.is_complex()

    @staticmethod
    def moved(t: Tensor, perturb: Perturb = Perturb.NONE) -> Tensor:
        """The time that the wrapper hands on."""
        if perturb is Perturb.NONE:
            return t
        return torch.nextafter(t, t + 1 if perturb is Perturb.NEXT else t - 1)
