"""torchdiffeq's interface with the flag set: options, callbacks, events, tuples, captured tensors, and errors."""

from __future__ import annotations

import collections
import gc
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
import torchdiffeq
from torch import nn
from torchdiffeq._impl.misc import _rms_norm

from .exactness import Outcome, assert_exact, assert_same
from .fields import MLP, Y0, T, mlp, random
from .hosts import ADAPTIVE, EXPLICIT, MULTISTEP, REGISTRY, given_steps


def gradients(field, inputs, method, odeint=torchdiffeq.odeint, y0=Y0, t=T, loss=lambda y: (y**2).sum(), **keywords):
    """Gradients of a loss of the solution in the inputs."""
    keywords = {"options": {"first_step": 0.1}, **keywords}
    return torch.autograd.grad(loss(odeint(field, y0, t, method=method, **keywords)), inputs)


EVALUATED_AGAIN = {"checkpoint": "steps"}
"""For tests of what happens when f is evaluated in the backward pass."""


class TestCapturedTensors:
    """Gradients go to all that f depends on, without being told."""

    def assert_exact(self, field, *inputs) -> None:
        assert_same(gradients(field, inputs, "symplectic_adjoint"), gradients(field, inputs, "dopri5"))

    @pytest.mark.usefixtures("kept")
    def test_used_both_by_itself_and_through_another(self) -> None:
        w = random(2, 2).requires_grad_()
        made = torch.tanh(w) * 2  # what a hypernetwork makes of its own weights
        field = lambda t, y: torch.tanh(y @ w) + y @ made  # noqa: E731
        ours = torch.autograd.grad(
            torchdiffeq.odeint(field, Y0, T, method="symplectic_adjoint", options={"first_step": 0.1}).sum(),
            w,
            retain_graph=True,
        )
        theirs = torch.autograd.grad(
            torchdiffeq.odeint(field, Y0, T, method="dopri5", options={"first_step": 0.1}).sum(), w
        )
        assert_same(ours, theirs)

    @pytest.mark.usefixtures("kept")
    def test_used_only_later_on(self) -> None:
        early, late = random(2, 2).requires_grad_(), (2 * random(2, 2)).requires_grad_()
        self.assert_exact(lambda t, y: torch.tanh(y @ (early if t < 0.5 else late)), early, late)

    @pytest.mark.usefixtures("kept")
    def test_on_a_module_through_odeint_adjoint(self) -> None:
        module = mlp()
        module.context = random(2).requires_grad_()
        field = _WithContext(module)
        inputs = (module.w1, module.context)
        ours = gradients(field, inputs, "symplectic_adjoint", odeint=torchdiffeq.odeint_adjoint)
        assert_same(ours, gradients(field, inputs, "dopri5"))

    @pytest.mark.usefixtures("kept")
    def test_that_f_makes_leaves_of_its_own_is_not_mistaken_for_one(self) -> None:
        w = random(2).requires_grad_()

        def field(t, y):
            with torch.enable_grad():
                q = y.detach().requires_grad_()
                (force,) = torch.autograd.grad((w.detach() * q**4).sum(), q, create_graph=True)
            return w * y - force

        self.assert_exact(field, w)

    def test_hidden_until_late_raises_rather_than_losing_its_gradient(self, kept) -> None:
        shown, hidden = random(2, 2).requires_grad_(), random(2, 2).requires_grad_()
        store = iter([hidden])  # neither in a closure's cell as a tensor, nor in a container that can be looked into
        cache = []

        class Opaque:
            __slots__ = ()

            def get(self):
                return cache[0] if cache else cache.append(next(store)) or cache[0]

        opaque = Opaque()
        field = lambda t, y: torch.tanh(y @ (shown if t < 0.5 else OPAQUE_GETTERS["get"]()))  # noqa: E731
        OPAQUE_GETTERS["get"] = _Native(opaque.get)
        if kept != "live graph":
            y = torchdiffeq.odeint(field, Y0, T, method="symplectic_adjoint", options={"first_step": 0.1})
            with pytest.raises(RuntimeError, match="adjoint_params"):
                y.sum().backward()
        named = {"first_step": 0.1} | ({} if kept == "live graph" else {"adjoint_params": (hidden,)})
        ours = gradients(field, (shown, hidden), "symplectic_adjoint", options=named)
        assert_same(ours, gradients(field, (shown, hidden), "dopri5"))


class _Native:
    """A callable whose contents can't be seen."""

    __slots__ = ("__weakref__",)
    functions: ClassVar = weakref.WeakKeyDictionary()

    def __init__(self, function) -> None:
        _Native.functions[self] = function

    def __call__(self):
        return type(self).functions[self]()


OPAQUE_GETTERS: dict[str, object] = {}


class _WithContext(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, t, y):
        return self.module(t, y) + torch.tanh(self.module.context * y)


