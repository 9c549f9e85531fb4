"""Comparisons with full backpropagation: solves and their gradients, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

EXACT = 1e-12
"""Relative error of a gradient in double precision that is rounding."""


class Outcome:
    """A solve's values and the gradients of a random linear function of them.

    Args:
        field: vector field; the parameters of a module that require gradients are differentiated.
        y0: initial state, which requires a gradient here.
        t: times, which require a gradient if `of_times`. Of solves whose times do, no graphs are kept.
        seed: of the random linear function.
        odeint: the solve, called with field, y0, t and the keywords.
        others: further tensors to differentiate with respect to.
        of_times: whether times are differentiated.
        **keywords: handed to `odeint`.
    """

    def __init__(
        self,
        field: Any,
        y0: Tensor,
        t: Tensor,
        seed: int = 0,
        odeint: Callable[..., Any] = torchdiffeq.odeint,
        others: tuple[Tensor, ...] = (),
        of_times: bool = True,
        **keywords: Any,
    ) -> None:
        y0 = y0.detach().clone().requires_grad_()
        t = t.detach().clone().requires_grad_(of_times)
        y = odeint(field, y0, t, **keywords)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y)
        named = field.named_parameters() if isinstance(field, nn.Module) else []
        inputs = {"y0": y0, **({"t": t} if of_times else {}), **{name: p for name, p in named if p.requires_grad}}
        inputs |= {f"other {i}": x for i, x in enumerate(others)}
        self.names = list(inputs)
        self.values = y.detach()
        loss = (y * weights).sum()
        loss = loss.real if loss.is_complex() else loss
        self.gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)


def error(actual: Tensor | None, expected: Tensor | None, scale: float) -> float:
    """Return the relative error of a gradient, relative to at least a hundredth of `scale`. None counts as zero."""
    actual = torch.zeros(()) if actual is None else actual
    expected = torch.zeros(()) if expected is None else expected
    difference = float((actual - expected).norm())
    return difference / max(float(expected.norm()), 0.01 * scale) if difference else 0.0


def errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """Return the relative errors of the gradients by name."""
    scale = max(float(g.norm()) for g in expected.gradients if g is not None)
    pairs = zip(expected.names, actual.gradients, expected.gradients, strict=True)
    return {name: error(ours, theirs, scale) for name, ours, theirs in pairs}


def assert_exact(
    actual: Outcome, expected: Outcome, bound: float = EXACT, of_times: float | None = None, values: float = 1e-13
) -> None:
    """Compare two solves.

    Args:
        actual, expected: the solves.
        bound: of the relative errors of gradients.
        of_times: bound of that of the times, if it is another one.
        values: bound of the solutions' errors, relative and absolute.
    """
    torch.testing.assert_close(actual.values, expected.values, rtol=values, atol=values)
    found = errors(actual, expected)
    assert found.pop("t", 0.0) <= (bound if of_times is None else of_times)
    assert max(found.values()) <= bound, found


def assert_same(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None], bound: float = EXACT) -> None:
    """Compare tensors one by one, by the relative error of each. None is the same as None alone."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert (ours - theirs).norm() <= bound * theirs.norm()


def both(work: Callable[[bool], Iterable[Tensor | None]], bound: float = EXACT) -> None:
    """Compare what `work` returns with the flag and without."""
    assert_same(work(True), work(False), bound)
