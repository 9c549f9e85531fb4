"""Check of a vector field for implicit methods: its derivative, one value at a point, independent rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import row_norm
from .stage_field import GraphOf, StageField


def check_derivative(field: StageField, x: Tensor) -> None:
    """Compare autograd's derivative of f with a difference quotient, for random directions in both spaces.

    Args:
        field: vector field.
        x: state to compare at, shape (B, n). Nothing is checked if f is not finite there.

    Raises:
        RuntimeError: if f returns different values at x, the slope of one batch element depends on another one's
            state, or the derivatives differ.
    """
    slope = field.value(x)
    if not bool(slope.isfinite().all()):
        return  # Newton's method reports that f is not finite
    _check_same_value(field, x, slope)
    generator = torch.Generator().manual_seed(0)
    linearized = GraphOf(field.graph, x)
    across = _random_signs(x, generator) * (0.5 + torch.rand(x.shape, generator=generator).to(x))
    if len(x) > 1:
        _check_independence(linearized, across)
    largest = x.abs().amax(-1, keepdim=True)
    along = _random_signs(x, generator) * (x.abs() + 1e-3 * torch.where(largest > 0, largest, 1))
    _check_quotients(field, x, along, across, (linearized.pull(across) * along).sum(-1))


def _check_same_value(field: StageField, x: Tensor, slope: Tensor) -> None:
    if bool((row_norm(field.value(x) - slope) > torch.finfo(x.dtype).eps ** 0.5 * row_norm(slope)).any()):
        raise RuntimeError(
            "the vector field returns another value each time that it is evaluated at one point, so an implicit "
            "method's equations have no solution: it draws random numbers (dropout in training mode) or changes itself."
        )


def _check_independence(linearized: GraphOf, across: Tensor) -> None:
    """Pull back a cotangent of every other row's slope, which must not reach the states of the rows between."""
    every_other = across.clone()
    every_other[::2] = 0
    if bool(linearized.pull(every_other)[::2].any()):
        raise RuntimeError(
            "the slopes of some batch elements depend on the states of others, as with batch norm in training mode or "
            "attention over the batch, but an implicit method solves for each element of the leading dimension by "
            'itself. If they are meant to: options={"independent_batch": False}.'
        )


def _check_quotients(field: StageField, x: Tensor, along: Tensor, across: Tensor, pulled: Tensor) -> None:
    """Compare `pulled` = <across, (df/dx) along>, shape (B,), with central difference quotients of two step sizes.

    A kink or an oscillation between the points spoils a quotient, but rarely both quotients by the same amount; a part
    of f that autograd does not see does.
    """
    eps = torch.finfo(x.dtype).eps
    offs, quotients = [], []
    for step in (eps ** (1 / 3), eps**0.5):
        ahead, behind = field.value(x + step * along), field.value(x - step * along)
        noise = 8 * eps * torch.maximum(ahead.abs(), behind.abs()).amax(-1) * across.abs().sum(-1) / step
        quotients.append((ahead - behind) / (2 * step))
        offs.append(((quotients[-1] * across).sum(-1) - pulled).abs() - noise)
    off = torch.minimum(*offs)
    apart = ((quotients[0] - quotients[1]) * across).sum(-1).abs()
    scale = torch.maximum(pulled.abs(), row_norm(quotients[0]))
    wrong = (off > 1e-2 * scale) & (apart < 0.5 * off) & off.isfinite()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise RuntimeError(
            "an implicit method needs the derivative of the vector field, and the one that autograd has is not the "
            f"field's: in random directions the field changes by {float((quotients[0] * across).sum(-1)[row]):.3g}, "
            f"its derivative says {float(pulled[row]):.3g}. It detaches what it computes from the state, or converts "
            'it to integers or numpy. If the difference is meant: options={"check_jacobian": False}.'
        )


def _random_signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