class TestStates:
    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("method", ["dopri5", "rk4", "adaptive_heun"])
    def test_tuples_of_any_shapes(self, method) -> None:
        w = random(2, 2).requires_grad_()
        states = (random(3, 2).requires_grad_(), random().requires_grad_(), random(0, 2).requires_grad_())

        def field(t, y):
            return torch.tanh(y[0] @ w) * y[1], y[0].sum() * torch.cos(t), y[2]

        def loss(y):
            return (y[0] ** 2).sum() + (y[1] ** 3).sum() + y[2].sum()

        options = given_steps(method)
        solve = {"y0": states, "loss": loss, "options": options, "rtol": 1e-3, "atol": 1e-4}
        ours = gradients(field, (w, *states), f"symplectic_adjoint:{method}", **solve)
        assert_same(ours, gradients(field, (w, *states), method, **solve))

    def test_nothing_that_needs_a_gradient(self) -> None:
        assert not torchdiffeq.odeint(lambda t, y: -y, Y0, T, method="symplectic_adjoint").requires_grad
        with torch.no_grad():
            assert not torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint").requires_grad


class TestOptions:
    def test_tolerances_per_component_and_norms(self) -> None:
        states = (random(2).requires_grad_(), random(3).requires_grad_())

        def field(t, y):
            return torch.sin(y[0]) + y[1].sum(), torch.cos(y[1]) * t

        solve = {
            "y0": states,
            "loss": lambda y: y[0].sum() + (y[1] ** 2).sum(),
            "rtol": (1e-3, 1e-6),
            "atol": (1e-4, 1e-7),
            "options": {"first_step": 0.1, "norm": lambda y: max(_rms_norm(y[0]), 10 * _rms_norm(y[1]))},
        }
        assert_same(
            gradients(field, states, "symplectic_adjoint", **solve), gradients(field, states, "dopri5", **solve)
        )

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("odeint", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint])
    @pytest.mark.parametrize("method", ["dopri5", "rk4"])
    def test_callbacks_are_called_as_without_the_flag(self, odeint, method) -> None:
        class Counting(MLP):
            def callback_step(self, t0, y0, dt):
                self.calls.append(("step", float(t0), float(dt)))

            def callback_accept_step(self, t0, y0, dt):
                self.calls.append(("accept", float(t0), float(dt)))

            def callback_reject_step(self, t0, y0, dt):
                self.calls.append(("reject", float(t0), float(dt)))

        field = Counting(2, 8, torch.Generator().manual_seed(0))
        calls = []
        for name in (method, f"symplectic_adjoint:{method}"):
            field.calls = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a fixed grid has no accept and reject
                odeint(field, Y0, T, method=name, rtol=1e-9, atol=1e-9).sum().backward()
            calls.append(field.calls)
        assert calls[0] == calls[1] != []

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("through", ["state", "data"])
    def test_a_callback_that_changes_the_state(self, through) -> None:
        class Scaling(MLP):
            def callback_step(self, t0, y0, dt):
                self.steps += 1
                if self.steps in (3, 7):
                    with torch.no_grad():
                        (y0 if through == "state" else y0.data).mul_(0.7)

        def work(name):
            field, y0 = Scaling(2, 8, torch.Generator().manual_seed(0)), Y0.clone().requires_grad_()
            field.steps = 0
            y = torchdiffeq.odeint(field, y0, T, method=name, options={"step_size": 0.05})
            return y, *torch.autograd.grad(y.square().sum(), [y0, field.w1])

        assert_same(work("symplectic_adjoint:rk4"), work("rk4"))

    @pytest.mark.parametrize("callback", ["callback_step", "callback_accept_step"])
    def test_a_callback_that_changes_the_state_of_an_adaptive_method_raises(self, callback) -> None:
        field = MLP(2, 8, torch.Generator().manual_seed(0))
        setattr(field, callback, lambda t0, y0, dt: y0.data.mul_(0.9))
        with pytest.raises(RuntimeError, match="symplectic_adjoint: a callback changed the state in place"):
            torchdiffeq.odeint(field, Y0, T, method="symplectic_adjoint:dopri5")

    def test_step_sizes_of_the_first_step_are_the_hosts_own(self) -> None:
        evaluations = []
        for method in ("dopri5", "symplectic_adjoint"):
            field, times = mlp(), []
            field.register_forward_pre_hook(lambda _, inputs, times=times: times.append(float(inputs[0])))
            torchdiffeq.odeint(field, Y0, T, method=method)
            evaluations.append(times)
        assert evaluations[0] == evaluations[1]

    @pytest.mark.usefixtures("kept")
    def test_a_grid_that_goes_back(self) -> None:
        field, grid = mlp(), torch.tensor([0, 0.5, 0.3, 1.0], dtype=torch.float64)
        solve = {"options": {"grid_constructor": lambda *_: grid}, "loss": lambda y: (y * random(4, 3, 2)).sum()}
        inputs = (field.w1, field.w2)
        assert_same(
            gradients(field, inputs, "symplectic_adjoint:rk4", **solve), gradients(field, inputs, "rk4", **solve)
        )

    @pytest.mark.usefixtures("kept")
    def test_a_learned_grid(self) -> None:
        gaps = random(5).requires_grad_()

        def grid_constructor(func, y0, t):
            inner = torch.softmax(gaps, 0).cumsum(0)[:-1]
            return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * inner, t[-1:]])

        field, options = mlp(), {"grid_constructor": grid_constructor}
        inputs = (gaps, field.w1)
        solve = {"t": T[[0, -1]], "options": options}
        ours = gradients(field, inputs, "symplectic_adjoint:rk4", **solve)
        theirs = gradients(field, inputs, "rk4", **solve)
        # Hardly anything depends on the grid of so accurate a method, so its gradient is what remains of larger terms.
        assert_same(ours[:1], theirs[:1], 1e-10)
        assert_same(ours[1:], theirs[1:])


