"""Solves inside others, beside others, in threads and in processes, and models that are copied."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("torchdyn")

from .exactness import assert_same, both
from .fields import Y0, T, mlp
from .hosts import TORCHDIFFEQ, every_solver, solve


def gradients(field: nn.Module, solver: str, flag: bool, y0: Tensor = Y0) -> tuple[Tensor, ...]:
    y0 = y0.clone().requires_grad_()
    y = solve(solver, flag, field, y0, T)
    return torch.autograd.grad((y**2).sum(), (y0, field.w1, field.w2))


class TestNested:
    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_a_solve_inside_f(self, solver) -> None:
        def work(flag: bool) -> Any:
            w, y0 = torch.tensor([0.3, 0.2]).double().requires_grad_(), Y0.clone().requires_grad_()

            def field(t, y):
                return solve(solver, flag, lambda s, z: torch.sin(w * z) + t, y, T[:2])[-1]

            return torch.autograd.grad((solve(solver, flag, field, y0, T) ** 2).sum(), (w, y0))

        both(work)

    @pytest.mark.parametrize("solver", TORCHDIFFEQ)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_a_solve_inside_an_event_function(self, solver, reverse) -> None:
        method = solver.split()[1]

        def work(flag: bool) -> Any:
            w = torch.tensor(0.3).double().requires_grad_()
            y0, t0 = torch.tensor([1.0, 0.2]).double().requires_grad_(), T[0].clone().requires_grad_()

            def look_ahead(t, y):
                return solve(solver, flag, lambda s, z: -w * z, y[:1], T[:2])[-1, 0] - 0.5

            options = {"first_step": 0.1} if method == "dopri5" else {"step_size": 0.05, "interp": "cubic"}
            event_t, y = torchdiffeq.odeint_event(
                lambda t, y: torch.stack([-y[0] * w, y[0] * torch.cos(t)]) * (-1 if reverse else 1),
                y0, t0, event_fn=look_ahead, reverse_time=reverse, odeint_interface=torchdiffeq.odeint,
                method=f"symplectic_adjoint:{method}" if flag else method, options=options,
            )  # fmt: skip
            return torch.autograd.grad(3 * event_t + y[-1].sum(), (w, y0, t0))

        both(work)


class TestSeveralAtOnce:
    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_backward_passes_in_another_order_than_the_solves(self, solver) -> None:
        def work(flag: bool) -> Any:
            fields, found = [mlp(seed) for seed in range(3)], []
            y0 = Y0.clone().requires_grad_()
            losses = [(solve(solver, flag, field, y0, T) ** 2).sum() for field in [*fields, fields[0]]]
            for i in (1, 3, 0, 2):
                found += torch.autograd.grad(losses[i], (y0, fields[i % 3].w1))
            return found

        both(work)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_one_backward_pass_through_a_chain_of_solves(self, solver) -> None:
        def work(flag: bool) -> Any:
            fields, y0 = [mlp(seed) for seed in range(3)], Y0.clone().requires_grad_()
            y = y0
            for field in fields:
                y = solve(solver, flag, field, y, T)[-1] + torch.sin(y)
            return torch.autograd.grad((y**2).sum(), [y0, *(field.w1 for field in fields)])

        both(work)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_a_backward_pass_between_the_forward_and_the_backward_pass_of_another(self, solver) -> None:
        def work(flag: bool) -> Any:
            field, y0 = mlp(), Y0.clone().requires_grad_()
            outer = (solve(solver, flag, field, y0, T) ** 2).sum()
            inner = torch.autograd.grad(solve(solver, flag, field, y0, T).sum(), (y0, field.w1))
            return *inner, *torch.autograd.grad(outer, (y0, field.w1))

        both(work)


class TestThreads:
    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_backward_in_another_thread(self, solver) -> None:
        def work(flag: bool) -> Any:
            field, y0, found = mlp(), Y0.clone().requires_grad_(), []
            loss = (solve(solver, flag, field, y0, T) ** 2).sum()
            thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, (y0, field.w1))))
            thread.start()
            thread.join()
            return found

        both(work)

    @every_solver
    @pytest.mark.usefixtures("kept")
    @pytest.mark.parametrize("shared", [False, True])
    def test_ten_threads_at_the_same_time(self, solver, shared) -> None:
        fields = [mlp()] * 10 if shared else [mlp(seed) for seed in range(10)]
        starts = [Y0 + i / 10 for i in range(10)]

        def work(field: nn.Module, y0: Tensor) -> tuple[Tensor, ...]:
            found = gradients(field, solver, True, y0)
            torch.rand(100)  # another thread's draws are not the field's
            return found

        expected = [gradients(field, solver, False, y0) for field, y0 in zip(fields, starts, strict=True)]
        with ThreadPoolExecutor(10) as pool:
            for ours, theirs in zip(pool.map(work, fields, starts), expected, strict=True):
                assert_same(ours, theirs)


class Solved(Dataset):
    """Items that are gradients, computed where they are asked for."""

    def __init__(self, field: nn.Module, solver: str, flag: bool) -> None:
        self.field, self.solver, self.flag = field, solver, flag

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> list[Tensor]:
        return [*gradients(self.field, self.solver, self.flag, Y0 + i)]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("solver", ["torchdiffeq dopri5", "torchdyn rk4"])
def test_forked_data_loader_workers_solve_with_gradients(solver) -> None:
    field = mlp()
    gradients(field, solver, flag=True)  # the parent has used the solver, and autograd, before
    workers = DataLoader(
        Solved(field, solver, flag=True), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    expected = Solved(field, solver, flag=False)
    items = list(workers)
    assert len(items) == len(expected)
    for i, item in enumerate(items):
        assert_same(item, expected[i])


class TestCopies:
    @every_solver
    @pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_of_a_model_before_and_after_a_solve(self, solver, way) -> None:
        field = mlp()
        expected = gradients(field, solver, flag=False)
        copies = [way(field)]
        y = solve(solver, True, field, Y0, T)
        copies.append(way(field))
        y.sum().backward()
        copies.append(way(field))
        for copied in (field, *copies):
            assert_same(gradients(copied, solver, flag=True), expected)

    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_of_a_model_while_a_solve_is_alive_do_not_take_its_gradient(self, solver) -> None:
        field = mlp()
        expected = gradients(field, solver, flag=False)
        loss = (solve(solver, True, field, Y0, T) ** 2).sum()
        copied = copy.deepcopy(field)
        with torch.no_grad():
            copied.w1.add_(1)  # the copy's parameters are its own
        loss.backward()
        assert_same([field.w1.grad, field.w2.grad], expected[1:])
        assert copied.w1.grad is None


class TestDataParallel:
    @pytest.mark.usefixtures("kept")
    @every_solver
    def test_replicas_whose_parameters_are_attributes_with_a_history(self, solver) -> None:
        def replica(field: nn.Module) -> nn.Module:
            """As `torch.nn.parallel.replicate` leaves one, but for the device."""
            result = field._replicate_for_data_parallel()
            result._former_parameters = {}
            for name, parameter in field._parameters.items():
                result._parameters.pop(name, None)
                copied = parameter.clone()  # `Broadcast`, on one device
                setattr(result, name, copied)
                result._former_parameters[name] = copied
            return result

        def work(flag: bool) -> Any:
            field, y0 = mlp(), Y0.clone().requires_grad_()
            parts = [solve(solver, flag, replica(field), part, T) for part in y0.split([1, 2])]
            loss = (torch.cat(parts, 1) ** 2).sum()
            return torch.autograd.grad(loss, (y0, field.w1, field.b1, field.wt, field.w2))

        both(work)

    @every_solver
    def test_replicas_in_threads(self, solver) -> None:
        field = mlp()

        def work(flag: bool) -> Any:
            replicas = [copy.copy(field) for _ in range(2)]
            with ThreadPoolExecutor(2) as pool:
                parts = list(pool.map(lambda r, y: solve(solver, flag, r, y, T), replicas, Y0.split([1, 2])))
            return torch.autograd.grad((torch.cat(parts, 1) ** 2).sum(), (field.w1, field.w2))

        both(work)
