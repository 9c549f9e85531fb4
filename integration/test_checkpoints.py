"""The memory dial: every policy and every budget gives the same gradient, within its budget."""

from __future__ import annotations

import gc
import os
import weakref
from contextvars import ContextVar
from typing import Any, ClassVar

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import symplectic_plugin
from benchmarks.peak_memory import peak_bytes
from symplectic_plugin.record.defaults import DEFAULTS, override
from symplectic_plugin.record.store import POLICIES

from .exactness import Outcome, assert_same, errors
from .fields import MLP
from .hosts import ADAPTIVE, EXPLICIT, FLAG, callbacks_and_limits, given_steps, least_budget


def network(size: int = 8, hidden: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, size))


class TestSameGradient:
    @pytest.mark.parametrize("method", EXPLICIT)
    @settings(max_examples=10)
    @given(
        st.sampled_from(POLICIES),
        st.one_of(st.none(), st.floats(1.0, 4.0)),
        st.integers(2, 6),
        st.integers(0, 2**31),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )
    def test_whatever_is_kept(self, method, policy, budget, outputs, seed, dropout, offload, of_times) -> None:
        generator = torch.Generator().manual_seed(seed)
        field = MLP(3, 8, generator)
        y0 = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        t = torch.linspace(0, 1, outputs, dtype=torch.float64)
        options = given_steps(method, 0.3 if method in ADAPTIVE else 1 / 23)
        if dropout:
            # As a rule of the mask, so that steps can be rejected.
            field.register_forward_hook(lambda _, args, slope: slope * (1 + 0.01 * torch.rand_like(slope)))
        solve = {"rtol": 1e-2, "atol": 1e-2}

        def outcome(flag: str, **keep) -> Outcome:
            torch.manual_seed(seed)
            return Outcome(field, y0, t, of_times=of_times, method=flag + method, options=options | keep, **solve)

        keep = {"checkpoint": policy}
        if budget is not None:
            outcome_of = lambda b: outcome(f"{FLAG}:", checkpoint=policy, memory_budget=b)  # noqa: E731
            # What is known of at first; states of all steps, or of generators, come on top.
            enough = least_budget(outcome_of) + (100_000 if policy in ("steps", "stages") else 0) + 500_000 * dropout
            keep["memory_budget"] = int(budget * enough)
        if offload:
            keep["offload"] = "cpu"
        found = errors(outcome(f"{FLAG}:", **keep), outcome(""))
        found.pop("t", None)  # its rounding is the reference's: see test_torchdiffeq_gradients
        assert max(found.values()) <= 1e-12, found

    def test_states_had_again_are_the_same_to_the_last_bit(self) -> None:
        field, y0 = network(3, 8).double(), torch.randn(2, 3, dtype=torch.float64)
        for method, options in (
            ("dopri5", {"max_step": 1 / 60}),
            ("adaptive_heun", {"max_step": 1 / 60}),
            ("rk4", {"step_size": 1 / 60}),
        ):
            seen: dict[str, list[Tensor]] = {}
            for policy in ("steps", "binomial"):
                states = seen[policy] = []
                y = torchdiffeq.odeint(
                    lambda t, y: field(y), y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:{method}",
                    options=options | {"checkpoint": policy},
                )  # fmt: skip
                handle = field.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0].detach()))
                y[-1].sum().backward()
                handle.remove()
            last = {policy: states[-1] for policy, states in seen.items()}
            assert torch.equal(last["steps"], last["binomial"])
            assert {tuple(x.flatten().tolist()) for x in seen["steps"]} <= {
                tuple(x.flatten().tolist()) for x in seen["binomial"]
            }

    def test_tuples_events_and_second_derivatives(self) -> None:
        field = MLP(3, 8, torch.Generator().manual_seed(0))
        y0 = torch.randn(3, dtype=torch.float64, requires_grad=True)
        t0 = torch.zeros((), dtype=torch.float64)

        def solve(policy: str | None) -> list[Tensor]:
            method = "dopri5" if policy is None else f"{FLAG}:dopri5"
            options = {"first_step": 0.1} if policy is None else {"first_step": 0.1, "checkpoint": policy}
            state, time = (y0, 2 * y0[:1]), torch.linspace(0, 1, 3, dtype=torch.float64)
            f = lambda t, y: (field(t, y[0]), -y[1] * y[0][:1])  # noqa: E731
            pair = torchdiffeq.odeint(f, state, time, method=method, options=options)
            loss = sum((y**2).sum() for y in pair)
            (first,) = torch.autograd.grad(loss, y0, create_graph=True)
            second = torch.autograd.grad((first**2).sum(), (y0, field.w1))
            event_t, y = torchdiffeq.odeint_event(
                lambda t, y: field(t, y) + 1, y0, t0, event_fn=lambda t, y: y[0] - 1.7, method=method, options=options
            )
            return [first, *second, *torch.autograd.grad(event_t + y[-1].sum(), (y0, field.w1))]

        expected = solve(None)
        for policy in POLICIES:
            assert_same(solve(policy), expected)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_backward_twice(self, policy) -> None:
        field, y0 = network(), torch.randn(4, 8)
        y = torchdiffeq.odeint(
            lambda t, y: field(y), y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4",
            options={"step_size": 0.02, "checkpoint": policy},
        )  # fmt: skip
        weight = field[0].weight
        first, second = (torch.autograd.grad(y.sum(), weight, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        torch.autograd.grad(y.sum(), weight)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), weight)


