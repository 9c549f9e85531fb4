"""The sweep by itself: made-up methods, without a host."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from symplectic_plugin import ButcherTableau
from symplectic_plugin.adjoint.sweep import sweep
from symplectic_plugin.field.cotangents import CotangentSums
from symplectic_plugin.field.report import SolveReport
from symplectic_plugin.field.vector_field import VectorField
from symplectic_plugin.record.store import Checkpoints
from symplectic_plugin.record.kept import Kept
from symplectic_plugin.record.step_graph import StepGraph
from symplectic_plugin.record.trajectory import DenseOutput, Step, Trajectory

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

    def sweep(self, cotangent: torch.Tensor, keep: list[str]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The gradient, with this kept of each step: its state, its stages, its graph, or nothing."""
        starts = [sum(self.sizes[:n]) for n in range(len(self.sizes))]
        steps = [Step(t, t + h, h, False, {}) for t, h in zip(starts, self.sizes, strict=True)]
        c = self.tableau.c
        checkpoints = Checkpoints("auto")
        trajectory = Trajectory(
            self.tableau,
            False,
            [{}] * self.tableau.stages,
            ThroughTheEnd(self.tableau.b),
            lambda steps: torch.stack([step.t0 + c * step.h for step in steps]),
            lambda f, step, x, _: (self.step(f, step.t0, step.h, x), None),
            checkpoints,
            steps=steps,
            outputs=self.places,
        )
        field = VectorField(self.field, torch.device("cpu"), SolveReport())
        field.discover(torch.zeros((), dtype=torch.float64), self.x0, {})
        x = self.x0
        for n, (step, what) in enumerate(zip(steps, keep, strict=False)):
            graph = StepGraph(field, self.tableau, x, step.h, None)
            states: list[torch.Tensor] = []

            def evaluate(t, x, graph=graph, states=states):
                states.append(x)
                return graph.evaluate(torch.as_tensor(t), x, {})

            end = self.step(evaluate, step.t0, step.h, x)
            trajectory.kept.append(
                Kept(
                    trajectory.kept[-1] if n else None,
                    x,
                    None,
                    states[1:] if what == "stages" else None,
                    graph if what == "graph" else None,
                    n,
                    end,
                )
            )
            checkpoints.add(trajectory.kept[-1])
            if what == "nothing" and n:
                trajectory.kept[-1].state = None
            x = end
        sums = CotangentSums(field.dependencies, [True] * len(field.dependencies), field.stand_ins)
        with torch.no_grad():
            initial, _ = sweep(trajectory, field, sums, cotangent, False)
        by_id = {id(d): total for d, total in zip(field.dependencies, sums.results(), strict=True)}
        return initial, [by_id[id(self.w1)], by_id[id(self.w2)]]


problems = st.builds(Problem, tableaux(), st.integers(0, 2**31), st.integers(1, 6))
keeps = st.lists(st.sampled_from(["state", "stages", "graph", "nothing"]), min_size=6, max_size=6)


@given(problems, keeps, st.integers(0, 2**31))
def test_it_gives_the_gradient_of_the_numerical_solution_whatever_is_kept(problem, keep, seed) -> None:
    x0 = problem.x0.clone().requires_grad_()
    outputs = problem.solve(x0)
    cotangent = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.autograd.grad(outputs, (x0, problem.w1, problem.w2), cotangent, allow_unused=True)
    initial, parameters = problem.sweep(cotangent, keep)
    scale = max(float(e.norm()) for e in expected if e is not None)
    for ours, theirs in zip((initial, *parameters), expected, strict=True):
        ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
        assert (ours - theirs).norm() <= 1e-12 * max(float(theirs.norm()), 0.01 * scale)


@given(problems, keeps, st.integers(0, 2**31))
def test_it_conserves_the_product_of_adjoint_and_variation(problem, keep, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    delta, adjoint = (torch.randn(SIZE, dtype=torch.float64, generator=random) for _ in range(2))
    outputs, delta_at_outputs = torch.autograd.functional.jvp(problem.solve, problem.x0, delta)
    cotangent = torch.zeros_like(outputs)
    cotangent[-1] = adjoint
    initial, _ = problem.sweep(cotangent, keep)
    scale = adjoint.norm() * delta_at_outputs[-1].norm() + initial.norm() * delta.norm()
    assert abs(initial @ delta - adjoint @ delta_at_outputs[-1]) <= 1e-13 * scale


def test_a_stage_that_no_other_uses_leaves_nothing_undefined() -> None:
    a = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0.7, 0, 0]], dtype=torch.float64)
    problem = Problem(ButcherTableau(a, torch.tensor([0.5, 0.0, 0.5]), a.sum(1)), seed=0, n_steps=3)
    cotangent = torch.ones(len(problem.places) + 1, SIZE, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        initial, parameters = problem.sweep(cotangent, ["state"] * 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert initial.isfinite().all()
    assert all(total is not None and total.isfinite().all() for total in parameters)
