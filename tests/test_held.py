"""What a callable holds, and a copy of the callable that holds what there was."""

from __future__ import annotations

import functools

import pytest
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


class Untouchable(nn.Module):
    """A module that notices every assignment once it is sealed."""

    sealed = False

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.context = torch.zeros(2)
        self.contexts = [torch.zeros(2)]
        self.settings = {"scale": 1.0}

    def __setattr__(self, name, value) -> None:
        assert not type(self).sealed, name
        super().__setattr__(name, value)

    def forward(self, t, x):
        return self.settings["scale"] * self.linear(x) + self.context + self.contexts[0]


def recorded(root) -> Held:
    held = Held(root)
    held.settle()
    return held


def test_what_has_not_changed_is_not_copied() -> None:
    module = Untouchable().eval()
    f = lambda t, x: module(t, x)  # noqa: E731
    assert recorded(f).as_recorded(f) is f


def change(module: Untouchable) -> object:
    """Change what a module holds, and return a submodule that it held."""
    linear = module.linear
    module.context = torch.ones(2)
    module.contexts[0] = torch.ones(2)
    module.settings["scale"] = 2.0
    module.linear = nn.Linear(2, 2)
    return linear


@pytest.mark.parametrize("wrapped", ["module", "method", "closure", "partial", "default", "list"])
def test_a_copy_holds_what_was_there_and_the_users_objects_are_left_alone(wrapped) -> None:
    module, x = Untouchable(), torch.randn(3, 2)
    f = {
        "module": module,
        "method": module.forward,
        "closure": lambda t, x: module(t, x),
        "partial": functools.partial(module, torch.zeros(())),
        "default": lambda t, x, module=module: module(t, x),
        "list": lambda t, x, modules=([module],): modules[0][0](t, x),
    }[wrapped]
    arguments = (x,) if wrapped == "partial" else (torch.zeros(()), x)
    before, held = f(*arguments), recorded(f)
    linear = change(module)  # held weakly
    after, state = f(*arguments), dict(vars(module))
    Untouchable.sealed = True
    try:
        assert torch.equal(held.as_recorded(f)(*arguments), before)
    finally:
        Untouchable.sealed = False
    assert torch.equal(f(*arguments), after)
    assert linear is not module.linear
    assert all(vars(module)[name] is value for name, value in state.items())


def test_a_copy_shares_parameters_and_what_has_not_changed() -> None:
    module = Untouchable()
    held = recorded(module)
    module.context = torch.ones(2)
    copied = held.as_recorded(module)
    assert copied.linear is module.linear
    assert copied.contexts is module.contexts
    assert type(copied) is Untouchable


def test_cells_globals_and_modes_are_as_they_were() -> None:
    scale, module = 1.0, nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    def f(x):
        return scale * GLOBAL * x, module.training

    held = recorded(f)
    globals_before = dict(f.__globals__)
    scale, x = 3.0, torch.ones(2)
    module.eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(f.__globals__, "GLOBAL", 5 * torch.ones(2))
        value, training = held.as_recorded(f)(x)
        assert torch.equal(value, torch.ones(2))
        assert training
        assert torch.equal(f(x)[0], 15 * torch.ones(2))
    assert f.__globals__ == globals_before


class ReadsAGlobal:
    def __call__(self, x):
        return x * GLOBAL


def test_code_of_a_class_reads_the_globals_that_there_were() -> None:
    f = ReadsAGlobal()
    held = recorded(f)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "GLOBAL", torch.zeros(2))
        assert torch.equal(held.as_recorded(f)(torch.ones(2)), torch.ones(2))
        assert isinstance(held.as_recorded(f), ReadsAGlobal)


def test_evaluations_of_a_copy_count_in_no_statistics() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    held, buffers = recorded(module), {name: (x, x.clone()) for name, x in module.named_buffers()}
    copied = held.as_recorded(module)
    copied(torch.randn(5, 2))
    assert copied[0] is module[0]
    for name, x in module.named_buffers():
        assert x is buffers[name][0]
        assert torch.equal(x, buffers[name][1])


def test_objects_in_a_circle_are_copied_once() -> None:
    module = Untouchable()
    object.__setattr__(module, "me", [module, (module,)])
    held = recorded(module)
    module.context = torch.ones(2)
    copied = held.as_recorded(module)
    assert copied.me[0] is copied
    assert copied.me[1][0] is copied


def test_what_can_not_be_copied_is_an_error_that_names_it() -> None:
    class Holder(tuple):
        def __new__(cls, part, other=None):
            if other is None:
                raise TypeError("needs two")
            return super().__new__(cls, (part, other))

    module = Untouchable()
    f = functools.partial(lambda pair, x: pair[0](0, x), Holder(module, 1))
    held = recorded(f)
    module.context = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"Holder that can't be copied.*needs two.*Call backward"):
        held.as_recorded(f)


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