class TestEvents:
    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("method", EXPLICIT)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_gradients_of_time_and_state(self, method, reverse) -> None:
        w, y0 = (0.2 * random(2, 2)).requires_grad_(), torch.tensor([1.0, 0.0], dtype=torch.float64).requires_grad_()
        t0 = torch.tensor(0.3, dtype=torch.float64).requires_grad_()
        options = {"first_step": 0.1} if method in ADAPTIVE else {"step_size": 0.05, "interp": "cubic"}
        rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

        def solve(method, odeint=torchdiffeq.odeint):
            event_t, y = torchdiffeq.odeint_event(
                lambda t, y: (rotation + w) @ y * (1 + 0.1 * t),
                y0,
                t0,
                event_fn=lambda t, y: y[0] - 0.2,
                reverse_time=reverse,
                odeint_interface=odeint,
                method=method,
                options=options,
                rtol=1e-4,
                atol=1e-6,
                **({"adjoint_params": (w,)} if odeint is torchdiffeq.odeint_adjoint else {}),
            )
            return torch.stack([event_t, *y[-1]])

        expected, actual = solve(method), solve(f"symplectic_adjoint:{method}")
        assert torch.allclose(actual, expected, rtol=1e-14, atol=1e-14)
        adjoint = solve(f"symplectic_adjoint:{method}", torchdiffeq.odeint_adjoint)
        assert torch.equal(adjoint, actual)
        # The loss weighs the time most: the event fixes one component of the state, whose gradients are all but zero.
        loss = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
        theirs = torch.autograd.grad(expected @ loss, (w, y0, t0))
        assert_same(torch.autograd.grad(actual @ loss, (w, y0, t0)), theirs, 1e-11)
        assert_same(torch.autograd.grad(adjoint @ loss, (w, y0, t0)), theirs, 1e-11)

    def test_an_event_met_at_once(self) -> None:
        y0 = Y0[0].clone().requires_grad_()
        _, y = torchdiffeq.odeint(
            lambda t, y: -y, y0, T[:2], method="symplectic_adjoint", event_fn=lambda t, y: 0 * y.sum()
        )
        y.sum().backward()
        assert torch.equal(y0.grad, 2 * torch.ones_like(y0))


class TestAdjointInterface:
    @pytest.mark.usefixtures("kept")
    def test_adjoint_params_restrict_the_gradient_and_say_so(self) -> None:
        field = mlp()
        with pytest.warns(UserWarning, match="adjoint_params leaves out"):
            y = torchdiffeq.odeint_adjoint(field, Y0, T, method="symplectic_adjoint", adjoint_params=(field.w1,))
        y.sum().backward()
        assert field.w1.grad is not None
        assert field.w2.grad is None

    @pytest.mark.usefixtures("kept")
    def test_adjoint_params_of_a_function(self) -> None:
        w = random(2, 2).requires_grad_()
        field = lambda t, y: torch.tanh(y @ w)  # noqa: E731
        ours = gradients(field, w, "symplectic_adjoint", odeint=torchdiffeq.odeint_adjoint, adjoint_params=(w,))
        assert_same(ours, gradients(field, w, "dopri5"))

    def test_an_adjoint_method_that_is_not_used_is_warned_of(self) -> None:
        field = mlp()
        with pytest.warns(UserWarning, match="adjoint_method='bosh3' is not used"):
            y = torchdiffeq.odeint_adjoint(
                field, Y0, T, method="symplectic_adjoint", adjoint_method="bosh3",
                options={"first_step": 0.1}, adjoint_options={},
            )  # fmt: skip
        assert_same(torch.autograd.grad((y**2).sum(), field.w1), gradients(field, field.w1, "dopri5"))

    def test_an_adjoint_method_of_another_solver_is_refused(self) -> None:
        with pytest.raises(ValueError, match='use adjoint_method="symplectic_adjoint"'):
            torchdiffeq.odeint_adjoint(mlp(), Y0, T, method="dopri5", adjoint_method="symplectic_adjoint:rk4")

    def test_other_methods_are_torchdiffeqs_own_as_before(self) -> None:
        field = mlp()
        continuous = gradients(field, field.w1, "dopri5", odeint=torchdiffeq.odeint_adjoint, rtol=1e-2, atol=1e-2)
        exact = gradients(field, field.w1, "dopri5", rtol=1e-2, atol=1e-2)
        assert 1e-10 < (continuous[0] - exact[0]).norm() / exact[0].norm() < 0.1

    def test_the_continuous_adjoint_is_refused_to_who_holds_torchdiffeqs_own_class(self) -> None:
        from torchdiffeq._impl import adjoint

        held, field = adjoint.OdeintAdjointMethod.__base__, mlp()
        shapes, func, y0, t, rtol, atol, method, options, event_fn, _ = adjoint._check_inputs(
            field, Y0, T, 1e-3, 1e-3, "symplectic_adjoint", None, None, adjoint.SOLVERS
        )
        adjoint_options = {"norm": options["norm"]}
        y = held.apply(
            shapes, func, y0, t, rtol, atol, method, options, event_fn, 1e-3, 1e-3, method, adjoint_options, False,
            field.w1,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="continuous adjoint"):
            y.sum().backward()


