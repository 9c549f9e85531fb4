"""Implicit methods that autograd can go through, by dense algebra: what the flag's gradients are compared with.

All slopes of a step, of all batch elements and parts, are one dense system G(K) = 0. It is solved by Newton's method
without a graph; then one correction K - M^{-1} G(K) with the constant matrix M = dG/dK, which leaves the value alone,
has the derivatives that the implicit function theorem says that the solution has. Everything else is torchdiffeq's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchdiffeq._impl.misc import Perturb
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from symplectic_plugin.hosts.torchdiffeq.implicit import SOLVERS, AdaptiveImplicit, stiff_and_nonstiff
from symplectic_plugin.methods.implicit_tableaux import METHODS


def slopes_of_step(
    method: Any, functions: list[Any], x: Tensor, t0: Tensor, dt: Tensor, t1: Tensor, keywords: Any, first: Any = None
) -> Tensor:
    """The slopes of a step, shape (parts, stages, *state), with their history."""
    tableaux = [method.tableau] + ([] if method.nonstiff is None else [method.nonstiff])
    s, c = method.tableau.stages, method.tableau.c.tolist()
    dt = torch.as_tensor(dt, dtype=x.dtype)  # a number, up to an event
    times = [t1 if c_i == 1 else t0 + c_i * dt for c_i in c]

    def equations(slopes: Tensor, x: Tensor, dt: Tensor, times: Any, first: Any) -> Tensor:
        rows = []
        for i in range(s):
            stage = x + dt * sum((p.a[i] @ k.flatten(1)).view(x.shape) for p, k in zip(tableaux, slopes, strict=True))
            rows.append([f(times[i], stage, **keywords[i]) for f in functions])
        wanted = torch.stack([torch.stack(part) for part in zip(*rows, strict=True)])
        if first is not None:
            wanted = torch.cat([first[None, None], wanted[:, 1:]], 1)
        return slopes - wanted

    constants = (x.detach(), dt.detach(), [t.detach() for t in times], None if first is None else first.detach())
    slopes = torch.zeros(len(functions), s, *x.shape, dtype=x.dtype)

    def matrix(slopes: Tensor) -> Tensor:
        found = torch.autograd.functional.jacobian(lambda k: equations(k, *constants), slopes, vectorize=True)
        return found.reshape(slopes.numel(), slopes.numel())

    with torch.no_grad():
        for _ in range(30):
            step = torch.linalg.solve(matrix(slopes), equations(slopes, *constants).flatten()).view_as(slopes)
            slopes = slopes - step
            if step.norm() <= 1e-14 * slopes.norm():
                break
    factors = matrix(slopes)
    return slopes - torch.linalg.solve(factors, equations(slopes, x, dt, times, first).flatten()).view_as(slopes)


class _Reference:
    method: Any
    func: Any

    def functions(self) -> list[Any]:
        return [self.func] if self.method.nonstiff is None else list(stiff_and_nonstiff(self.func, self.method.name))


class FixedReference(_Reference, FixedGridODESolver):
    def _step_func(self, func, t0, dt, t1, y0):
        keywords = [
            {"perturb": {0: Perturb.NEXT, 1: Perturb.PREV}.get(c, Perturb.NONE) if self.perturb else Perturb.NONE}
            for c in self.method.tableau.c.tolist()
        ]
        slopes = slopes_of_step(self.method, [func], y0, t0, dt, t1, keywords)[0]
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        return dt * torch.einsum("i,i...->...", self.method.tableau.b, slopes), f0


class AdaptiveReference(_Reference, RKAdaptiveStepsizeODESolver):
    _ends = AdaptiveImplicit._ends

    def _before_integrate(self, t: Tensor) -> None:
        if self.method.nonstiff is not None:
            self.step_t = t[1:]
        super()._before_integrate(t)

    def _adaptive_step(self, rk_state: Any) -> Any:
        t0, t1, dt = self._ends(rk_state)
        func, first = self.func, rk_state.f1
        keywords = [{"perturb": Perturb.PREV if c == 1 else Perturb.NONE} for c in self.method.tableau.c.tolist()]
        if self.method.nonstiff is not None:
            first = None
            if bool((self.jump_t == t0).any()):
                keywords[0] = {"perturb": Perturb.NEXT}
        slopes = slopes_of_step(self.method, self.functions(), rk_state.y1, t0, dt, t1, keywords, first).sum(0)
        handed_out = iter(slopes[1:])

        class Known:
            def __call__(self, t, y, *, perturb=Perturb.NONE):
                return func(t, y, perturb=perturb) if perturb is Perturb.NEXT else next(handed_out)

            def __getattr__(self, name):
                return getattr(func, name)

        self.func = Known()
        try:
            return super()._adaptive_step(rk_state._replace(f1=slopes[0]))
        finally:
            self.func = func


def references() -> dict[str, type]:
    """The solver classes by the names of the methods that they are references for."""
    found = {}
    for name, method in METHODS.items():
        family = FixedReference if method.embedded is None else AdaptiveReference
        members = {
            key: getattr(SOLVERS[name], key) for key in ("tableau", "mid", "order") if hasattr(SOLVERS[name], key)
        }
        found[name] = type(f"Reference_{name}", (family,), {**members, "method": method})
    return found