@callbacks_and_limits
@pytest.mark.parametrize("policy", ["steps", "stages", "binomial"])
def test_a_state_that_somebody_changes_in_place_raises(policy) -> None:
    class Field(nn.Linear):
        def forward(self, t, y):
            return torch.tanh(super().forward(y))

        def callback_step(self, t0, y0, dt):
            states.append(y0)

    states: list[Tensor] = []
    options = {"step_size": 0.1, "checkpoint": policy}
    y = torchdiffeq.odeint(
        Field(3, 3), torch.randn(2, 3), torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4", options=options
    )
    states[4].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@callbacks_and_limits
def test_states_are_freed_by_the_backward_pass_even_if_the_solution_stays() -> None:
    class Field(nn.Linear):
        def forward(self, t, y):
            return super().forward(y)

        def callback_step(self, t0, y0, dt):
            states.append(weakref.ref(y0))

    states: list[weakref.ref[Tensor]] = []
    options = {"step_size": 0.1, "checkpoint": "steps"}
    y = torchdiffeq.odeint(
        Field(3, 3), torch.randn(2, 3), torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4", options=options
    )
    y.sum().backward(retain_graph=True)
    assert all(state() is not None for state in states)
    y.sum().backward()
    assert all(state() is None for state in states[2:])
    assert y.grad_fn is not None


