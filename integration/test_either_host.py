"""What full backpropagation gives a gradient for, by either host, fixed grid and adaptive: the same with the flag."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from .exactness import assert_same, both
from .fields import Y0, T, mlp, random
from .hosts import KEPT, SOLVERS, TORCHDIFFEQ, every_solver, keeping, solve

whats = st.sampled_from(list(KEPT))


def slope(w: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ w) * torch.cos(t)


class Holder:
    """Holds a tensor, and is a field in two ways."""

    def __init__(self, w: Tensor) -> None:
        self.held = {"weights": [w]}

    def __call__(self, t, y):
        return slope(self.held["weights"][0], t, y)

    def method(self, t, y):
        return self(t, y)


class Module(nn.Module):
    """Holds a tensor that is no parameter in a module inside."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.w = w

    def forward(self, t, y):
        return slope(self.inner.w, t, y)


GLOBAL: dict[str, Tensor] = {}


def of_a_global(w: Tensor) -> Any:
    GLOBAL["w"] = w
    return lambda t, y: slope(GLOBAL["w"], t, y)


WAYS = {
    "closure": lambda w: lambda t, y: slope(w, t, y),
    "default": lambda w: lambda t, y, w=w: slope(w, t, y),
    "partial": lambda w: functools.partial(slope, w),
    "partial of a lambda": lambda w: functools.partial(lambda t, y, w: slope(w, t, y), w=w),
    "callable": Holder,
    "bound method": lambda w: Holder(w).method,
    "module": Module,
    "module in a lambda": lambda w: (lambda module: lambda t, y: module(t, y))(Module(w)),
    "global": of_a_global,
    "used late": lambda w: lambda t, y: slope(w if t > 0.5 else 0.5 * w.detach(), t, y),
    "used early": lambda w: lambda t, y: slope(w if t < 0.5 else 0.5 * w.detach(), t, y),
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15)
@given(st.sampled_from(SOLVERS), whats, st.booleans(), st.booleans(), st.integers(0, 99))
def test_captured_tensors_with_and_without_a_history(way, solver, what, computed, reverse, seed) -> None:
    def work(flag: bool) -> Any:
        z, y0 = random(2, 2, seed=seed).requires_grad_(), random(3, 2, seed=seed + 1).requires_grad_()
        w = torch.sin(z) + z.exp().sum() / 9 if computed else z
        y = solve(solver, flag, WAYS[way](w), y0, T.flip(0) if reverse else T)
        return torch.autograd.grad((y**2).sum() + (w**2).sum(), (z, y0))

    with keeping(what):
        both(work)


LAYOUTS = {
    "scalar": lambda seed: random(seed=seed),
    "one number": lambda seed: random(1, seed=seed),
    "matrix": lambda seed: random(3, 2, seed=seed),
    "transposed": lambda seed: random(4, 3, seed=seed).T,
    "expanded": lambda seed: random(2, 1, 3, seed=seed).expand(2, 5, 3),
    "every other": lambda seed: random(4, 6, seed=seed)[::2, ::3],
    "channels last": lambda seed: random(2, 3, 4, 5, seed=seed).to(memory_format=torch.channels_last),
    "complex": lambda seed: torch.complex(random(3, seed=seed), random(3, seed=seed + 1)),
    "conjugate": lambda seed: torch.complex(random(3, seed=seed), random(3, seed=seed + 1)).conj(),
}


# Of one number it makes a vector of one; and it has the step size be complex where the state is.
REFUSED_BY = {"torchdyn": ("scalar", "complex", "conjugate")}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15)
@given(st.sampled_from(SOLVERS), whats, st.booleans(), st.booleans(), st.integers(0, 99))
def test_states_of_any_shape_layout_and_type(layout, solver, what, needs_state, needs_times, seed) -> None:
    if layout in REFUSED_BY.get(solver.split()[0], ()):
        return

    def work(flag: bool) -> Any:
        w = random(seed=seed).requires_grad_()
        y0, t = LAYOUTS[layout](seed).detach().requires_grad_(needs_state), T.clone().requires_grad_(needs_times)
        y = solve(solver, flag, lambda t, y: w * y + torch.sin(t), y0, t)
        return [y.detach(), *torch.autograd.grad(y.abs().square().sum(), [x for x in (w, y0, t) if x.requires_grad])]

    with keeping(what):
        both(work)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("solver", "options"), [("torchdiffeq rk4", {}), ("torchdiffeq rk4", {"step_size": 0.25}), ("torchdyn rk4", {})]
)
def test_states_of_no_elements(solver, options) -> None:
    w, y0 = random(2, 2).requires_grad_(), Y0[:0].clone().requires_grad_()
    y = solve(solver, True, lambda t, y: slope(w, t, y), y0, T, **options)
    y.sum().backward()
    assert y.shape == (4, 0, 2)
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(y0.grad, y0)


