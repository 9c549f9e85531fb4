"""The vector field as the sweep sees it: what it depends on, its value, and its vector-Jacobian product."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .dependencies import captured_tensors, edge_of, graph_inputs
from .randomness import Generators

Keywords = Mapping[str, Any]


class VectorField:
    """A host's vector field f(t, x), evaluated without a graph on the way forward, with one in the sweep.

    Args:
        function: `function(t, x, **keywords)`, the vector field as the host calls it.
        device: the state's.
        named: tensors that f depends on, found or not: gradients go to them as well.
        only: gradients go to `named` alone, whatever else f depends on.

    Attributes:
        dependencies: the tensors that f depends on and that gradients go to, once `discover` has run.
        left_out: those that it depends on and that get none, because of `only`.
        draws: whether it was seen to draw random numbers.
        generators: those that it may draw from.
        rounding: the relative rounding error of what it returns.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        named: Sequence[Tensor] = (),
        only: bool = False,
    ) -> None:
        self.function = function
        self.dependencies = [tensor for tensor in dict.fromkeys(named) if tensor.requires_grad]
        self.left_out: list[Tensor] = []
        self.draws = False
        self.rounding = 0.0
        self.generators = Generators(device)
        self._only = only
        self._own_leaves = 0
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}
        ]
        self._known_leaves = {id(tensor) for tensor in self.dependencies if tensor.is_leaf}
        self._known_edges = {edge_of(tensor) for tensor in self.dependencies if not tensor.is_leaf}

    def discover(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """Evaluate f with a graph: take what it is seen to depend on and what it holds into `dependencies`.

        Returns:
            The slope, without its graph.

        Raises:
            RuntimeError: if f depends on a tensor with a history that can't be found.
        """
        held = captured_tensors(self.function)
        edges = {edge_of(tensor): tensor for tensor in held if not tensor.is_leaf}
        before = self.generators.states()
        with torch.enable_grad():
            leaf, argument = _as_argument(x)
            t = t.detach()
            slope = self.function(t, argument, **keywords)
        self.draws = not self.generators.are_at(before)
        if not isinstance(slope, Tensor):
            return slope
        # Under autocast f may return a less precise type than the state's.
        self.rounding = max(
            torch.finfo(kind).eps for kind in (x.dtype, slope.dtype) if kind.is_floating_point or kind.is_complex
        )
        found = graph_inputs(slope, argument.grad_fn, self._known_edges | edges.keys())
        if found.older is not None:
            raise RuntimeError(_lost(f"that was computed from others before the solve, by {found.older.name()}"))
        leaves = [tensor for tensor in held if tensor.is_leaf]
        leaves += [tensor for tensor in found.leaves if tensor is not leaf and tensor is not t]
        for tensor in leaves:
            if id(tensor) not in self._known_leaves:
                self._known_leaves.add(id(tensor))
                self._take(tensor)
        for edge in found.edges - self._known_edges:
            self._known_edges.add(edge)
            self._take(edges[edge])
        return slope.detach()

    def _take(self, tensor: Tensor) -> None:
        (self.left_out if self._only else self.dependencies).append(tensor)

    def __call__(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """The slope f(t, x), without a graph."""
        with torch.no_grad(), self._forward_autocast():
            return self.function(t.detach(), x.detach(), **keywords).detach()

    def vjp(
        self, t: Tensor, x: Tensor, keywords: Keywords, cotangent: Tensor, sums: CotangentSums, want_time: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The slope, and the products of its cotangent with the Jacobians of f.

        Args:
            t: time, a scalar.
            x: state.
            keywords: passed on to f.
            cotangent: of the slope, in the shape of x.
            sums: takes the products with the Jacobians in the dependencies.
            want_time: whether the product with df/dt is needed.

        Returns:
            The slope; (df/dx)^T cotangent; <df/dt, cotangent>, the latter two None where f does not depend on it.

        Raises:
            RuntimeError: if f depends on a tensor here that was not found on the way forward.
        """
        leaf, t, argument, slope = self._with_graph(t, x, keywords, sums, want_time)
        if not slope.requires_grad:
            return slope, None, None
        strangers = self._strangers(slope, argument, (leaf, t, *sums.inputs))
        if len(strangers) > self._own_leaves:
            # f may make leaves of its own (`x.detach().requires_grad_()`): those are new ones in each evaluation.
            with self.generators.kept():
                again = self._with_graph(t, x, keywords, sums, want_time)
            if strangers & self._strangers(again[3], again[2], (again[0], again[1], *sums.inputs)):
                raise RuntimeError(_lost("that it neither held nor used at the first point when the solve began"))
            self._own_leaves = len(strangers)
        inputs = [leaf, t, *sums.inputs] if want_time else [leaf, *sums.inputs]
        grads = torch.autograd.grad(slope, inputs, cotangent.to(slope.dtype), allow_unused=True)
        sums.add(grads[1 + want_time :])
        return slope.detach(), grads[0], grads[1] if want_time else None

    def _with_graph(
        self, t: Tensor, x: Tensor, keywords: Keywords, sums: CotangentSums, want_time: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The state as a leaf, the time, the state as f's argument, and the slope with its graph."""
        with torch.enable_grad():
            leaf, argument = _as_argument(x)
            t = t.detach().requires_grad_(want_time)
            with self._forward_autocast(), sums.substitution():
                return leaf, t, argument, self.function(t, argument, **keywords)

    def _strangers(self, slope: Tensor, argument: Tensor, inputs: Iterable[Tensor]) -> set[Tensor]:
        """The leaves in the slope's graph that are neither inputs nor known."""
        found = graph_inputs(slope, argument.grad_fn, self._known_edges)
        if found.older is not None:
            raise RuntimeError(_lost(f"that was computed from others before the solve, by {found.older.name()}"))
        known = self._known_leaves | {id(tensor) for tensor in inputs}
        return {leaf for leaf in found.leaves if id(leaf) not in known}

    @contextlib.contextmanager
    def _forward_autocast(self) -> Iterator[None]:
        """The autocast state of the forward pass, without its cache, which may hold casts that have no graph."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                if enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
                elif torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield


class CotangentSums:
    """The cotangents of the dependencies, summed over the evaluations of one sweep.

    While f is evaluated, a dependency with a history is replaced by a leaf with the same values: else its history would
    be entered, and a parameter that f uses both by itself and through it would be counted twice.

    Args:
        field: the vector field.
        needed: which of its dependencies need a gradient in this backward pass.
    """

    def __init__(self, field: VectorField, needed: Sequence[bool]) -> None:
        computed = [tensor for tensor in field.dependencies + field.left_out if not tensor.is_leaf]
        self._stand_ins = {id(tensor): tensor.detach().requires_grad_() for tensor in computed}
        self._dependencies = [tensor for tensor, need in zip(field.dependencies, needed, strict=True) if need]
        self._needed = needed
        self._totals: list[Tensor | None] = [None] * len(self._dependencies)
        self.inputs = [self._stand_ins.get(id(tensor), tensor) for tensor in self._dependencies]

    def substitution(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which f is to be evaluated with a graph."""
        return _Substitution(self._stand_ins) if self._stand_ins else contextlib.nullcontext()

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of one evaluation, in the order of `inputs`; None for what it did not use."""
        totals, addends = [], []
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            total = self._totals[i]
            if total is None:
                # A copy, since autograd may hand out one tensor twice; and wide, since a half-precision sum of many
                # terms loses the small ones.
                self._totals[i] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
            else:
                totals.append(total)
                addends.append(grad)
        if totals:
            torch._foreach_add_(totals, addends)

    def results(self) -> list[Tensor | None]:
        """The sums in the dtypes of the dependencies, None for what is not needed or was not used."""
        sums = iter(zip(self._totals, self._dependencies, strict=True))
        return [
            None if not need or (pair := next(sums))[0] is None else pair[0].to(pair[1].dtype) for need in self._needed
        ]


class _Substitution(TorchFunctionMode):
    """Hands every torch function the stand-ins in place of the tensors that they stand for."""

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.stand_ins = stand_ins

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: self.stand_ins.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context for the sweep's own arithmetic, which must not be done in half precision."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.is_autocast_enabled(device.type)
        else contextlib.nullcontext()
    )


def _as_argument(x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with x's values and, to be handed to f, a view of it, whose node is older than all that f makes."""
    leaf = x.detach().requires_grad_()
    return leaf, leaf.view_as(leaf)


def _lost(what: str) -> str:
    return (
        f"symplectic_adjoint: the vector field depends on a tensor {what}, so its gradient would be lost. "
        'Name it: options={"adjoint_params": (tensor, ...)}.'
    )
