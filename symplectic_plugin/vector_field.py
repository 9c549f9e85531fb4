"""The vector field as the sweep sees it: what it depends on, its value, and its vector-Jacobian product."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .dependencies import Held, depends_on_another, edge_of, graph_inputs, has_hooks, is_alive, referenced
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
        spare: how many of them, at the end, f has not been seen to use yet.
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
        self.spare = 0
        self.left_out: list[Tensor] = []
        self.draws = False
        self.rounding = 0.0
        self.generators = Generators(device)
        self._only = only
        self._held = Held(None)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
            if torch.amp.is_autocast_available(kind)
        ]
        self._leaves = {id(tensor) for tensor in self.dependencies if tensor.is_leaf}
        self._edges = {edge_of(tensor) for tensor in self.dependencies if not tensor.is_leaf}

    def discover(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """Evaluate f with a graph: take what it is seen to depend on and what it holds into `dependencies`.

        Returns:
            The slope, without its graph.

        Raises:
            ValueError: if the state has no gradients, or f does not return a tensor of its shape.
            RuntimeError: if f depends on a tensor with a history that can't be found.
        """
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"symplectic_adjoint: a state of {x.dtype} has no gradient: give the initial state in a floating-point "
                "or complex dtype"
            )
        self._held = held = Held(self.function)
        edges = {edge_of(tensor): tensor for tensor in held.tensors if not tensor.is_leaf}
        before = self.generators.states()
        with torch.enable_grad(), self._forward_autocast():
            leaf, argument = _as_argument(x)
            t = t.detach()
            slope = self._checked(self.function(t, argument, **keywords), x)
        self.draws = not self.generators.are_at(before)
        self.rounding = max(self.rounding, _precision(x.dtype))
        found = graph_inputs(slope, argument.grad_fn, self._edges | edges.keys())
        if found.older:
            with self.generators.kept(), torch.enable_grad(), self._forward_autocast():
                _, argument = _as_argument(x)
                again = graph_inputs(
                    self.function(t, argument, **keywords), argument.grad_fn, self._edges | edges.keys()
                )
            if lost := set(found.older) & set(again.older):  # else they were made in another thread
                raise RuntimeError(_lost(f"that was computed from others before the solve, by {lost.pop().name()}"))
        held_leaves = [tensor for tensor in held.tensors if tensor.is_leaf]
        held_ids = {id(tensor) for tensor in held_leaves}
        others = [x for x in found.leaves if id(x) in held_ids]
        found.leaves = [x for x in found.leaves if id(x) not in held_ids and x is not leaf and x is not t]
        self._take([*others, *referenced(found.leaves)], self._leaves, id)
        self._take([edges[edge] for edge in found.edges - self._edges], self._edges, edge_of)
        used = len(self.dependencies)
        # What it holds it may use at other times. Not what only a hook would notice, nor what has lost its graph.
        spare = [tensor for tensor in held_leaves if not has_hooks(tensor)]
        self._take(spare, self._leaves, id)
        unused = [tensor for edge, tensor in edges.items() if edge not in self._edges and not has_hooks(tensor)]
        self._take([tensor for tensor in unused if is_alive(tensor)], self._edges, edge_of)
        self.spare = len(self.dependencies) - used
        self._leaves |= {id(tensor) for tensor in held.frozen}
        self._refuse_own_state(slope, t, x, keywords)
        return slope.detach()

    def _refuse_own_state(self, slope: Tensor, t: Tensor, x: Tensor, keywords: Keywords) -> None:
        """Refuse an f whose value depends on a tensor that it changes whenever it is evaluated.

        Raises:
            RuntimeError: if it is one.
        """
        changed = self._held.changed_in_place()
        if not changed:
            return
        values = [tensor.clone() for tensor in changed]
        with self.generators.kept() if self.draws else contextlib.nullcontext():
            again = self(t, x, keywords)
        with torch.no_grad():
            for tensor, value in zip(changed, values, strict=True):
                tensor.copy_(value)
        if not self.draws and not torch.equal(again, slope.detach()):
            raise RuntimeError(
                "symplectic_adjoint: the vector field returns other values each time, by a tensor that it changes in "
                "place (spectral_norm in training mode does), so it can't be evaluated again in the backward pass. "
                "Put such modules in eval mode, or normalise before the solve."
            )

    def require_same(self, deviation: Tensor) -> None:
        """Refuse to have been another vector field on the way forward.

        Args:
            deviation: how far from where it ended a step ends now, relative to the states.

        Raises:
            RuntimeError: if that is more than rounding.
        """
        worst = float(deviation)
        if worst > self.rounding ** (2 / 3):
            raise RuntimeError(
                "symplectic_adjoint: the vector field returned other values in the backward pass than in the forward "
                f"pass (a step ended {worst:.0e} off, relative to the state), so the gradient would be wrong. What it "
                "depends on must not change in between: counters, caches, random numbers that are not torch's, or that "
                "it did not draw when it was first evaluated."
            )

    def settle(self) -> None:
        """Take what f changes by itself for changed: what changes from now on, somebody else does."""
        self._held.settle()

    def _take(self, tensors: Iterable[Tensor], known: set[Any], key: Callable[[Tensor], Any]) -> None:
        """Take tensors that are not known yet into the dependencies."""
        for tensor in tensors:
            if key(tensor) not in known:
                known.add(key(tensor))
                (self.left_out if self._only else self.dependencies).append(tensor)

    def __call__(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """The slope f(t, x), without a graph."""
        with torch.no_grad(), self._forward_autocast():
            return self._checked(self.function(t.detach(), x.detach(), **keywords), x).detach()

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
        strangers = self._strangers(slope, argument, (leaf, t), sums)
        if strangers:
            # f may make leaves of its own, and nodes in other threads: those are new ones in each evaluation.
            with self.generators.kept():
                again = self._with_graph(t, x, keywords, sums, want_time)
            if strangers & self._strangers(again[3], again[2], again[:2], sums):
                raise RuntimeError(_lost("that it neither held nor used at the first point when the solve began"))
        inputs = [leaf, t, *sums.inputs] if want_time else [leaf, *sums.inputs]
        grads = torch.autograd.grad(slope, inputs, cotangent.to(slope.dtype), allow_unused=True)
        sums.add(grads[1 + want_time :])
        return slope.detach(), grads[0], grads[1] if want_time else None

    def evaluate(self, t: Tensor, x: Tensor, keywords: Keywords, sums: CotangentSums) -> Tensor:
        """The slope f(t, x), with its graph back to t, x and the dependencies or their stand-ins."""
        with torch.enable_grad(), self._forward_autocast(), sums.substitution():
            return self._checked(self.function(t, x, **keywords), x)

    def _checked(self, slope: Any, x: Tensor) -> Tensor:
        """What f returned at state x, which may be of another kind than what it returned at first."""
        slope = require_slope(slope, x)
        self.rounding = max(self.rounding, _precision(slope.dtype))  # under autocast less than the state's
        return slope

    def _with_graph(
        self, t: Tensor, x: Tensor, keywords: Keywords, sums: CotangentSums, want_time: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The state as a leaf, the time, the state as f's argument, and the slope with its graph."""
        with torch.enable_grad():
            leaf, argument = _as_argument(x)
            t = t.detach().requires_grad_(want_time)
            return leaf, t, argument, self.evaluate(t, argument, keywords, sums)

    def _strangers(self, slope: Tensor, argument: Tensor, own: Iterable[Tensor], sums: CotangentSums) -> set[Any]:
        """Leaves that are neither known nor f's arguments, and older nodes, in the slope's graph.

        Raises:
            RuntimeError: if it has a tensor that was to be replaced by its stand-in.
        """
        found = graph_inputs(slope, argument.grad_fn, self._edges)
        if sums.replaced and (
            not sums.replaced.isdisjoint(found.edges) or not sums.replaced.isdisjoint(map(id, found.leaves))
        ):
            raise RuntimeError(
                "symplectic_adjoint: the vector field uses a tensor with hooks, or one computed from others that it "
                "uses too, where torch functions do not see it (in an autograd.Function, TorchScript or a solve "
                "inside), so its gradient can't be told apart. Remove the hooks, or use it through torch operations."
            )
        known = self._leaves | {id(tensor) for tensor in (*own, *sums.inputs)}
        found.leaves = [leaf for leaf in found.leaves if id(leaf) not in known]
        return {*referenced(found.leaves), *found.older}

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """A context in which f holds what it held on the way forward."""
        return self._held.restored()

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

    @functools.cached_property
    def entangled(self) -> set[int]:
        """Identities of dependencies whose histories lead to other ones: differentiating would count those twice."""
        computed = [tensor for tensor in (*self.dependencies, *self.left_out) if not tensor.is_leaf]
        return {id(tensor) for tensor in computed if depends_on_another(tensor, self.dependencies)}


