"""The sweep by itself: made-up methods, without a host."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from symplectic_plugin import ButcherTableau
from symplectic_plugin.adjoint.step_back import Cotangents
from symplectic_plugin.adjoint.sweep import sweep
from symplectic_plugin.field.cotangents import CotangentSums
from symplectic_plugin.field.report import SolveReport
from symplectic_plugin.field.vector_field import VectorField
from symplectic_plugin.record import defaults
from symplectic_plugin.record.budget import Demand
from symplectic_plugin.record.method import DenseOutput, Method, Step
from symplectic_plugin.record.recorder import Plan, Recorder
from symplectic_plugin.record.store import CheckpointStore

from .strategies import tableaux

SIZE = 3


class ThroughTheEnd(DenseOutput):
    """Outputs on the straight line between a step's ends."""

    def __init__(self, b: torch.Tensor) -> None:
        self.b = b

    def weights(self, theta: torch.Tensor) -> torch.Tensor:
        return theta[:, None] * self.b


class Problem:
    """A random nonlinear field, an initial state, steps of random sizes, and outputs at random places in them."""

    def __init__(self, tableau: ButcherTableau, seed: int, n_steps: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.tableau = tableau
        self.w1 = torch.randn(5, SIZE + 1, dtype=torch.float64, generator=random).requires_grad_()
        self.w2 = torch.randn(SIZE, 5, dtype=torch.float64, generator=random).requires_grad_()
        self.x0 = torch.randn(SIZE, dtype=torch.float64, generator=random)
        self.sizes = (0.05 + 0.3 * torch.rand(n_steps, dtype=torch.float64, generator=random)).tolist()
        self.places = [(n, float(torch.rand((), dtype=torch.float64, generator=random))) for n in range(n_steps)]
        self.places.append((n_steps - 1, 1.0))

    def field(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.w2 @ torch.tanh(self.w1 @ torch.cat([x, t.reshape(1)]))

    def step(self, f, t: float, h: float, x: torch.Tensor) -> torch.Tensor:
        slopes: list[torch.Tensor] = []
        for i in range(self.tableau.stages):
            stage = x + h * sum((self.tableau.a[i, j] * slopes[j] for j in range(i)), torch.zeros(SIZE))
            slopes.append(f(t + self.tableau.c[i] * h, stage))
        return x + h * sum(b * k for b, k in zip(self.tableau.b, slopes, strict=True))

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs, the initial state first."""
        outputs, t = [x], 0.0
        for n, h in enumerate(self.sizes):
            end = self.step(self.field, t, h, x)
            outputs += [x + theta * (end - x) for m, theta in self.places if m == n]
            x, t = end, t + h
        return torch.stack(outputs)

    def sweep(self, cotangent: torch.Tensor, policy: str) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Sweep over the solve as a recorder keeps it under a policy."""
        c, stages = self.tableau.c, self.tableau.stages
        method = Method(
            self.tableau,
            lambda steps: torch.stack([step.t0 + c * step.h for step in steps]),
            lambda f, step, x, _: (self.step(f, step.t0, step.h, x), None),
            ThroughTheEnd(self.tableau.b),
            [{}] * stages,
        )
        field = VectorField(self.field, torch.device("cpu"), SolveReport())
        plan = Plan(self.x0, lambda _: Demand(self.x0, stages, False, len(self.places), None, 0, stages))
        with defaults.override(live_graphs=False, snapshots=3):
            recorder = Recorder(field, CheckpointStore(policy), method, plan)
            x, t = self.x0, 0.0
            for h in self.sizes:
                step = Step(t, t + h, h)
                recorder.begin_step(x, None, h)
                moved, _ = recorder.take_step(step, method.stage_times([step])[0], x)
                recorder.end_step(step, x, None)
                x, t = x + moved, t + h
            trajectory = recorder.finish(x, self.places)
            sums = CotangentSums(field.dependencies, [True] * len(field.dependencies), field.stand_ins)
            with torch.no_grad():
                swept = sweep(trajectory, field, sums, Cotangents(cotangent), want_times=False)
        by_id = {id(d): total for d, total in zip(field.dependencies, sums.results(), strict=True)}
        return swept.initial, [by_id[id(self.w1)], by_id[id(self.w2)]]


problems = st.builds(Problem, tableaux(), st.integers(0, 2**31), st.integers(1, 12))
policies = st.sampled_from(["auto", "stages", "steps", "binomial"])


@given(problems, policies, st.integers(0, 2**31))
def test_it_gives_the_gradient_of_the_numerical_solution_whatever_is_kept(problem, policy, seed) -> None:
    x0 = problem.x0.clone().requires_grad_()
    outputs = problem.solve(x0)
    cotangent = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.autograd.grad(outputs, (x0, problem.w1, problem.w2), cotangent, allow_unused=True)
    initial, parameters = problem.sweep(cotangent, policy)
    scale = max(float(e.norm()) for e in expected if e is not None)
    for ours, theirs in zip((initial, *parameters), expected, strict=True):
        ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
        assert (ours - theirs).norm() <= 1e-12 * max(float(theirs.norm()), 0.01 * scale)


@given(problems, policies, st.integers(0, 2**31))
def test_it_conserves_the_product_of_adjoint_and_variation(problem, policy, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    delta, adjoint = (torch.randn(SIZE, dtype=torch.float64, generator=random) for _ in range(2))
    outputs, delta_at_outputs = torch.autograd.functional.jvp(problem.solve, problem.x0, delta)
    cotangent = torch.zeros_like(outputs)
    cotangent[-1] = adjoint
    initial, _ = problem.sweep(cotangent, policy)
    scale = adjoint.norm() * delta_at_outputs[-1].norm() + initial.norm() * delta.norm()
    assert abs(initial @ delta - adjoint @ delta_at_outputs[-1]) <= 1e-13 * scale


def test_a_stage_that_no_other_uses_leaves_nothing_undefined() -> None:
    a = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0.7, 0, 0]], dtype=torch.float64)
    problem = Problem(ButcherTableau(a, torch.tensor([0.5, 0.0, 0.5]), a.sum(1)), seed=0, n_steps=3)
    cotangent = torch.ones(len(problem.places) + 1, SIZE, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        initial, parameters = problem.sweep(cotangent, "steps")
    finally:
        torch.use_deterministic_algorithms(False)
    assert initial.isfinite().all()
    assert all(total is not None and total.isfinite().all() for total in parameters)
