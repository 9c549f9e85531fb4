"""What a callable holds, and putting it back."""

from __future__ import annotations

import functools

import torch
from torch import nn

from symplectic_plugin.field.graphs import depends_on_another, is_alive
from symplectic_plugin.field.held import Held

GLOBAL = torch.ones(2, requires_grad=True)


def held(root: object) -> set[int]:
    return {id(tensor) for tensor in Held(root).tensors}


def test_tensors_are_found_wherever_a_callable_can_hold_them() -> None:
    closed, default, deep, bound, slot = (torch.ones(2, requires_grad=True) for _ in range(5))

    class Slotted:
        __slots__ = ("tensor",)

    slotted = Slotted()
    slotted.tensor = slot

    class Callable:
        def __init__(self) -> None:
            self.parts = {"list": [(deep,)], "slotted": slotted}

        def __call__(self, t, x, w=default):
            return GLOBAL * x * w

        def method(self, w, t, x):
            return x * w

    instance = Callable()
    assert held(lambda t, x: x * closed) == {id(closed)}
    assert held(lambda t, x, w=default: x * w) == {id(default)}
    assert held(instance) == {id(tensor) for tensor in (GLOBAL, default, deep, slot)}
    assert held(functools.partial(instance.method, bound)) == held(instance) | {id(bound)}
    assert held(lambda t, x: [GLOBAL * y for y in x]) == {id(GLOBAL)}


def test_what_holds_itself_and_what_holds_a_lot_come_to_an_end() -> None:
    module = nn.Linear(2, 2)
    module.self = [module]
    module.data = list(range(10**6))
    assert len(Held(module).tensors) <= 2


def test_an_object_that_does_not_let_itself_be_looked_into_is_passed_over() -> None:
    class Shy:
        __slots__ = ("w",)

        def __getattribute__(self, name):
            raise RuntimeError(name)

    w, shy = torch.ones(2, requires_grad=True), Shy()
    assert held(lambda t, x: (x * w, shy)) == {id(w)}


def test_what_was_given_up_is_put_back_for_as_long() -> None:
    module = nn.Linear(2, 2)
    first, second = torch.zeros(2), torch.ones(2)
    module.context, module.contexts = first, [first]
    field = Held(lambda t, x: module(x) + module.context)
    field.settle()
    module.context, module.contexts[0] = second, second
    module.eval()
    with field.restored():
        assert module.context is first
        assert module.contexts[0] is first
        assert module.training
    assert module.context is second
    assert module.contexts[0] is second
    assert not module.training


def test_histories_that_were_freed_are_told_from_those_that_were_not() -> None:
    w = torch.ones(2, requires_grad=True)
    z = (w.tanh() * w).sum()
    assert is_alive(z)
    assert is_alive(w * 2)
    z.backward()
    assert not is_alive(z * 2 + 1)


def test_a_tensor_computed_from_another_is_told_from_one_that_is_not() -> None:
    w, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    z = torch.tanh(w)
    assert depends_on_another(z, [w, z])
    assert depends_on_another(z * 2, [z])
    assert not depends_on_another(z, [v, z])
