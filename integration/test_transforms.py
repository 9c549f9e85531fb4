"""torch.func, torch.compile, batched and scaled gradients, in f and around a solve: exact, or a clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

pytest.importorskip("torchdyn")


from .exactness import assert_same, both
from .fields import Y0, T, mlp
from .hosts import SOLVERS, TORCHDIFFEQ, every_solver, solve


class TestInsideF:
    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_functional_call_with_computed_parameters(self, solver) -> None:
        def work(flag: bool) -> Any:
            field, z = mlp(), torch.linspace(0.5, 1, 8).double().requires_grad_()
            made = {name: p.detach() * (1 + torch.sin(z).sum() / 9) for name, p in field.named_parameters()}
            y = solve(solver, flag, lambda t, y: torch.func.functional_call(field, made, (t, y)), Y0, T)
            return torch.autograd.grad((y**2).sum(), z)

        both(work)

    @pytest.mark.usefixtures("kept")
    @every_solver
    @pytest.mark.parametrize("inside", ["vmap", "grad", "vmap of grad", "jvp", "jvp that is zero"])
    def test_vmap_grad_and_jvp(self, solver, inside) -> None:
        def work(flag: bool) -> Any:
            w = torch.tensor([[0.3, 1.0], [-1.0, 0.2]]).double().requires_grad_()

            def energy(y: Tensor) -> Tensor:
                return torch.cos(w @ y).sum() if y.ndim == 1 else torch.cos(y @ w.T).sum()

            ways = {
                "vmap": torch.vmap(lambda y: torch.tanh(w @ y)),
                "grad": torch.func.grad(energy),
                "vmap of grad": torch.vmap(torch.func.grad(energy)),
                "jvp": lambda y: torch.func.jvp(lambda y: torch.tanh(y @ w) @ w.T, (y,), (torch.ones_like(y),))[1],
                "jvp that is zero": lambda y: torch.func.jvp(lambda y: y * 2, (y,), (torch.zeros_like(y),))[1] * w[0],
            }
            y0 = Y0.clone().requires_grad_()
            y = solve(solver, flag, lambda t, y: ways[inside](y) * t, y0, T)
            return torch.autograd.grad((y**2).sum(), (w, y0))

        both(work)

    @pytest.mark.parametrize(
        ("solver", "backend"), [*((solver, "eager") for solver in SOLVERS), ("torchdiffeq rk4", "aot_eager")]
    )
    def test_a_compiled_field(self, solver, backend) -> None:
        torch._dynamo.reset()

        def work(flag: bool) -> Any:
            field, y0 = mlp(), Y0.clone().requires_grad_()
            compiled = torch.compile(field, backend=backend) if flag else field
            return torch.autograd.grad((solve(solver, flag, compiled, y0, T) ** 2).sum(), (y0, field.w1, field.w2))

        both(work)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_gradients_of_its_own_and_inputs_that_it_makes_require_them(self, solver) -> None:
        def work(flag: bool) -> Any:
            w, y0 = torch.tensor([0.3, 0.2]).double().requires_grad_(), Y0.clone().requires_grad_()

            def field(t, y):
                with torch.enable_grad():
                    t, y = t.requires_grad_(), y.requires_grad_()
                    energy = (torch.sin(w * y) * torch.cos(t)).sum()
                    force, power = torch.autograd.grad(energy, (y, t), create_graph=True)
                return force + power

            loss = (solve(solver, flag, field, y0, T) ** 2).sum()
            with torch.no_grad():
                assert torch.equal(*(solve(solver, each, field, Y0.clone(), T.clone()) for each in (flag, False)))
            return torch.autograd.grad(loss, (w, y0))

        both(work)


class TestAroundASolve:
    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_functional_call(self, solver) -> None:
        def work(flag: bool) -> Any:
            class Model(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.field = mlp()

                def forward(self, y0: Tensor) -> Tensor:
                    return solve(solver, flag, self.field, y0, T)

            model = Model()
            given = {name: p.detach().sin().requires_grad_() for name, p in model.named_parameters()}
            y = torch.func.functional_call(model, given, (Y0,))
            return torch.autograd.grad((y**2).sum(), (given["field.w1"], given["field.w2"]))

        both(work)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_jacobians_and_hessians_row_by_row(self, solver) -> None:
        y0, field = Y0[:2, :1].repeat(1, 2), mlp()
        both(lambda flag: [jacobian(lambda y: solve(solver, flag, field, y, T)[-1], y0)])
        both(lambda flag: [hessian(lambda y: (solve(solver, flag, field, y, T)[-1] ** 3).sum(), y0)])

    @every_solver
    def test_batched_gradients_are_refused_by_the_sweep(self, solver, states_alone) -> None:
        field, y0 = mlp(), Y0.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="vectorize=False"):
            jacobian(lambda y: solve(solver, True, field, y, T)[-1], Y0, vectorize=True)
        with pytest.raises(RuntimeError, match="vectorize=False"):
            hessian(lambda y: solve(solver, True, field, y, T)[-1].sum(), Y0, vectorize=True)
        y = solve(solver, True, field, y0, T)[-1]
        rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        with pytest.raises(RuntimeError, match="is_grads_batched"):
            torch.autograd.grad(y, (y0, field.w1), rows, is_grads_batched=True)

    @every_solver
    def test_batched_gradients_through_a_live_graph(self, solver) -> None:
        field, y0 = mlp(), Y0.clone().requires_grad_()

        def work(flag: bool) -> Any:
            y = solve(solver, flag, field, y0, T)[-1]
            rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
            return torch.autograd.grad(y, (y0, field.w1), rows, is_grads_batched=True)

        both(work)

    @every_solver
    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
    def test_torchs_functional_transforms_are_refused(self, solver, transform) -> None:
        field = mlp()
        # torchdyn's adaptive loop decides by values, which vmap itself refuses.
        with pytest.raises(RuntimeError, match=r"torch\.func's transforms|data-dependent"):
            transform(lambda y0: (solve(solver, True, field, y0, T) ** 2).sum())(Y0)


def scaled_gradients(solver: str, flag: bool, device: str, dtype: torch.dtype) -> list[Tensor]:
    """A training step's gradients with autocast and a GradScaler."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(device)
    seen = []
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    t = T.float().to(device).requires_grad_()
    with torch.autocast(device, dtype=dtype):
        y = solve(solver, flag, lambda t, y: net(y) * t, Y0.float().to(device), t)
        loss = (y**2).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    gradients = [p.grad.clone() for p in net.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert set(seen) == {dtype}
    assert scaler.get_scale() == 1024.0  # no infinities were found
    assert all((p - q).norm() > 0 for p, q in zip(net.parameters(), before, strict=True))
    return [*gradients, t.grad / 1024]


class TestMixedPrecision:
    @pytest.mark.parametrize("policy", ["auto", "stages", "steps"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gradients_of_half_precision_are_summed_in_a_wider_one(self, dtype, policy) -> None:
        # Of thousands of equal terms, a sum in bfloat16 stays at the 256th, one in float16 at the 2048th.
        w = torch.zeros(2, dtype=dtype).requires_grad_()
        y0, t = torch.zeros(2, dtype=dtype), torch.linspace(0, 1, 1001)
        options = {"checkpoint": policy}
        y = torchdiffeq.odeint(lambda t, y: w + 0 * y, y0, t, method="symplectic_adjoint:rk4", options=options)
        (gradient,) = torch.autograd.grad(y[-1].sum(), w)
        assert (gradient.double() - 1).abs().max() <= 0.01

    @pytest.mark.parametrize("policy", ["auto", "stages", "steps"])
    @pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
    def test_the_adjoint_of_a_half_precision_state_is_carried_in_a_wider_one(self, method, policy) -> None:
        # In bfloat16 it would stay at 1: what each of a thousand steps adds is less than half of its last digit.
        y0, t = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0.0, 0.25, 0.5003, 1.0])
        h = 2.0**-10
        size = {"first_step": h, "max_step": h} if method == "dopri5" else {"step_size": h}
        y = torchdiffeq.odeint(
            lambda t, y: y, y0, t, method=f"symplectic_adjoint:{method}", options={"checkpoint": policy, **size}
        )
        (gradient,) = torch.autograd.grad(y.float().mean(0).sum(), y0)
        expected = float(t.exp().mean())
        assert (gradient.double() / expected - 1).abs().max() <= 0.01

    @pytest.mark.parametrize("policy", ["stages", "steps"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
    def test_rounding_is_not_taken_for_another_vector_field(self, method, dtype, policy) -> None:
        for seed in range(10):
            torch.manual_seed(seed)
            first, second = (2 * torch.randn(2, 16)).to(dtype), torch.randn(16, 2).to(dtype)
            y0 = torch.randn(1, 2).to(dtype).requires_grad_()
            y = torchdiffeq.odeint(
                lambda t, y, a=first, b=second: torch.tanh(y @ a) @ b, y0, torch.tensor([0.0, 4.0]), rtol=0.03,
                atol=0.03, method=f"symplectic_adjoint:{method}", options={"checkpoint": policy, "first_step": 0.125},
            )  # fmt: skip
            torch.autograd.grad(y.float().pow(2).sum(), y0)  # would raise

    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @every_solver
    def test_autocast_and_scaled_losses(self, solver, dtype) -> None:
        eps = torch.finfo(dtype).eps
        assert_same(*(scaled_gradients(solver, flag, "cpu", dtype) for flag in (True, False)), bound=4 * eps)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("solver", TORCHDIFFEQ)
    def test_the_same_on_a_gpu(self, solver, dtype) -> None:
        eps = torch.finfo(dtype).eps
        assert_same(*(scaled_gradients(solver, flag, "cuda", dtype) for flag in (True, False)), bound=4 * eps)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_a_network_that_autocast_has_cast_before_the_solve(self, solver) -> None:
        def work(flag: bool) -> Any:
            torch.manual_seed(0)
            net = nn.Linear(2, 2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y0 = net(Y0.float()).float()  # autocast keeps the casts of the weights, with their graphs
                y = solve(solver, flag, lambda t, y: net(y), y0, T.float())
            return torch.autograd.grad((y**2).sum(), tuple(net.parameters()))

        assert_same(work(True), work(False), bound=2e-2)

    @every_solver
    def test_a_loss_that_overflows_is_found_by_the_scaler(self, solver) -> None:
        net = nn.Linear(2, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype=torch.float16):
            y = solve(solver, True, lambda t, y: net(y), Y0.float(), T.float())
        before = net.weight.detach().clone()
        scaler.scale((y.double() * 1e300).float().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net.weight, before)
        assert scaler.get_scale() < 2.0**16