class CotangentSums:
    """The cotangents of the dependencies, summed over the evaluations of one sweep.

    While f is evaluated, some dependencies are replaced by leaves with the same values: those whose histories lead to
    others, which would be counted twice; those with hooks, which would run at each evaluation.

    Args:
        field: the vector field.
        needed: which of its dependencies need a gradient in this backward pass.
    """

    def __init__(self, field: VectorField, needed: Sequence[bool]) -> None:
        candidates = [*field.dependencies, *field.left_out]
        replaced = [
            tensor
            for tensor in candidates
            if id(tensor) in field.entangled or has_hooks(tensor) or not tensor.requires_grad
        ]
        self._stand_ins = {id(tensor): tensor.detach().requires_grad_() for tensor in replaced}
        self.replaced = {
            id(tensor) if tensor.is_leaf else edge_of(tensor) for tensor in replaced if tensor.requires_grad
        }
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
            grad = grad.to_dense() if grad.is_sparse else grad
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

    def used(self) -> list[bool]:
        """Whether each dependency was used, as far as it is needed."""
        totals = iter(self._totals)
        return [need and next(totals) is not None for need in self._needed]

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
        kwargs = {name: self._replaced(value) for name, value in kwargs.items()} if kwargs else {}
        return func(*[self._replaced(value) for value in args], **kwargs)

    def _replaced(self, value: Any) -> Any:
        """An argument with the stand-ins in it. Not by torch's pytree, which leaves cycles to the garbage collector."""
        if isinstance(value, Tensor):
            return self.stand_ins.get(id(value), value)
        if isinstance(value, torch.Size):
            return value
        if type(value) in (tuple, list):
            return type(value)([self._replaced(part) for part in value])
        if isinstance(value, tuple | list | dict):  # a named tuple, or what else there is
            return tree_map_only(Tensor, self._replaced, value)
        return value


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context for the sweep's own arithmetic, which must not be done in half precision."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        else contextlib.nullcontext()
    )


def _as_argument(x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with x's values and, to be handed to f, a view of it, whose node is older than all that f makes."""
    leaf = x.detach().requires_grad_()
    return leaf, leaf.view_as(leaf)


def require_slope(slope: Any, x: Tensor) -> Tensor:
    """What is to be a slope at state x.

    Raises:
        ValueError: if it is not a tensor of the state's shape.
    """
    if not isinstance(slope, Tensor) or slope.shape != x.shape:
        got = tuple(slope.shape) if isinstance(slope, Tensor) else type(slope).__name__
        raise ValueError(
            f"symplectic_adjoint: the vector field must return a tensor of the state's shape {tuple(x.shape)}, "
            f"got {got}"
        )
    return slope


@functools.cache
def _precision(dtype: torch.dtype) -> float:
    """The relative rounding error of a dtype, none for integers."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _lost(what: str) -> str:
    return (
        f"symplectic_adjoint: the vector field depends on a tensor {what}, so its gradient would be lost. "
        'Name it: options={"adjoint_params": (tensor, ...)}.'
    )
