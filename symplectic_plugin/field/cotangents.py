"""The cotangents of a vector field's dependencies, and leaves that stand in for some dependencies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ._torch_compat import foreach_add_, has_hooks
from .graphs import depends_on_another, edge_of


class StandIns:
    """Leaves that take the place of some dependencies of f, with the same values.

    A dependency whose history leads to another would be counted twice; one with hooks would run them at each
    evaluation; and one that was frozen since has no gradient.

    Args:
        tensors: dependencies of f.
        others: dependencies to which no history may lead.

    Attributes:
        leaves: the stand-ins, by the identities of the tensors that they stand for.
        replaced: edges of the tensors that are replaced, for leaves their identities.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), others: Sequence[Tensor] = ()) -> None:
        replaced = [
            tensor
            for tensor in tensors
            if not tensor.requires_grad
            or has_hooks(tensor)
            or (not tensor.is_leaf and depends_on_another(tensor, others))
        ]
        self.leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in replaced}
        self.replaced = {
            id(tensor) if tensor.is_leaf else edge_of(tensor) for tensor in replaced if tensor.requires_grad
        }

    def stand_for_the_same(self, others: StandIns) -> bool:
        """Return whether these stand-ins and others stand for the same tensors."""
        return self.leaves.keys() == others.leaves.keys()

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stand-in of a tensor, or the tensor itself if it has none."""
        return self.leaves.get(id(tensor), tensor)

    def substitution(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which f uses the stand-ins."""
        return _Substitution(self.leaves)


NO_STAND_INS = StandIns()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which cotangents are summed: a half-precision sum of many terms loses the small ones."""
    return torch.promote_types(dtype, torch.float32)


class _Substitution(TorchFunctionMode):
    """Hands every torch function the stand-ins in place of the tensors that they stand for."""

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.stand_ins = stand_ins

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {name: self._replaced(value) for name, value in kwargs.items()} if kwargs else {}
        return func(*[self._replaced(value) for value in args], **kwargs)

    def _replaced(self, value: Any) -> Any:
        """Replace the tensors in an argument. Not by torch's pytree, which leaves cycles to the garbage collector."""
        if isinstance(value, Tensor):
            return self.stand_ins.get(id(value), value)
        if isinstance(value, torch.Size):
            return value
        if type(value) in (tuple, list):
            return type(value)([self._replaced(part) for part in value])
        if isinstance(value, tuple | list | dict):  # a named tuple, or what else there is
            return tree_map_only(Tensor, self._replaced, value)
        return value


class CotangentSums:
    """The cotangents of the dependencies, summed over the evaluations of one sweep.

    Args:
        dependencies: tensors that f depends on.
        needed: for each dependency whether it needs a gradient in this backward pass.
        stand_ins: leaves that take the place of some dependencies.

    Attributes:
        inputs: tensors that the graphs of f are differentiated with respect to.
    """

    def __init__(self, dependencies: Sequence[Tensor], needed: Sequence[bool], stand_ins: StandIns) -> None:
        self.stand_ins = stand_ins
        self._dependencies = [tensor for tensor, need in zip(dependencies, needed, strict=True) if need]
        self._needed = needed
        self._totals: list[Tensor | None] = [None] * len(self._dependencies)
        self.inputs = [stand_ins.of(tensor) for tensor in self._dependencies]

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of one evaluation, in the order of `inputs`; None for inputs without influence."""
        totals, addends = [], []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            grad = grad.to_dense() if grad.is_sparse else grad
            total = self._totals[i]
            if total is None:
                # A copy, since autograd may hand out one tensor twice.
                self._totals[i] = grad.to(wide(grad.dtype), copy=True)
            else:
                totals.append(total)
                addends.append(grad)
        if totals:
            foreach_add_(totals, addends)

    def used(self) -> list[bool]:
        """Return for each dependency whether it is needed and has got a gradient."""
        totals = iter(self._totals)
        return [need and next(totals) is not None for need in self._needed]

    def results(self) -> list[Tensor | None]:
        """Return the sums in the dtypes of the dependencies; None where not needed, or for zero."""
        sums = iter(zip(self._totals, self._dependencies, strict=True))
        return [
            None if not need or (pair := next(sums))[0] is None else pair[0].to(pair[1].dtype) for need in self._needed
        ]