class TestMemory:
    BATCH = 64
    warm: ClassVar[set[str]] = set()

    def peak(self, method: str, steps: int, outputs: int = 2, of_times: bool = False, **options) -> tuple[int, Any]:
        field, y0 = network(), torch.randn(self.BATCH, 8).requires_grad_()
        # All steps as long as the first, whatever the error.
        size = given_steps(method, 1 / steps, held=True)

        def work() -> None:
            y = torchdiffeq.odeint(
                lambda t, y: field(y) * torch.cos(t), y0, torch.linspace(0, 1, outputs, requires_grad=of_times),
                method=f"{FLAG}:{method}", rtol=1e6, atol=1e6, options=size | options,
            )  # fmt: skip
            y[-1].sum().backward()
            y0.grad = None
            field.zero_grad()

        if method not in self.warm:  # so that buffers which are made once do not count
            work()
            self.warm.add(method)
        with symplectic_plugin.profile() as solves:
            peak = peak_bytes(work)
        return peak, solves[0]

    @pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
    @pytest.mark.parametrize(("steps", "of_times"), [(10, False), (40, False), (10, True)])
    def test_it_is_within_the_budget_from_the_least_to_enough_for_everything(self, method, steps, of_times) -> None:
        least = least_budget(lambda budget: self.peak(method, steps, of_times=of_times, memory_budget=budget))
        recomputed = []
        for factor in (1, 1.5, 5, 1000):
            budget = int(least * factor)
            peak, report = self.peak(method, steps, of_times=of_times, memory_budget=budget)
            assert peak <= budget, (factor, report)
            recomputed.append(report.recomputed)
        assert recomputed == sorted(recomputed, reverse=True)
        assert recomputed[0] > 0
        assert recomputed[-1] == 0

    @pytest.mark.parametrize(("method", "policy"), [("dopri5", "auto"), ("bosh3", "auto"), ("rk4", "binomial")])
    def test_so_it_is_with_derivatives_in_the_vector_field(self, method, policy) -> None:
        first, second = torch.randn(4, 128).requires_grad_(), torch.randn(128, 4).requires_grad_()
        y0 = torch.randn(64, 4).requires_grad_()
        size = given_steps(method, held=True)

        def field(t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                z = y if y.requires_grad else y.detach().requires_grad_()
                energy = (torch.tanh(z @ first) @ second).pow(2).sum()
                return torch.tanh(y @ first) @ second - torch.autograd.grad(energy, z, create_graph=True)[0] / 100

        def work(budget: int) -> None:
            y = torchdiffeq.odeint(
                field, y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:{method}", rtol=1e6, atol=1e6,
                options={**size, "checkpoint": policy, "memory_budget": budget},
            )  # fmt: skip
            torch.autograd.grad(y[-1].sum(), (y0, first, second))

        least = least_budget(work)
        for factor in (1, 1.5, 4):
            budget = int(least * factor)
            work(budget)
            assert peak_bytes(lambda budget=budget: work(budget)) <= budget

    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_nested_tensors_in_the_vector_field(self, layout) -> None:
        """Autograd does not tell their shapes."""
        weight, y0 = torch.randn(4, 4).requires_grad_(), torch.randn(8, 4)

        def field(t: Tensor, y: Tensor) -> Tensor:
            nested = torch.nested.as_nested_tensor([y[:3], y[3:]], layout=layout)
            return torch.cat(list(nn.functional.linear(nested, weight).unbind()))

        gradients = []
        for flag, budget in (("", {}), (f"{FLAG}:", {"memory_budget": 10**7})):
            y = torchdiffeq.odeint(
                field, y0, torch.tensor([0.0, 1.0]), method=f"{flag}rk4", options={"step_size": 0.1, **budget}
            )
            gradients += torch.autograd.grad(y[-1].sum(), weight)
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("method", ["euler", "rk4", "bosh3", "dopri5", "dopri8"])
    @pytest.mark.parametrize("outputs", [2, 150])
    def test_so_it_is_however_many_outputs_there_are(self, method, outputs) -> None:
        least = least_budget(lambda budget: self.peak(method, 16, outputs, memory_budget=budget))
        for factor in (1, 1.3, 2.5):
            budget = int(least * factor)
            peak, report = self.peak(method, 16, outputs, memory_budget=budget)
            assert peak <= budget, (factor, report)

    @pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
    def test_nothing_is_evaluated_again_that_was_kept_in_more_than_one_graph(self, method) -> None:
        least = least_budget(lambda budget: self.peak(method, 30, memory_budget=budget))
        unlimited = self.peak(method, 30, memory_budget=10**12)[1]
        # Of an adaptive solve no graph takes more than a quarter of the room.
        report = self.peak(method, 30, memory_budget=least + 2 * unlimited.graph_bytes)[1]
        assert f"graphs of {report.accepted} of {report.accepted} steps" in report.kept
        assert report.recomputed == 0

    @pytest.mark.parametrize(
        ("method", "cut"), [("dopri5", False), ("bosh3", False), ("rk4", False), ("dopri5", True), ("bosh3", True)]
    )
    def test_nor_that_of_steps_that_can_be_no_graph_themselves(self, method, cut) -> None:
        """Whose times have gradients, or which are cut short."""
        step_t = {"step_t": torch.tensor([0.45, 0.77])} if cut else {}
        report = self.peak(method, 30, outputs=4, of_times=not cut, **step_t)[1]
        assert f"graphs of {report.accepted} of {report.accepted} steps" in report.kept
        assert report.recomputed == 0

    def test_without_a_budget_a_small_solve_keeps_all_graphs_and_a_large_one_does_not(self) -> None:
        assert self.peak("rk4", 20)[1].recomputed == 0
        budget = DEFAULTS.budget // 8  # so that not so many steps are needed
        with override(budget=budget):
            assert self.peak("rk4", 15)[1].recomputed == 0
            peak, report = self.peak("rk4", 80)
        assert report.recomputed > 0
        assert peak <= budget

    def test_growth_of_steps_and_stages(self) -> None:
        state = self.BATCH * 8 * 4
        for policy, most in (("steps", 1.05), ("stages", 4.05)):
            peaks = [self.peak("rk4", steps, checkpoint=policy)[0] for steps in (30, 80)]
            assert peaks[1] - peaks[0] <= 50 * most * state

    @pytest.mark.parametrize("method", ["euler", "dopri5"])
    def test_binomial_takes_as_much_for_many_steps_as_for_few(self, method) -> None:
        state = self.BATCH * 8 * 4
        (few, _), (many, report) = (self.peak(method, steps, checkpoint="binomial") for steps in (50, 130))
        # torchdiffeq's grid of times grows, by a number a step in each of its copies.
        assert many - few <= 80 * 4 * 4 + state
        assert report.checkpoint_bytes <= 32 * state

    def test_a_budget_that_is_too_small_is_an_error_that_says_what_is_enough(self) -> None:
        for policy in POLICIES:
            least = least_budget(
                lambda budget, policy=policy: self.peak("rk4", 50, checkpoint=policy, memory_budget=budget)
            )
            with pytest.raises(ValueError, match="Use a larger one"):
                self.peak("rk4", 50, checkpoint=policy, memory_budget=least - 1)
            if policy in ("auto", "binomial"):
                assert self.peak("rk4", 50, checkpoint=policy, memory_budget=least)[0] <= least

    def test_random_number_generators_are_counted(self) -> None:
        net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        y0 = torch.randn(3, 2).requires_grad_()
        budget = 200_000

        def work(steps: int) -> None:
            torchdiffeq.odeint(
                lambda t, y: net(y), y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:euler",
                options={"step_size": 1 / steps, "memory_budget": budget},
            )[-1].sum().backward()  # fmt: skip

        work(20)
        assert 20 * 5000 < peak_bytes(lambda: work(20)) <= budget
        with pytest.raises(ValueError, match="needs at least"):
            work(100)

    @pytest.mark.parametrize("budget", [1_000_000, 2_000_000])
    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_graphs_of_another_size_than_the_first_are_counted(self, method, budget) -> None:
        field = network()
        y0 = torch.randn(self.BATCH, 8).requires_grad_()

        def layers(t, y):
            for _ in range(1 if t < 0.5 else 10):
                y = field(y)
            return y

        def work() -> None:
            y = torchdiffeq.odeint(
                layers, y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:{method}",
                options=({"step_size": 0.04} if method == "rk4" else {}) | {"memory_budget": budget},
            )  # fmt: skip
            y[-1].sum().backward()

        work()
        assert peak_bytes(work) <= budget


@callbacks_and_limits
class TestGraphsMadeAgain:
    """Steps are taken again with their graphs, where one step's graph is less than the states of all stages."""

    def outcomes(self, method: str, budget: int, of_times: bool = False, dropout: bool = False, **options) -> None:
        field = MLP(3, 16, torch.Generator().manual_seed(0))
        if dropout:
            field.register_forward_hook(lambda _, args, slope: slope * (1 + 0.01 * torch.rand_like(slope)))
        y0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        t = torch.linspace(0, 1, 7, dtype=torch.float64)
        options |= given_steps(method, 1 / 96, held=True)

        def outcome(flag: str, **keep) -> Outcome:
            torch.manual_seed(0)
            return Outcome(
                field, y0, t, of_times=of_times, method=flag + method, options=options | keep, rtol=1e6, atol=1e6
            )

        expected = outcome("")
        with symplectic_plugin.profile() as solves:
            found = errors(outcome(f"{FLAG}:", memory_budget=budget), expected)
        found.pop("t", None)  # its rounding is the reference's: see test_torchdiffeq_gradients
        assert max(found.values()) <= 1e-12, found
        (report,) = solves
        assert "stages" not in report.kept
        # Once each, where they would be evaluated twice but for the last of each step.
        assert 0 < report.recomputed <= report.evaluations

    @pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun", "dopri8"])
    @pytest.mark.parametrize("of_times", [False, True])
    def test_each_evaluation_is_made_again_once(self, method, of_times) -> None:
        self.outcomes(method, 1_200_000, of_times)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_with_random_numbers(self, method) -> None:
        self.outcomes(method, 3_000_000, dropout=True)

    def test_with_an_interpolant_that_evaluates_the_vector_field_at_the_end(self) -> None:
        self.outcomes("rk4", 1_200_000, interp="cubic")

    def test_backward_twice(self) -> None:
        field, y0 = network(3, 16), torch.randn(64, 3)
        y = torchdiffeq.odeint(
            lambda t, y: field(y), y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4",
            options={"step_size": 0.01, "memory_budget": 500_000},
        )  # fmt: skip
        first, second = (torch.autograd.grad(y.sum(), field[0].weight, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("method", ["rk4", "dopri5"])
    def test_the_memory_stays_within_the_budget(self, method) -> None:
        field, y0 = network(), torch.randn(64, 8)
        size = given_steps(method, 1 / 60, held=True)

        def work(budget: int) -> None:
            y = torchdiffeq.odeint(
                lambda t, y: field(y), y0.clone().requires_grad_(), torch.tensor([0.0, 1.0]),
                method=f"{FLAG}:{method}", rtol=1e6, atol=1e6, options={**size, "memory_budget": budget},
            )  # fmt: skip
            y[-1].sum().backward()

        least = least_budget(work)
        for factor in (2, 4, 12):
            work(int(least * factor))
            assert peak_bytes(lambda budget=int(least * factor): work(budget)) <= least * factor

    def test_a_vector_field_that_has_changed_is_noticed(self) -> None:
        field, y0, scale = network(3, 16), torch.randn(64, 3), ContextVar("scale", default=1.0)
        y = torchdiffeq.odeint(
            lambda t, y: field(y) * scale.get(), y0, torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4",
            options={"step_size": 0.01, "memory_budget": 500_000},
        )  # fmt: skip
        scale.set(1.1)
        with pytest.raises(RuntimeError, match="other values in the backward pass"):
            y.sum().backward()


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"checkpoint": "everything"}, "checkpoint must be one of 'auto', 'stages', 'steps', 'binomial'"),
            ({"memory_budget": 0}, "memory_budget must be a positive number of bytes"),
            ({"memory_budget": "1GB"}, "memory_budget must be a positive number of bytes"),
            ({"offload": "/no/such/directory"}, 'offload must be "cpu" or a directory that exists'),
        ],
    )
    def test_what_is_no_option_is_refused(self, options, complaint) -> None:
        with pytest.raises(ValueError, match=complaint):
            torchdiffeq.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), method=FLAG, options=options)