class TestErrors:
    @pytest.mark.parametrize("solver", MULTISTEP)
    def test_multistep_methods_are_refused_with_what_can_be_used(self, solver) -> None:
        with pytest.raises(ValueError, match=r'Use one of .*"dopri5".*"rk4"'):
            torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint", options={"solver": solver})
        with pytest.raises(ValueError, match=r'Must be one of .*"symplectic_adjoint:rk4"'):
            torchdiffeq.odeint(mlp(), Y0, T, method=f"symplectic_adjoint:{solver}")

    @pytest.mark.parametrize("solver", ["no_such_solver", "symplectic_adjoint", "symplectic_adjoint:rk4", 5, ["rk4"]])
    def test_solvers_that_do_not_exist_are_refused(self, solver) -> None:
        with pytest.raises(ValueError, match=r'Use one of .*"dopri5"'):
            torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint", options={"solver": solver})

    def test_two_different_base_solvers_are_refused(self) -> None:
        with pytest.raises(ValueError, match="give one of them"):
            torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint:rk4", options={"solver": "euler"})

    def test_an_unknown_option_is_warned_of_by_the_base_solver(self) -> None:
        with pytest.warns(UserWarning, match="Dopri5Solver: Unexpected arguments"):
            torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint", options={"no_such_option": 1})

    def test_an_option_that_would_lose_a_gradient_is_refused(self) -> None:
        first_step = torch.tensor(0.1, requires_grad=True)
        with pytest.raises(ValueError, match="'first_step' requires a gradient"):
            torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint", options={"first_step": first_step})

    def test_a_user_solver_that_is_not_runge_kutta_is_refused(self) -> None:
        from torchdiffeq._impl.solvers import FixedGridODESolver

        class Clamped(FixedGridODESolver):
            order = 1

            def _step_func(self, func, t0, dt, t1, y0):
                f0 = func(t0, y0)
                return dt * f0.clamp(-0.1, 0.1), f0

        REGISTRY["clamped"] = Clamped
        try:
            with pytest.raises(ValueError, match="not an explicit Runge-Kutta step"):
                torchdiffeq.odeint(mlp(), Y0, T, method="symplectic_adjoint", options={"solver": "clamped"})
        finally:
            del REGISTRY["clamped"]

    @pytest.mark.usefixtures("kept")
    def test_what_is_used_only_later_on_and_changed_in_place_raises(self) -> None:
        # Zero, so that changing the weight it is multiplied with changes no value: only the gradient would be wrong.
        early, late, nothing = random(2).requires_grad_(), random(2).requires_grad_(), torch.zeros(2).double()
        nothing.requires_grad_()
        y = torchdiffeq.odeint(
            lambda t, y: early * y + (late * nothing if t > 0.5 else 0), Y0, T, method="symplectic_adjoint"
        )
        with torch.no_grad():
            late.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.usefixtures("kept")
    def test_times_without_a_gradient_may_be_changed_in_place(self) -> None:
        field, t = mlp(), T.clone()
        y = torchdiffeq.odeint(field, Y0, t, method="symplectic_adjoint", options={"first_step": 0.1})
        t.mul_(2)
        assert_same(torch.autograd.grad((y**2).sum(), field.w1), gradients(field, field.w1, "dopri5"))

    def test_an_exception_in_the_backward_pass_leaves_the_next_solve_right(self) -> None:
        field = mlp()
        expected = gradients(field, field.w1, "dopri5")
        y = torchdiffeq.odeint(
            field, Y0, T, method="symplectic_adjoint", options={"first_step": 0.1, **EVALUATED_AGAIN}
        )
        handle = field.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        handle.remove()
        assert_same(gradients(field, field.w1, "symplectic_adjoint"), expected)
        assert_same(torch.autograd.grad((y**2).sum(), field.w1) if y.grad_fn else (), expected)


