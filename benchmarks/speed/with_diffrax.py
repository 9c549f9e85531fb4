"""diffrax: the same network, compiled; memory is what the compiled program says that it needs beside its results."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.experiments.methods import Solver
from benchmarks.speed.passes import Pass, Timing
from benchmarks.speed.problems import FIRST_STEP, STEPS, Field


class ThreeEighths(diffrax.AbstractERK):
    """The 3/8 rule, which torchdiffeq calls rk4 and diffrax does not have, without an error estimate."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        c=np.array([1 / 3, 2 / 3, 1]),
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1]), np.array([1.0, -1, 1])),
        b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
        b_error=np.zeros(4),
    )
    interpolation_cls: ClassVar[Any] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k  # not asked for anything

    def order(self, terms: Any) -> int:
        return 4


class DiffraxPass(Pass):
    """Its forward pass is timed alone; its total time is that of the compiled gradient, which includes it."""

    def __init__(self, field: Field, y0: Tensor, solver: Solver, adjoint: str) -> None:
        jax.config.update("jax_enable_x64", True)
        if y0.device.type == "cuda" and jax.default_backend() != "gpu":
            raise RuntimeError("jax has no GPU here")
        layers = [layer for layer in field.net if isinstance(layer, nn.Linear)]
        weights = [(_array(layer.weight), _array(layer.bias)) for layer in layers]
        self.given = _array(y0), weights

        def f(t: Any, y: Any, weights: Any) -> Any:
            for w, b in weights[:-1]:
                y = jnp.tanh(y @ w.T + b)
            return 2 * (y @ weights[-1][0].T + weights[-1][1])

        if solver.method == "rk4":
            method, control, size, steps = ThreeEighths(), diffrax.ConstantStepSize(), 1 / STEPS, STEPS + 1
        else:
            control = diffrax.PIDController(rtol=solver.rtol, atol=solver.atol)
            method, size, steps = diffrax.Dopri5(), FIRST_STEP, 4096

        def loss(y: Any, weights: Any) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(f), method, 0.0, 1.0, size, y, weights, stepsize_controller=control, max_steps=steps,
                adjoint=getattr(diffrax, adjoint)(),
            )  # fmt: skip
            return (solution.ys[-1] ** 2).sum(), solution.stats["num_steps"]

        self.loss = jax.jit(loss).lower(*self.given).compile()
        self.derivative = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*self.given).compile()
        taken = int(self.loss(*self.given)[1])
        # The last of dopri5's stages is the first of the next step.
        self.evaluations = 4 * taken if solver.method == "rk4" else 6 * taken + 1
        self.gradients: Any = None
        self.note = "compiled; memory as the compiler accounts for it; evaluations of the forward pass, by its steps"

    def run(self, *, count: bool = False) -> Timing:
        begin = time.perf_counter()
        jax.block_until_ready(self.loss(*self.given))
        middle, processor = time.perf_counter(), time.process_time()
        self.gradients, _ = jax.block_until_ready(self.derivative(*self.given))
        total, processor = time.perf_counter() - middle, time.process_time() - processor
        # What is compiled apart may take longer alone than as a part.
        return Timing(min(middle - begin, total), total, processor, (self.evaluations, None) if count else None)

    def gradient(self) -> Tensor:
        parts = [np.asarray(part).ravel() for part in jax.tree_util.tree_leaves(self.gradients)]
        return torch.from_numpy(np.concatenate(parts))

    def peak_bytes(self) -> int:
        return int(self.derivative.memory_analysis().temp_size_in_bytes)


def _array(tensor: Tensor) -> Any:
    return jnp.asarray(tensor.detach().cpu().numpy())