class TestDisk:
    def solve(self, directory, policy: str = "steps") -> tuple[Tensor, nn.Module]:
        field = network()
        y = torchdiffeq.odeint(
            lambda t, y: field(y), torch.randn(4, 8), torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4",
            options={"step_size": 0.05, "offload": directory, "checkpoint": policy},
        )  # fmt: skip
        return y, field

    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_directory_is_empty_again_after_the_backward_pass(self, tmp_path, policy) -> None:
        y, _ = self.solve(tmp_path, policy)
        assert os.listdir(tmp_path)
        y.sum().backward()
        del y
        assert not os.listdir(tmp_path)

    def test_and_when_the_graph_is_dropped(self, tmp_path) -> None:
        y, _ = self.solve(tmp_path)
        del y
        assert not os.listdir(tmp_path)

    def test_and_after_exceptions_in_either_pass(self, tmp_path) -> None:
        y, field = self.solve(tmp_path)
        field.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        del y
        gc.collect()
        assert not os.listdir(tmp_path)

        def fails_late(t: Tensor, y: Tensor) -> Tensor:
            return y / (t < 0.5).float() if t < 0.5 else 1 / 0

        with pytest.raises(ZeroDivisionError):
            torchdiffeq.odeint(
                fails_late, torch.ones(2, requires_grad=True), torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4",
                options={"step_size": 0.05, "offload": tmp_path},
            )  # fmt: skip
        gc.collect()
        assert not os.listdir(tmp_path)