class TestGraphs:
    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("method", EXPLICIT)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_second_derivatives(self, method, reverse) -> None:
        field = mlp()
        encoder = random(2).requires_grad_()
        shift = torch.sin(encoder)  # and so entangled with what it is computed from
        y0, t = Y0.clone().requires_grad_(), (T.flip(0) if reverse else T).clone().requires_grad_()
        options = {"first_step": 0.1} if method in ADAPTIVE else {"step_size": 0.13, "interp": "cubic"}
        if method == "dopri5":
            options["jump_t"] = T[1:2] + 0.1
        inputs = [y0, t, encoder, field.w1, field.w2]
        found = []
        for name in (method, f"symplectic_adjoint:{method}"):
            y = torchdiffeq.odeint(
                lambda t, y: field(t, y) + shift + encoder * y,
                y0,
                t,
                method=name,
                options=options,
                rtol=1e-2,
                atol=1e-2,
            )
            first = torch.autograd.grad((y**3).sum(), inputs, create_graph=True)
            penalty = sum((g**2).sum() for g in first) + y.sum()
            found.append(torch.autograd.grad(penalty, [*inputs, field.b1], retain_graph=True))
        assert_same(found[1], found[0], 1e-11)

    @pytest.mark.usefixtures("kept")
    def test_second_derivatives_with_a_constant_cotangent(self) -> None:
        field, y0, found = mlp(), Y0.clone().requires_grad_(), []
        for method in ("dopri5", "symplectic_adjoint"):
            y = torchdiffeq.odeint(field, y0, T, method=method, options={"first_step": 0.1})
            (gradient,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
            found.append(torch.autograd.grad((gradient**2).sum(), (y0, field.w1)))
        assert_same(found[1], found[0])

    def test_third_derivatives_are_refused_or_exact(self, kept) -> None:
        field, y0, found = mlp(), Y0.clone().requires_grad_(), []
        for method in ("dopri5", "symplectic_adjoint"):
            y = torchdiffeq.odeint(field, y0, T, method=method, rtol=1e-3, atol=1e-3, options={"first_step": 0.1})
            (first,) = torch.autograd.grad((y**2).sum(), y0, create_graph=True)
            if method == "symplectic_adjoint" and kept != "live graph":
                with pytest.raises(RuntimeError, match="third derivatives"):
                    torch.autograd.grad((first**2).sum(), y0, create_graph=True)
            else:
                (second,) = torch.autograd.grad((first**2).sum(), y0, create_graph=True)
                found.append(torch.autograd.grad((second**2).sum(), (y0, field.w1)))
        assert_same(found[-1], found[0])


def test_the_gradient_does_not_depend_on_when_odeint_adjoint_was_imported() -> None:
    from torchdiffeq import odeint_adjoint

    field = mlp()
    expected = Outcome(field, Y0, T, method="dopri5", rtol=1e-2, atol=1e-2, options={"first_step": 0.1})
    actual = Outcome(
        field, Y0, T, odeint=odeint_adjoint, method="symplectic_adjoint", rtol=1e-2, atol=1e-2,
        options={"first_step": 0.1},
    )  # fmt: skip
    assert_exact(actual, expected)


class TestRandomness:
    """What f draws is drawn again in the backward pass, and the global generators go on as if it were not."""

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("method", EXPLICIT)
    @pytest.mark.parametrize("jump", [False, True])
    def test_dropout(self, method, jump) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 2)).double()
        options = {"first_step": 0.1} if method in ADAPTIVE else {"step_size": 0.1, "interp": "cubic"}
        if jump and method in ADAPTIVE:
            options["jump_t"] = T[1:2] + 0.1
        found, after = [], []
        for name in (method, f"symplectic_adjoint:{method}"):
            torch.manual_seed(1)
            y0 = Y0.clone().requires_grad_()
            # So loose that the noise of dropout is not mistaken for an error of the solver.
            y = torchdiffeq.odeint(lambda t, y: net(y), y0, T, method=name, options=options, rtol=10, atol=10)
            after.append(torch.rand(3))
            found.append([y.detach(), *torch.autograd.grad((y**2).sum(), (y0, *net.parameters()))])
            after.append(torch.rand(3))
        assert_same(found[1], found[0])
        assert torch.equal(torch.stack(after[:2]), torch.stack(after[2:]))

    def test_numbers_drawn_only_later_on_raise(self) -> None:
        w = random(2).requires_grad_()
        field = lambda t, y: w * y + (torch.rand(()) if t > 0.5 else 0)  # noqa: E731
        y = torchdiffeq.odeint(
            field, Y0, T, method="symplectic_adjoint:rk4", options={"step_size": 0.1, **EVALUATED_AGAIN}
        )
        with pytest.raises(RuntimeError, match="returned other values"):
            y.sum().backward()

    def test_several_cubic_outputs_in_a_step_raise(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)).double()
        with pytest.raises(RuntimeError, match="interp='linear'"):
            torchdiffeq.odeint(
                lambda t, y: net(y),
                Y0,
                T,
                method="symplectic_adjoint:rk4",
                options={"step_size": 1.0, "interp": "cubic"},
            )


