"""The vector field of a solve: its value, its dependencies, its vector-Jacobian product."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import any_autocast_enabled, has_hooks, has_storage, run_backward, sequence_number
from .autocast import Autocast
from .compiled import CompiledFunction, without_compilation
from .cotangents import NO_STAND_INS, CotangentSums, StandIns
from .evaluation import Evaluation, Keywords, require_slope
from .graphs import (
    Edge,
    GraphInputs,
    accumulator,
    cotangent_bytes,
    edge_of,
    graph_inputs,
    in_type_of,
    is_alive,
    referenced,
)
from .held import Held
from .random_numbers import Generators
from .report import SolveReport

_NOTHING_HELD = Held(None)
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class VectorField:
    """A host's vector field f(t, x).

    Args:
        function: `function(t, x, **keywords)`, the vector field as the host calls it.
        device: the state's.
        report: takes the counts of evaluations.
        named: tensors that f depends on and that have gradients, whether they are found or not.
        only: whether no other tensors have gradients.
        compiled: the compiled user function that `function` wraps, or None.

    Attributes:
        dependencies: tensors that f depends on and that have gradients, once `discover` has run.
        spare: number of dependencies, the last ones, that f has not been seen to use.
        seen: identities of the tensors that the first evaluation used.
        stand_ins: leaves that take the place of some dependencies while f is evaluated with a graph.
        left_out: tensors that f depends on and that have no gradients because of `only`.
        draws: whether f was seen to draw random numbers.
        generators: random number generators that f may draw from.
        rounding: relative rounding error of the values of f.
        autocast: autocast state in which f is evaluated.
        parts: functions that f is the sum of, for an additive method.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        report: SolveReport,
        named: Sequence[Tensor] = (),
        compiled: CompiledFunction | None = None,
        *,
        only: bool = False,
    ) -> None:
        self.function = function
        self.compiled = compiled
        self.device = device
        self.report = report
        self.dependencies = [tensor for tensor in dict.fromkeys(named) if tensor.requires_grad]
        self.spare = 0
        self.seen: set[int] = set()
        self.left_out: list[Tensor] = []
        self.draws = False
        self.rounding = 0.0
        self.generators = Generators(device)
        self.parts: tuple[Callable[..., Tensor], ...] = ()
        self._draws_again = False
        self.stand_ins = StandIns()
        self._accumulators: set[Any] | None = None
        self._lasting: set[int] = set()
        self._only = only
        self._held = _NOTHING_HELD
        self.autocast = Autocast(device)
        self._leaves = {id(tensor) for tensor in self.dependencies if tensor.is_leaf}
        self._edges = {edge_of(tensor) for tensor in self.dependencies if not tensor.is_leaf}

    def discover(
        self, t: Tensor, x: Tensor, keywords: Keywords, *, want_time: bool = False, with_history: bool = False
    ) -> Evaluation:
        """Evaluate f for the first time: find the tensors that it depends on, and whether it draws random numbers.

        Args:
            t, x, keywords, want_time, with_history: as for `differentiable`.

        Returns:
            The evaluation.

        Raises:
            ValueError: if the state has no gradients, or f does not return a tensor of its shape.
            RuntimeError: if f depends on a tensor with a history that can't be found.
        """
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"symplectic_adjoint: a state of {x.dtype} has no gradient: give the initial state in a floating-point "
                "or complex dtype"
            )
        self._held = held = Held((self.function, *self.parts))
        edges = {edge_of(tensor): tensor for tensor in held.tensors if not tensor.is_leaf}
        before = self.generators.states()
        t = t.detach().clone()  # the caller's may be changed in place
        with without_compilation():  # the dependencies of a compiled function do not show as well
            evaluation = self.differentiable(t, x, keywords, want_time=want_time, with_history=with_history)
        self.draws = not self.generators.are_at(before)
        if self.draws:
            self.generators.note(before)
        self.rounding = max(self.rounding, _precision(x.dtype))
        found = self._inputs_of(evaluation, self._edges | edges.keys())
        self._take_dependencies(held, found, edges, (evaluation.leaf, evaluation.time))
        self._leaves.update([id(tensor) for tensor in held.frozen])
        self.stand_ins = self.stand_ins_now()
        self._lasting = {
            tensor.untyped_storage().data_ptr()
            for tensor in (t, *self.dependencies, *self.left_out, *held.frozen)
            if has_storage(tensor)
        }
        self._refuse_own_state(evaluation.slope, t, x, keywords)
        if self.compiled is not None and held.statistics_changed():
            self.compiled.give_up("a batch norm in training mode would count the first evaluation twice")
        return evaluation

    def _inputs_of(self, evaluation: Evaluation, stops: Set[Edge]) -> GraphInputs:
        """Find what the graph of the first evaluation ends in.

        Raises:
            RuntimeError: if it ends in a tensor with a history that f does not hold.
        """
        found = graph_inputs(evaluation.slope, evaluation.argument.grad_fn, stops)
        if found.older:
            with self.generators.kept(), without_compilation():
                second = self.differentiable(evaluation.time, evaluation.leaf, evaluation.keywords, want_time=False)
            again = graph_inputs(second.slope, second.argument.grad_fn, stops)
            if lost := set(found.older) & set(again.older):  # other nodes were made in another thread
                raise RuntimeError(_lost(f"that was computed from others before the solve, by {lost.pop().name()}"))
        return found

    def _take_dependencies(
        self, held: Held, found: GraphInputs, edges: Mapping[Edge, Tensor], arguments: tuple[Tensor, Tensor]
    ) -> None:
        """Take the tensors that the first evaluation used, and those that f holds, into the dependencies.

        Args:
            held: what f holds.
            found: what the graph of the first evaluation ends in.
            edges: tensors with a history that f holds, by their edges.
            arguments: the evaluation's state and time.
        """
        held_leaves = [tensor for tensor in held.tensors if tensor.is_leaf]
        held_ids = {id(tensor) for tensor in held_leaves}
        used_leaves = found.leaves
        self.seen = {id(x) for x in used_leaves} | {id(edges[edge]) for edge in found.edges & edges.keys()}
        others = [x for x in used_leaves if id(x) in held_ids]
        known = held_ids | {id(x) for x in arguments}
        found.leaves = [x for x in used_leaves if id(x) not in known]
        del used_leaves  # a reference more, that `referenced` would count
        self._take([*others, *referenced(found.leaves)], self._leaves, id)
        self._take([edges[edge] for edge in found.edges - self._edges], self._edges, edge_of)
        used = len(self.dependencies)
        # f may use at other times what it holds. Not what only a hook would notice, nor what has lost its graph.
        self._take([tensor for tensor in held_leaves if not has_hooks(tensor)], self._leaves, id)
        unused = [tensor for edge, tensor in edges.items() if edge not in self._edges and not has_hooks(tensor)]
        self._take([tensor for tensor in unused if is_alive(tensor)], self._edges, edge_of)
        self.spare = len(self.dependencies) - used

    @property
    def used(self) -> list[Tensor]:
        """Dependencies that f has been seen to use."""
        return self.dependencies[: len(self.dependencies) - self.spare]

    def set_parts(self, parts: Sequence[Callable[..., Tensor]]) -> None:
        """Set the parts that f consists of, as functions of their own, for an additive method."""
        self.parts = tuple(parts)

    def part(self, function: Callable[..., Tensor]) -> VectorField:
        """Return a part of f as a vector field with the same dependencies."""
        part = copy.copy(self)
        part.function = function
        return part

    def stand_ins_now(self) -> StandIns:
        """Return the leaves that have to stand in for dependencies, as the dependencies are now."""
        return StandIns((*self.dependencies, *self.left_out), self.dependencies)

    def memory_of(self, evaluation: Evaluation) -> list[int]:
        """Return the bytes of each storage that an evaluation keeps with its graph and that is not there anyway."""
        behind = [node for node, _ in self._edges]  # the histories of what it depends on
        return [size for address, size in evaluation.storages(behind).items() if address not in self._lasting]

    def cotangents_of(self, evaluation: Evaluation) -> int:
        """Return the most bytes of cotangents that a backward pass through an evaluation holds at one time."""
        behind = [node for node, _ in self._edges]
        return cotangent_bytes(evaluation.slope, (evaluation.argument.grad_fn, *behind))

    def _refuse_own_state(self, slope: Tensor, t: Tensor, x: Tensor, keywords: Keywords) -> None:
        """Refuse an f whose value depends on a tensor that f changes in each evaluation.

        Raises:
            RuntimeError: if f is such.
        """
        changed = self._held.changed_in_place()
        if not changed:
            return
        values = [tensor.clone() for tensor in changed]
        with self.generators.kept() if self.draws else contextlib.nullcontext(), without_compilation():
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
        """Require f to be what it was in the forward pass.

        Args:
            deviation: relative difference between a recomputed state or slope and the recorded one, a scalar tensor.

        Raises:
            RuntimeError: if that is more than rounding.
        """
        worst = float(deviation)
        if worst > max(self.rounding ** (2 / 3), 64 * self.rounding):  # the latter in half precision
            raise RuntimeError(
                "symplectic_adjoint: the vector field returned other values in the backward pass than in the forward "
                f"pass (a step ended {worst:.0e} off, relative to the state), so the gradient would be wrong. What it "
                "depends on must not change in between: counters, caches, random numbers that are not torch's, or that "
                "it did not draw when it was first evaluated."
            )

    def settle(self) -> None:
        """End the forward pass: what f holds that has changed so far is changed by f itself, and not to be put back."""
        self._held.settle()

    def _take(self, tensors: Iterable[Tensor], known: set[Any], key: Callable[[Tensor], Any]) -> None:
        """Add tensors that are not known yet to the dependencies."""
        for tensor in tensors:
            if key(tensor) not in known:
                known.add(key(tensor))
                (self.left_out if self._only else self.dependencies).append(tensor)

    def __call__(self, t: Tensor, x: Tensor, keywords: Keywords) -> Tensor:
        """Evaluate f(t, x) without a graph."""
        with torch.no_grad():
            return self.evaluate(t.detach(), x.detach(), keywords, NO_STAND_INS).detach()

    def differentiable(
        self,
        t: Tensor,
        x: Tensor,
        keywords: Keywords,
        stand_ins: StandIns | None = None,
        *,
        want_time: bool,
        with_history: bool = False,
    ) -> Evaluation:
        """Evaluate f(t, x) with a graph of its own, which ends in the state, the time and the dependencies.

        Args:
            t: time, a scalar that nobody changes in place as long as the graph lives.
            x: state.
            keywords: passed on to f.
            stand_ins: leaves that take the place of dependencies, by default those found by `discover`.
            want_time: whether the product with df/dt will be needed.
            with_history: whether the graph goes on behind the state, if the state has a history.
        """
        with torch.enable_grad():
            leaf = x if with_history and x.requires_grad else x.detach().requires_grad_()
            # A view, whose node is older than all nodes that f makes.
            argument = leaf.view_as(leaf)
            if with_history and leaf is not x:
                # Nor is there to be a gradient: with create_graph=True it would lead back to the leaf, for ever.
                argument.grad_fn.register_hook(_no_gradient)  # type: ignore[union-attr]
            if with_history:
                leaf = argument
            if want_time:
                t = t.detach().clone().requires_grad_()
            first = sequence_number()
            slope = self.evaluate(t, argument, keywords, self.stand_ins if stand_ins is None else stand_ins)
            nodes = sequence_number() - first
        return Evaluation(leaf, t, argument, keywords, slope, nodes)

    def evaluate(self, t: Tensor, x: Tensor, keywords: Keywords, stand_ins: StandIns) -> Tensor:
        """Evaluate f(t, x); where grad is enabled, with a graph back to t, x and the dependencies or stand-ins."""
        if self.draws or self.autocast.is_on or stand_ins.leaves or any_autocast_enabled():
            with self.autocast.again(), stand_ins.substitution(), self._drawing():
                slope = self.function(t, x, **keywords)
        else:
            slope = self.function(t, x, **keywords)
        # f may return another kind of value than at first.
        if type(slope) is Tensor and slope.dtype is x.dtype and slope.shape == x.shape and not x._backward_hooks:
            return slope
        return self._checked(slope, x)

    def _checked(self, slope: Any, x: Tensor) -> Tensor:
        """Require a value of f at a state x to be a slope, and convert integers."""
        slope = require_slope(slope, x)
        if x._backward_hooks:
            raise RuntimeError(
                "symplectic_adjoint: the vector field registers a hook on the state that it is given. What that would "
                "see depends on how a step is gone back through: put it on what is computed from the state"
            )
        if not (slope.is_floating_point() or slope.is_complex()):
            slope = slope.to(x.dtype)  # an integer one
        self.rounding = max(self.rounding, _precision(slope.dtype))  # under autocast less than the state's
        return slope

    def vjp(
        self,
        evaluation: Evaluation,
        cotangent: Tensor,
        sums: CotangentSums,
        *,
        want_time: bool,
        keep_graph: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the products of a slope's cotangent with the Jacobians of f.

        Args:
            evaluation: an evaluation of f with its graph.
            cotangent: cotangent of the slope, in the shape of the state.
            sums: takes the products with the Jacobians in the dependencies.
            want_time: whether the product with df/dt is needed.
            keep_graph: whether the graph stays for another product.

        Returns:
            (df/dx)^T cotangent, in the shape of the state, and <df/dt, cotangent>; None for zero.

        Raises:
            RuntimeError: if f depends on a tensor here that was not found on the way forward.
        """
        slope = evaluation.slope
        if not slope.requires_grad:
            return None, None
        want_time = want_time and evaluation.time.requires_grad
        leaves = [evaluation.leaf, evaluation.time] if want_time else [evaluation.leaf]
        if strangers := self._strangers(slope, evaluation.argument.grad_fn, leaves, sums):
            # f may make leaves of its own, and nodes in other threads: those are new ones in each evaluation.
            with self.generators.kept():
                again = self.differentiable(
                    evaluation.time, evaluation.leaf, evaluation.keywords, sums.stand_ins, want_time=want_time
                )
            own = (again.leaf, again.time)
            if strangers & self._strangers(again.slope, again.argument.grad_fn, own, sums):
                raise RuntimeError(_lost("that it neither held nor used at the first point when the solve began"))
        inputs = (*leaves, *sums.inputs)
        grads = run_backward((slope,), (in_type_of(slope, cotangent),), inputs, keep_graph=keep_graph)
        grads = tuple(None if grad is None or grad._is_zerotensor() else grad for grad in grads)
        sums.add(grads[len(leaves) :])
        tau = grads[1] if want_time else None
        # torchdiffeq's adaptive methods make complex times for complex states.
        return grads[0], tau.real if tau is not None and tau.is_complex() else tau

    def _strangers(self, slope: Tensor, start: Any, leaves: Sequence[Tensor], sums: CotangentSums) -> set[Any]:
        """Find leaves that are neither dependencies nor f's arguments, and older nodes, in the graph of an evaluation.

        Args:
            slope: the value of f.
            start: the node of f's argument.
            leaves: f's arguments.
            sums: holds the stand-ins for dependencies.

        Raises:
            RuntimeError: if the graph has a tensor that was to be replaced by its stand-in.
        """
        replaced = sums.stand_ins.replaced
        if self._accumulators is None:
            used = [tensor for tensor in self.used if tensor.is_leaf and tensor.requires_grad]
            self._accumulators = {accumulator(tensor) for tensor in used}
        found = graph_inputs(slope, start, self._edges, () if sums.stand_ins.leaves else self._accumulators)
        if replaced and (not replaced.isdisjoint(found.edges) or not replaced.isdisjoint(map(id, found.leaves))):
            raise RuntimeError(
                "symplectic_adjoint: the vector field uses a tensor with hooks, or one computed from others that it "
                "uses too, where torch functions do not see it (in an autograd.Function, TorchScript or a solve "
                "inside), so its gradient can't be told apart. Remove the hooks, or use it through torch operations."
            )
        if found.leaves:
            own = {id(tensor) for tensor in (*leaves, *sums.inputs)}
            found.leaves = [leaf for leaf in found.leaves if id(leaf) not in own and id(leaf) not in self._leaves]
        return {*referenced(found.leaves), *found.older}

    def as_recorded(self) -> VectorField:
        """Return the vector field for a backward pass: with f as it was, and draws made again.

        Raises:
            RuntimeError: if f holds something else now, and can't be copied to have it as it was.
        """
        roots = (self.function, *self.parts)
        then = self._held.as_recorded(roots, isolated=self.compiled is None)
        if then is roots and not self.draws:
            return self
        again = copy.copy(self)
        again.function, again.parts = then[0], then[1:]
        again._draws_again = self.draws
        return again

    def is_as_recorded(self) -> bool:
        """Return whether f holds what it held in the forward pass."""
        return self._held.is_as_recorded((self.function, *self.parts))

    def _drawing(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of an evaluation in which f may draw random numbers."""
        if not self.draws:
            return _NOTHING
        return self.generators.drawing_again() if self._draws_again else self.generators.drawing_noted()


def _no_gradient(*_: Any) -> tuple[None]:
    """Return no gradient: a hook for a node that nothing lies behind."""
    return (None,)


@functools.cache
def _precision(dtype: torch.dtype) -> float:
    """Return the relative rounding error of a dtype, 0 for integers."""
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _lost(what: str) -> str:
    return (
        f"symplectic_adjoint: the vector field depends on a tensor {what}, so its gradient would be lost. "
        'Name it: options={"adjoint_params": (tensor, ...)}.'
    )