@pytest.mark.usefixtures("kept")
@every_solver
@pytest.mark.parametrize("used", [False, True])
def test_f_that_holds_a_tensor_of_inference_mode(solver, used) -> None:
    def work(flag: bool) -> Any:
        field = mlp()
        with torch.inference_mode():
            field.validation = [solve(solver, flag, field, Y0, T)]
            shift = torch.ones(2, dtype=torch.float64)
        f = (lambda t, y: field(t, y) + shift) if used else field
        return torch.autograd.grad((solve(solver, flag, f, Y0, T) ** 2).sum(), [field.w1, field.w2])

    both(work)


@pytest.mark.parametrize(
    ("solver", "options"), [*((solver, {}) for solver in SOLVERS), ("torchdiffeq rk4", {"step_size": 0.13})]
)
@pytest.mark.parametrize("of_times", [False, True])
@pytest.mark.parametrize(("of_y", "of_t"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.usefixtures("kept")
def test_times_of_another_precision_than_the_state(solver, options, of_y, of_t, of_times) -> None:

    def work(flag: bool) -> Any:
        w, y0 = random(2).to(of_y).requires_grad_(), Y0.clone().to(of_y).requires_grad_()
        t = T.clone().to(of_t).requires_grad_(of_times)
        y = solve(solver, flag, lambda t, y: (torch.tanh(w * y) * torch.cos(t)).to(of_y), y0, t, **options)
        inputs = [x for x in (w, y0, t) if x.requires_grad]
        return [y.detach(), *torch.autograd.grad((y.double() ** 2).sum(), inputs)]

    actual, expected = work(True), work(False)
    single = 5e-6  # in which the reference's own rounding is part
    # Between grid points an output's place in its step is a quotient of times.
    exact = of_y is torch.float64 and "torchdiffeq" in solver and not options
    assert_same(actual[1:3], expected[1:3], 1e-12 if exact else single)
    assert_same([actual[0], *actual[3:]], [expected[0], *expected[3:]], 20 * single)


class TestGraphs:
    @every_solver
    @pytest.mark.parametrize("of_times", [False, True])
    @pytest.mark.usefixtures("kept")
    def test_repeated_partial_and_several_backward_passes(self, solver, of_times) -> None:
        def work(flag: bool) -> Any:
            field, y0, t = mlp(), Y0.clone().requires_grad_(), T.clone().requires_grad_(of_times)
            of_t = (t,) if of_times else ()
            y = solve(solver, flag, field, y0, t)
            losses = y[1].sum(), (y[3] ** 2).sum(), (y[2] * y[3]).sum()
            found = [torch.autograd.grad(losses[0], x, retain_graph=True)[0] for x in (y0, field.w1, *of_t)]
            again = [torch.autograd.grad(losses[0], x, retain_graph=True)[0] for x in (y0, field.w1, *of_t)]
            assert_same(again, found, 0)
            found += torch.autograd.grad(losses[1], (field.w2, *of_t), retain_graph=True)
            losses[1].backward(inputs=[field.w1], retain_graph=True)
            assert y0.grad is t.grad is field.w2.grad is None
            (losses[0] + losses[2]).backward()
            with pytest.raises(RuntimeError, match="second time"):
                losses[2].backward()
            return [*found, field.w1.grad, field.w2.grad, y0.grad, *(x.grad for x in of_t)]

        both(work)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_frozen_inputs_get_none(self, solver) -> None:
        field = mlp().requires_grad_(False)
        field.b1.requires_grad_(True)
        (solve(solver, True, field, Y0, T) ** 2).sum().backward()
        assert [name for name, p in field.named_parameters() if p.grad is not None] == ["b1"]

    @pytest.mark.parametrize("solver", ["torchdiffeq dopri5", "torchdiffeq rk4", "torchdyn rk4"])
    def test_a_compiled_training_step(self, solver) -> None:
        torch._dynamo.reset()
        field = mlp()

        def loss(flag: bool, y0: Tensor) -> Tensor:
            return (solve(solver, flag, field, y0, T) ** 2).sum()

        y0 = Y0.clone().requires_grad_()
        compiled = torch.compile(functools.partial(loss, True), backend="eager")
        assert_same(*(torch.autograd.grad(each, (y0, field.w1)) for each in (compiled(y0), loss(False, y0))))

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("solver", TORCHDIFFEQ)
    def test_a_continuous_flow_with_the_divergence_of_its_own_autograd(self, solver) -> None:
        def work(flag: bool) -> Any:
            field, y0 = mlp(), Y0.clone().requires_grad_()

            def flow(t, states):
                with torch.enable_grad():
                    y = states[0].requires_grad_()
                    dy = field(t, y)
                    parts = [torch.autograd.grad(dy[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(2)]
                return dy, -sum(parts)

            method = solver.split()[1]
            y, logp = torchdiffeq.odeint(
                flow, (y0, torch.zeros(3).double()), T, method=f"symplectic_adjoint:{method}" if flag else method,
                options={"first_step": 0.1} if method == "dopri5" else {},
            )  # fmt: skip
            loss = (y[-1] ** 2).sum() - logp[-1].sum()
            with torch.no_grad():
                y0_only = torchdiffeq.odeint(flow, (y0, torch.zeros(3).double()), T, method="symplectic_adjoint")
            assert not y0_only[0].requires_grad
            return torch.autograd.grad(loss, (y0, field.w1, field.b1, field.w2))

        both(work)


def noisy() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdyn rk4"])
class TestRandomnessAndModes:
    @pytest.mark.usefixtures("kept")
    def test_generators_and_statistics_are_as_without_the_flag(self, solver) -> None:
        def work(flag: bool) -> Any:
            net = noisy()
            torch.manual_seed(1)
            y = solve(solver, flag, lambda t, y: net(y), Y0, T)
            drawn = torch.rand(3).double()
            found = torch.autograd.grad((y**2).sum(), list(net.parameters()))
            norm = net[1]
            return *found, drawn, torch.rand(3), norm.running_mean, norm.running_var, norm.num_batches_tracked.double()

        both(work)

    @pytest.mark.usefixtures("kept")
    def test_a_seed_set_before_the_backward_pass_is_kept_and_not_used(self, solver) -> None:
        def work(flag: bool) -> Any:
            net = noisy()
            torch.manual_seed(1)
            y = solve(solver, flag, lambda t, y: net(y), Y0, T)
            torch.manual_seed(2)
            found = torch.autograd.grad((y**2).sum(), list(net.parameters()))
            return *found, torch.rand(3)

        both(work)

    @pytest.mark.usefixtures("kept")
    def test_eval_mode_switched_on_in_between(self, solver) -> None:
        def work(flag: bool) -> Any:
            net = noisy()
            torch.manual_seed(1)
            loss = (solve(solver, flag, lambda t, y: net(y), Y0, T) ** 2).sum()
            net.eval()
            found = torch.autograd.grad(loss, list(net.parameters()))
            assert not any(module.training for module in net.modules())
            return found

        both(work)


class TestTampering:
    @pytest.mark.usefixtures("kept")
    @every_solver
    @pytest.mark.parametrize("what", ["parameter", "captured", "computed", "initial state"])
    def test_what_is_changed_in_place_raises_unless_it_does_not_matter(self, solver, what, kept) -> None:
        found, raised = [], False
        for tampering in (False, True):
            field, captured = mlp(), random(2).requires_grad_()
            computed, y0 = torch.sin(captured), Y0.clone()
            terms = field, captured, computed
            y = solve(solver, True, lambda t, y, of=terms: of[0](t, y) + of[1] * y + of[2], y0, T)
            if tampering:
                changed = {"parameter": field.w1, "captured": captured, "computed": computed, "initial state": y0}
                with torch.no_grad():
                    changed[what].mul_(2)
            try:
                found.append(torch.autograd.grad(y.sum(), (field.w1, captured)))
            except RuntimeError as error:
                raised = "by an inplace operation" in str(error) or error
        # No product needs the value of a summand: of that only an evaluation that is made again is another one.
        if what != "computed" or kept == "states":
            assert raised is True
        elif kept == "live graph":
            assert not raised
        assert len(found) == (1 if raised else 2)
        assert_same(found[-1], found[0])

    @pytest.mark.usefixtures("kept")
    @every_solver
    @pytest.mark.parametrize(
        "tamper",
        [
            lambda field: setattr(field.w1, "data", field.w1.data + 1),
            lambda field: setattr(field.w1, "data", torch.empty(0).double()),
            lambda field: field.w1.untyped_storage().resize_(0),
            lambda field: field.float(),
        ],
        ids=["swapped", "emptied", "freed", "cast"],
    )
    def test_a_parameter_whose_data_is_elsewhere_raises(self, solver, tamper) -> None:
        field = mlp()
        y = solve(solver, True, field, Y0, T)
        tamper(field)
        # Of torchdyn's live graph autograd may be the first to notice: freed memory is too small.
        with pytest.raises(RuntimeError, match=r"given other memory|out of bounds for storage"):
            y.sum().backward()

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_parameters_that_a_module_has_been_given_anew_elsewhere_do_not_matter(self, solver) -> None:
        def work(flag: bool) -> Any:
            field = mlp()
            parameters = [field.w1, field.w2]
            loss = (solve(solver, flag, field, Y0, T) ** 2).sum()
            field.to("meta")  # other parameters: those of the solve are still where they were
            return torch.autograd.grad(loss, parameters)

        both(work)