class TestAnotherFieldInTheBackwardPass:
    """Rather than a wrong gradient, an error."""

    @pytest.mark.parametrize("steps", [1, 10])
    @pytest.mark.parametrize("policy", ["steps", "stages"])
    def test_a_changed_number(self, steps, policy) -> None:
        w, factor = random(2).requires_grad_(), collections.deque([1.0])  # what a deque holds is not looked at
        options = {"step_size": 1 / steps, "checkpoint": policy}
        y = torchdiffeq.odeint(
            lambda t, y: torch.sin(w * y) * factor[0], Y0, T, method="symplectic_adjoint:rk4", options=options
        )
        factor[0] = 1.0001
        with pytest.raises(RuntimeError, match="returned other values in the backward pass"):
            y.sum().backward()

    @pytest.mark.usefixtures("kept")
    def test_a_state_that_passes_through_zero_is_no_other_field(self) -> None:
        w = random(2).requires_grad_()
        t = torch.tensor([0.0, 0.4, 0.8, 1.0, 1.2, 1.6], dtype=torch.float64)
        field = lambda t, y: -w * (3 * t**2)  # noqa: E731
        solve = {"y0": torch.ones(2, dtype=torch.float64), "t": t, "options": None}
        assert_same(gradients(field, w, "symplectic_adjoint:rk4", **solve), gradients(field, w, "rk4", **solve))

    def test_random_numbers_that_are_not_torchs(self) -> None:
        import random as python_random

        w = random(2).requires_grad_()
        field = lambda t, y: w * y + python_random.random()  # noqa: E731
        y = torchdiffeq.odeint(
            field, Y0, T, method="symplectic_adjoint:rk4", options={"step_size": 0.1, **EVALUATED_AGAIN}
        )
        with pytest.raises(RuntimeError, match="returned other values in the backward pass"):
            y.sum().backward()


class TestStatePutBack:
    """What the field held on the way forward is there again in the backward pass, and afterwards what it holds now."""

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("computed", [False, True])
    def test_a_context_set_anew_for_each_solve(self, computed) -> None:
        class Conditional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Linear(2, 2, dtype=torch.float64)

            def forward(self, t, y):
                return torch.tanh(self.net(y) + self.context)

        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            torch.manual_seed(0)
            field, encoder = Conditional(), nn.Linear(1, 2, dtype=torch.float64)
            loss = torch.zeros((), dtype=torch.float64)
            for i in range(3):
                context = encoder(torch.full((1,), float(i), dtype=torch.float64))
                field.context = context if computed else context.detach()
                y = torchdiffeq.odeint(field, Y0, T, method=method, options={"first_step": 0.1})
                loss = loss + (y[-1] ** 2).sum()
            inputs = [*field.parameters(), *(encoder.parameters() if computed else ())]
            found.append(torch.autograd.grad(loss, inputs))
            assert field.context is context or not computed
        assert_same(found[1], found[0])

    @pytest.mark.usefixtures("kept")
    def test_what_selects_parameters_even_where_they_have_equal_values(self) -> None:
        class Selecting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Linear(2, 2, dtype=torch.float64)
                self.tables = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
                self.experts = nn.ModuleList(nn.Linear(2, 2, dtype=torch.float64) for _ in range(3))
                for expert in self.experts:
                    nn.init.zeros_(expert.weight)

            def forward(self, t, y):
                self.nfe = getattr(self, "nfe", 0) + 1
                shift = self.tables[self.row] + self.expert(y) + u[i]
                return torch.tanh(self.net(y) + (shift if self.enabled else 0))

        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            torch.manual_seed(0)
            field, u = Selecting(), torch.zeros(3, 2, dtype=torch.float64).requires_grad_()
            loss = torch.zeros((), dtype=torch.float64)
            for i in range(3):
                field.row, field.expert, field.enabled = i, field.experts[i], True
                y = torchdiffeq.odeint(field, Y0, T, method=method, options={"first_step": 0.1})
                loss = loss + (i + 1) * (y[-1] ** 2).sum()
            field.enabled = False
            nfe = field.nfe
            found.append(torch.autograd.grad(loss, [u, *field.parameters()]))
            assert field.nfe >= nfe
            assert not field.enabled
        assert_same(found[1], found[0])

    @pytest.mark.usefixtures("kept")
    def test_containers_that_shrink_grow_and_lose_keys(self) -> None:
        field = mlp()
        field.log, field.named = [random(2), random(2)], {"a": random(2)}
        theirs = gradients(field, field.w1, "dopri5")
        y = torchdiffeq.odeint(field, Y0, T, method="symplectic_adjoint", options={"first_step": 0.1})
        field.log.clear()
        del field.named["a"]
        field.other = 1
        assert_same(torch.autograd.grad((y**2).sum(), field.w1), theirs)
        assert field.log == []
        assert field.named == {}
        assert field.other == 1

    @pytest.mark.usefixtures("kept")
    def test_a_model_that_keeps_its_solution_keeps_no_earlier_one(self) -> None:
        field, solutions = mlp(), []
        for _ in range(4):
            field.solution = torchdiffeq.odeint(field, Y0, T, method="symplectic_adjoint")
            solutions.append(weakref.ref(field.solution))
        gc.collect()
        assert [solution() is None for solution in solutions] == [True, True, True, False]

    def test_a_field_that_changes_its_own_buffers_is_refused(self) -> None:
        torch.manual_seed(0)
        net = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="eval mode"):
            torchdiffeq.odeint(lambda t, y: net(y), Y0, T, method="symplectic_adjoint")
        net.eval()
        parameter = net.parametrizations.weight.original
        theirs = gradients(lambda t, y: net(y), parameter, "dopri5")
        assert_same(gradients(lambda t, y: net(y), parameter, "symplectic_adjoint"), theirs)

    @pytest.mark.usefixtures("kept")
    def test_a_closure_and_a_list(self) -> None:
        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            w, scales = random(2).requires_grad_(), [random(2)]
            scale = random(2) + 1
            y = torchdiffeq.odeint(
                lambda t, y, w=w, scales=scales: torch.sin(w * y * scales[0] * scale),  # noqa: B023
                Y0, T, method=method, options={"first_step": 0.1},
            )  # fmt: skip
            scale, scales[0] = 0 * scale, 0 * scales[0]
            found.append(torch.autograd.grad((y**2).sum(), w))
            assert not scales[0].any()
            assert not scale.any()
        assert_same(found[1], found[0])


class MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class TestGradientsOfWhatFHolds:
    """Hooks, freezing and unusual ways of using what f holds: as full backpropagation has it, or an error."""

    def solve(self, field, method, loss=lambda y: (y**2).sum()):
        return loss(torchdiffeq.odeint(field, Y0, T, method=method, options={"first_step": 0.1}))

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_a_hook_on_the_state_raises(self, method) -> None:
        w = random(2, 2).requires_grad_()

        def field(t, y):
            if y.requires_grad:
                y.register_hook(lambda g: 0.9 * g)
            return torch.tanh(y @ w)

        with pytest.raises(RuntimeError, match="symplectic_adjoint: the vector field registers a hook on the state"):
            torchdiffeq.odeint(field, Y0, T, method=f"symplectic_adjoint:{method}")

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_a_field_that_has_no_gradient_can_be_solved_forward(self, method) -> None:
        w = random(2, 2).requires_grad_()

        def field(t, y):
            return (0.1 * (y @ w)).exp().mul_(0.1)  # exp needs what it returned

        expected = torchdiffeq.odeint(field, Y0, T, method=method)
        actual = torchdiffeq.odeint(field, Y0, T, method=f"symplectic_adjoint:{method}")
        assert_same([actual], [expected])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            actual.sum().backward()

    @pytest.mark.usefixtures("kept")
    def test_hooks_run_once_and_see_the_sum(self) -> None:
        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            field, seen = mlp(), {}
            field.w1.register_hook(lambda g, seen=seen: seen.setdefault("parameter", []).append(g) or 2 * g)
            field.w2.register_post_accumulate_grad_hook(
                lambda p, seen=seen: seen.setdefault("accumulated", []).append(p.grad.clone())
            )
            made = torch.tanh(field.b1 * 2)
            made.register_hook(lambda g, seen=seen: seen.setdefault("computed", []).append(g) or 3 * g)
            loss = self.solve(lambda t, y, field=field, made=made: field(t, y) + made.sum() * y, method)
            loss.backward()
            assert sorted(seen) == ["accumulated", "computed", "parameter"]
            assert [len(calls) for calls in seen.values()] == [1, 1, 1]
            found.append([*(seen[name][0] for name in sorted(seen)), field.w1.grad, field.b1.grad])
        assert_same(found[1], found[0])

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("way", ["function", "vmap", "functional grad", "solve inside"])
    def test_a_computed_tensor_used_where_torch_functions_do_not_see_it(self, way) -> None:
        ways = {
            "function": lambda t, y, w: MatMul.apply(y, w),
            "vmap": lambda t, y, w: torch.func.vmap(lambda row: row @ w)(y),
            "functional grad": lambda t, y, w: torch.func.grad(lambda y: torch.cos(y @ w).sum())(y),
            "solve inside": lambda t, y, w: torchdiffeq.odeint(
                lambda t, z: torch.tanh(z @ w), y, T[:2], method="symplectic_adjoint:rk4"
            )[-1],
        }
        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            z = random(2).requires_grad_()
            w = torch.outer(z, z.sin())
            found.append(torch.autograd.grad(self.solve(lambda t, y, w=w: torch.tanh(ways[way](t, y, w)), method), z))
        assert_same(found[1], found[0])

    def test_the_same_entangled_with_what_it_was_computed_from_raises_or_is_exact(self, kept) -> None:
        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            z = random(2).requires_grad_()
            w = torch.outer(z, z.sin())
            loss = self.solve(lambda t, y, w=w, z=z: torch.tanh(MatMul.apply(y, w)) + z, method)
            if method == "symplectic_adjoint" and kept != "live graph":
                with pytest.raises(RuntimeError, match="where torch functions do not see it"):
                    loss.backward()
            else:
                found.append(torch.autograd.grad(loss, z))
        assert_same(found[-1], found[0])

    @pytest.mark.usefixtures("kept")
    def test_computed_tensors_in_a_list_used_one_after_the_other(self) -> None:
        found = []
        for method in ("dopri5", "symplectic_adjoint"):
            z = random(2).requires_grad_()
            ws = [torch.sin(z * i) for i in range(1, 4)]
            field = lambda t, y, ws=ws: torch.tanh(y * ws[min(int(3 * t), 2)])  # noqa: E731
            found.append(torch.autograd.grad(self.solve(field, method), z))
        assert_same(found[1], found[0])

    @pytest.mark.usefixtures("kept")
    def test_a_stale_tensor_that_f_holds_and_does_not_use(self) -> None:
        field = mlp()
        field.last_loss = (field.w1**2).sum()
        field.last_loss.backward()
        theirs = torch.autograd.grad(self.solve(field, "dopri5"), field.w1)
        assert_same(torch.autograd.grad(self.solve(field, "symplectic_adjoint"), field.w1), theirs)

    @pytest.mark.usefixtures("kept")
    def test_what_is_held_but_not_used_may_be_changed_and_hooked(self) -> None:
        field = mlp()
        theirs = torch.autograd.grad(self.solve(field, "dopri5"), field.w1)
        field.hooked = nn.Parameter(random(2))
        field.hooked.register_hook(lambda g: g * 2)
        field.elsewhere = nn.Parameter(random(3))
        loss = self.solve(field, "symplectic_adjoint")
        with torch.no_grad():
            field.unused.add_(1)
        field.elsewhere.data = torch.zeros(4, dtype=torch.float64)
        loss.backward()
        assert_same([field.w1.grad], theirs)
        assert field.unused.grad is None

    @pytest.mark.usefixtures("kept")
    def test_frozen_and_unfrozen_in_between(self) -> None:
        field = mlp()
        theirs = torch.autograd.grad(self.solve(field, "dopri5"), (field.w1, field.w2))
        loss = self.solve(field, "symplectic_adjoint")
        field.frozen.requires_grad_(True)
        field.w1.requires_grad_(False)
        loss.backward()
        assert_same([field.w2.grad], theirs[1:])

    @pytest.mark.usefixtures("kept")
    def test_a_field_that_works_in_threads(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        w = random(2).requires_grad_()
        with ThreadPoolExecutor(2) as pool:
            # torch's grad mode is a thread's own, so the threads are told.
            def half(y):
                with torch.enable_grad():
                    return torch.sin(w * y)

            field = lambda t, y: torch.cat(list(pool.map(half, y.split(2))))  # noqa: E731
            ours, theirs = (torch.autograd.grad(self.solve(field, m), w) for m in ("symplectic_adjoint", "dopri5"))
        assert_same(ours, theirs)

    @pytest.mark.usefixtures("kept")
    def test_checkpointing_around_the_solve(self) -> None:
        from torch.utils.checkpoint import checkpoint

        field, y0 = mlp(), Y0.clone().requires_grad_()
        options = {"first_step": 0.1}
        theirs = torch.autograd.grad(
            (torchdiffeq.odeint(field, y0, T, options=options, method="dopri5") ** 2).sum(), y0
        )
        y = checkpoint(
            lambda y0: torchdiffeq.odeint(field, y0, T, method="symplectic_adjoint", options=options),
            y0,
            use_reentrant=False,
        )
        assert_same(torch.autograd.grad((y**2).sum(), y0), theirs)

    def test_forward_mode_is_refused(self) -> None:
        import torch.autograd.forward_ad as fwad

        with fwad.dual_level(), pytest.raises(RuntimeError, match="in forward mode"):
            torchdiffeq.odeint(mlp(), fwad.make_dual(Y0, Y0), T, method="symplectic_adjoint")

    @pytest.mark.usefixtures("kept")
    def test_adjoint_params_that_leave_out_a_computed_tensor(self) -> None:
        z = random(2).requires_grad_()
        w, v = torch.sin(z), random(2).requires_grad_()
        field = lambda t, y: torch.tanh(y * w) * v  # noqa: E731
        with pytest.warns(UserWarning, match="adjoint_params leaves out"):
            ours = gradients(field, v, "symplectic_adjoint", odeint=torchdiffeq.odeint_adjoint, adjoint_params=(v,))
        assert_same(ours, gradients(field, v, "dopri5"))
