"""What a callable holds, and having it as it was."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

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


class Frozen(nn.Module):
    """A module that nobody may touch once it is frozen: not even for a moment."""

    def __init__(self, **attributes) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.__dict__["frozen"] = False

    def __setattr__(self, name, value) -> None:
        assert not self.__dict__.get("frozen"), name
        super().__setattr__(name, value)

    def forward(self, x):
        return self.of(x)


def change_after_settling(root, change):
    """What a callable was before a change of what it holds."""
    held = Held(root)
    held.settle()
    assert held.as_recorded(root) is root
    change()
    return held.as_recorded(root)


ONE, TWO = torch.zeros(2), torch.ones(2)
SETTING = ONE
SETTINGS = {"x": ONE}


def reads_a_global(x):
    return x + SETTING


class ReadsAGlobal:
    def __call__(self, x):
        return x + SETTING


class Point(NamedTuple):
    x: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor


class TestWhatWasThere:
    def test_an_attribute_and_the_mode(self) -> None:
        module = Frozen(context=ONE, dropout=nn.Dropout(0.5))
        root = lambda x: module.dropout(x) + module.context  # noqa: E731

        def change() -> None:
            module.context = TWO
            module.eval()
            module.__dict__["frozen"] = True

        before = change_after_settling(root, change)
        copied = before.__closure__[0].cell_contents
        assert type(copied) is Frozen
        assert copied is not module
        assert copied.context is ONE
        assert copied.training
        assert copied.dropout.training
        assert module.context is TWO
        assert not module.dropout.training

    def test_what_has_not_changed_is_shared(self) -> None:
        module = nn.ModuleDict({"changed": nn.Linear(2, 2), "same": nn.Linear(2, 2)})
        copied = change_after_settling(module, module["changed"].eval)
        assert copied["same"] is module["same"]
        assert copied["changed"] is not module["changed"]
        assert copied["changed"].weight is module["changed"].weight

    @pytest.mark.parametrize("of", [reads_a_global, ReadsAGlobal(), lambda x: reads_a_global(x)])
    def test_a_global(self, of) -> None:
        global SETTING
        try:
            before = change_after_settling(of, lambda: globals().update(SETTING=TWO))
            assert torch.equal(before(ONE), ONE)
            assert torch.equal(of(ONE), TWO)
            assert type(before).__name__ == type(of).__name__
        finally:
            SETTING = ONE

    def test_a_cell_a_default_and_an_attribute_of_a_function(self) -> None:
        value = ONE

        def function(x, *, scale=1.0):
            return x * scale + value + function.offset

        function.offset = ONE

        def change() -> None:
            nonlocal value
            value = TWO
            function.offset = TWO

        before = change_after_settling(function, change)
        assert torch.equal(before(TWO), TWO)
        assert torch.equal(function(TWO), 3 * TWO)
        assert before.__qualname__ == function.__qualname__
        assert before.__kwdefaults__ == {"scale": 1.0}

    @pytest.mark.parametrize("make", [
        lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"x": [x]}, lambda x: [[x], x], Point, Slots,
        lambda x: types.SimpleNamespace(x=x), lambda x: Frozen(x=x), lambda x: x.numpy().copy(),
        lambda x: functools.partial(torch.add, x), lambda x: lambda: x, lambda x: {i: x + i for i in range(200)},
        lambda x: collections.OrderedDict(x=x),
    ])  # fmt: skip
    def test_a_context_of_whatever_kind_that_nobody_else_holds(self, make) -> None:
        def shown(context):
            if isinstance(context, types.FunctionType | functools.partial):
                return context() if isinstance(context, types.FunctionType) else context(ONE)
            return vars(context)["x"] if hasattr(context, "__dict__") and "x" in vars(context) else repr(context)

        module = Frozen(context=make(ONE.clone()))
        expected = shown(module.context)
        copied = change_after_settling(module, lambda: setattr(module, "context", make(TWO.clone())))
        assert type(copied.context) is type(module.context)
        assert str(shown(copied.context)) == str(expected)
        assert str(shown(module.context)) != str(expected)

    def test_the_order_of_parts(self) -> None:
        make = lambda x: ({"a": [x], "b": 1, "c": x * 1}, x)  # noqa: E731
        module = Frozen(context=make(ONE))
        copied = change_after_settling(module, lambda: setattr(module, "context", {}))
        assert str(copied.context) == str(make(ONE))

    def test_items_in_place(self) -> None:
        items, names = [ONE, ONE], {"a": ONE}
        root = lambda x: x + items[0] + names["a"]  # noqa: E731

        def change() -> None:
            items[0] = names["a"] = TWO
            items.append(TWO)
            names["b"] = TWO

        before = change_after_settling(root, change)
        assert torch.equal(before(ONE), ONE)
        assert torch.equal(root(ONE), 2 * TWO)
        assert len(items) == 3

    def test_a_bound_method(self) -> None:
        module = Frozen(context=ONE, of=lambda x: x)
        module.step = module.forward  # which holds the module
        before = change_after_settling(module.forward, lambda: setattr(module, "context", TWO))
        assert before.__self__ is not module
        assert before.__self__.context is ONE
        assert before.__self__.step.__self__ is before.__self__

    def test_objects_that_hold_themselves_are_copied_once(self) -> None:
        module = Frozen(context=ONE)
        ring = ([], {"module": module})
        ring[0].extend([ring, module])
        copied = change_after_settling(ring, lambda: setattr(module, "context", TWO))
        assert copied[0][0] is copied
        assert copied[0][1] is copied[1]["module"]
        assert copied[1]["module"].context is ONE

    def test_what_f_changes_by_itself_is_left_alone(self) -> None:
        module = Frozen(count=0)
        held = Held(module)
        module.count += 1
        held.settle()
        module.count += 1
        assert held.as_recorded(module) is module

    def test_a_context_with_a_graph_is_not_kept_alive(self) -> None:
        w = torch.ones(2, requires_grad=True)
        module = Frozen(last=w * 2, lasts=[w * 3], more=types.SimpleNamespace(x=w * 4))
        alive = [weakref.ref(x) for x in (module.last, module.lasts[0], module.more.x)]
        held = Held(module)
        held.settle()
        module.last = module.lasts = module.more = None
        assert [x() for x in alive] == [None] * 3
        assert held.as_recorded(module) is module


class TestBatchNorms:
    def test_count_in_a_copy_with_the_same_parameters(self) -> None:
        norm = nn.BatchNorm1d(2)
        held, buffers = Held(norm), dict(norm._buffers)
        held.settle()
        copied = held.as_recorded(norm)
        copied(torch.randn(3, 2))
        assert copied.weight is norm.weight
        assert int(copied.num_batches_tracked) == 1
        assert int(norm.num_batches_tracked) == 0
        assert all(norm._buffers[name] is buffer for name, buffer in buffers.items())

    @pytest.mark.parametrize("norm", [nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2, track_running_stats=False)])
    def test_that_count_nothing_are_not_copied(self, norm) -> None:
        held = Held(norm)
        held.settle()
        assert held.as_recorded(norm) is norm


def test_a_copy_does_not_finalize_what_the_object_owns() -> None:
    closed = []

    class Resource:
        context = None

        def __del__(self) -> None:
            closed.append(self)

    resource = Resource()
    resource.context = ONE
    copied = change_after_settling([resource], lambda: setattr(resource, "context", TWO))
    assert copied[0].context is ONE
    assert isinstance(copied[0], Resource)
    del copied
    gc.collect()
    assert not closed


def test_objects_of_python_itself_are_not_copied() -> None:
    with ThreadPoolExecutor(2) as pool:
        root = lambda x: pool.submit(len, x).result()  # noqa: E731
        assert change_after_settling(root, lambda: root([])) is root


class TestOtherThreads:
    """Another thread has solved before, and may change what this one holds during its backward pass."""

    @pytest.fixture(autouse=True)
    def another(self):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(Held, None).result()
            yield pool

    def test_what_may_be_changed_is_copied_beforehand(self, another) -> None:
        module, items = Frozen(context=ONE, of=[nn.Linear(2, 2)]), [{"x": ONE}]
        root = lambda: (module.context, items[0]["x"], module.of[0].training, SETTINGS["x"])  # noqa: E731
        held = Held(root)
        held.settle()
        copied = held.as_recorded(root, isolated=True)

        def change() -> None:
            module.context = items[0]["x"] = TWO
            module.of[0].eval()
            SETTINGS["x"] = TWO

        another.submit(change).result()
        assert copied() == (ONE, ONE, True, ONE)
        assert root()[0] is TWO

    def test_what_cant_be_copied_is_shared(self, another) -> None:
        class Counted(dict):
            def __copy__(self):
                raise TypeError

        root = [Counted(context=ONE)]
        held = Held(root)
        held.settle()
        copied = held.as_recorded(root, isolated=True)
        assert copied is not root
        assert copied[0] is root[0]


def test_an_object_that_cant_be_copied_is_named() -> None:
    class Counted(dict):
        def __copy__(self):
            raise TypeError("there is only one")

    counted = Counted(context=ONE)
    with pytest.raises(RuntimeError, match=r"symplectic_adjoint: .*Counted.* can't be copied .*there is only one"):
        change_after_settling(lambda x: x + counted["context"], lambda: counted.update(context=TWO))


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
