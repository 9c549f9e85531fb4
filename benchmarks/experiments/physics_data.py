"""The Korteweg-De Vries and Cahn-Hilliard equations, integrated by SciPy's Radau method.

Equations, grids and initial states are those of the data that the paper takes (Matsubara, Ishikawa, Yaguchi, Deep
Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020), as their program has them; it integrates by a scheme of
its own with the snapshots' interval as the step. Periodic, 50 points, central differences D and D², and

    KdV             du/dt = D (3 u² + D² u),         two solitons on a circle of length 10, snapshots every 0.001
    Cahn-Hilliard   du/dt = D² (u³ - u - γ D² u),    γ = 0.0005, noise on a circle of length 1, snapshots every 0.0001

Both are du/dt = G grad H(u) with the energy H kept (G = D, skew) or falling (G = D², negative).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp
from tqdm import tqdm

Array = np.ndarray[Any, Any]
POINTS = 50


def difference(order: int, width: float) -> Array:
    """D (order 1) or D² (order 2) as a matrix, central and periodic."""
    identity, spacing = np.eye(POINTS), width / POINTS
    ahead, behind = np.roll(identity, 1, axis=1), np.roll(identity, -1, axis=1)
    return (ahead - behind) / (2 * spacing) if order == 1 else (ahead - 2 * identity + behind) / spacing**2


@dataclass(frozen=True)
class Equation:
    """du/dt = G grad H(u); energies are densities summed times the spacing."""

    name: str
    width: float
    interval: float  # between snapshots
    order: int  # of the difference G
    derivative: Callable[[Array, Array], Array]  # grad H, of u and D² u
    curvature: Callable[[Array], Array]  # its derivative but for the D² part, of u
    stiffness: float  # factor of D² in grad H
    initial: Callable[[np.random.Generator], Array]
    potential: Callable[[Array], Array]  # density of H, but for the gradient part

    @property
    def structure(self) -> Array:
        """G, shape (50, 50)."""
        return difference(self.order, self.width)

    def trajectory(self, generator: np.random.Generator, snapshots: int) -> Array:
        """Shape (snapshots, 50)."""
        g, laplacian = self.structure, difference(2, self.width)
        times = np.arange(snapshots) * self.interval
        solution = solve_ivp(
            lambda _, u: g @ self.derivative(u, laplacian @ u), (0, times[-1]), self.initial(generator), t_eval=times,
            jac=lambda _, u: g @ (np.diag(self.curvature(u)) + self.stiffness * laplacian),
            method="Radau", rtol=1e-7, atol=1e-9,
        )  # fmt: skip
        if not solution.success:
            raise RuntimeError(f"{self.name}: {solution.message}")
        return solution.y.T

    def energy(self, u: Array) -> Array:
        """H of states of shape (..., 50)."""
        spacing = self.width / POINTS
        slope = (np.roll(u, -1, -1) - u) / spacing
        return (self.potential(u) - 0.5 * self.stiffness * slope**2).sum(-1) * spacing


def solitons(generator: np.random.Generator) -> Array:
    """Two of them, of different speeds; mirrored or not."""
    x, u = 10 * np.arange(POINTS) / POINTS, np.zeros(POINTS)
    first = generator.uniform(0.2, 0.3)
    for place in (first, first + generator.uniform(0.2, 0.5)):
        k = generator.uniform(0.5, 2.0)
        u += 2 * k**2 / np.cosh(k * (x - 10 * place)) ** 2
    return u[::-1].copy() if generator.integers(2) else u


EQUATIONS = {
    "kdv": Equation(
        "KdV", 10.0, 1e-3, 1, lambda u, uxx: 3 * u**2 + uxx, lambda u: 6 * u, 1.0, solitons, lambda u: u**3
    ),
    "cahn-hilliard": Equation(
        "Cahn-Hilliard", 1.0, 1e-4, 2, lambda u, uxx: u**3 - u - 5e-4 * uxx, lambda u: 3 * u**2 - 1, -5e-4,
        lambda generator: 0.1 * (generator.random(POINTS) - 0.5), lambda u: u**4 / 4 - u**2 / 2,
    ),
}  # fmt: skip


def trajectories(equation: Equation, count: int, snapshots: int, seed: int) -> Array:
    """Shape (count, snapshots, 50)."""
    generator = np.random.default_rng(seed)
    return np.stack(
        [
            equation.trajectory(generator, snapshots)
            for _ in tqdm(range(count), desc=f"{equation.name}, SciPy", leave=False)
        ]
    )