class TestProfile:
    def test_it_counts_what_is_done(self) -> None:
        field, calls = network(), []
        field.register_forward_hook(lambda *_: calls.append(1))
        with symplectic_plugin.profile() as solves:
            for options in ({"checkpoint": "steps"}, {}):
                y = torchdiffeq.odeint(
                    lambda t, y: field(y), torch.randn(4, 8), torch.tensor([0.0, 1.0]), method=f"{FLAG}:rk4",
                    options={"step_size": 0.1, **options},
                )  # fmt: skip
                y.sum().backward()
        steps, auto = solves
        assert (steps.host, steps.method, steps.policy) == ("torchdiffeq", "rk4", "steps")
        assert (steps.accepted, steps.evaluations, steps.vjps) == (10, 40, 40)
        assert steps.recomputed == 70  # three to take the step again, four with a graph
        assert (auto.evaluations, auto.recomputed, auto.vjps) == (40, 0, 40)
        assert len(calls) == 40 + 70 + 40
        assert steps.checkpoint_bytes == 10 * 4 * 8 * 4
        assert steps.graph_bytes == 0 < auto.evaluation_bytes * 40 <= auto.graph_bytes <= auto.budget_bytes
        assert min(steps.forward_seconds, steps.backward_seconds) > 0
        lines = str(solves).splitlines()
        assert len(lines) == 3
        assert "states of 10 of 10 steps" in lines[1]
        assert solves.as_dicts()[1]["policy"] == "auto"

    def test_rejected_steps(self) -> None:
        with symplectic_plugin.profile() as solves:
            field = lambda t, y: torch.cos(30 * t) * y  # noqa: E731
            torchdiffeq.odeint(
                field, torch.ones(2, requires_grad=True), torch.tensor([0.0, 1.0]), method=FLAG, rtol=1e-5, atol=1e-5,
                options={"first_step": 0.5},
            )  # fmt: skip
        assert solves[0].rejected > 0
        assert solves[0].evaluations == 1 + 6 * (solves[0].accepted + solves[0].rejected)

    def test_solves_outside_are_not_reported(self) -> None:
        with symplectic_plugin.profile() as solves:
            pass
        torchdiffeq.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), method=FLAG)
        assert len(solves) == 0
