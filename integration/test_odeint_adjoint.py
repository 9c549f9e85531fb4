"""By the flag, odeint_adjoint leaves the gradients that torchdiffeq's own does, and odeint those that its own does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from .fields import Y0, T, mlp
from .hosts import FLAG, KEPT, given_steps, keeping

every_method = pytest.mark.parametrize("method", ["dopri5", "rk4"])
both_functions = pytest.mark.parametrize("odeint", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint])
every_kept = pytest.mark.parametrize("what", KEPT)


class WithUnused(nn.Module):
    """A field with a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t, y)


def gradient_and_calls(odeint: Callable[..., Any], name: str, t: Tensor = T) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradient of the parameter that is not used, and what hooks on it were called with."""
    field, calls, y0 = WithUnused(), [], Y0.clone().requires_grad_()
    field.unused.register_hook(calls.append)
    field.unused.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad))
    y = odeint(field, y0, t, method=name, options=given_steps(name.rpartition(":")[2]))
    y.sum().backward()
    return field.unused.grad, calls


@every_kept
@every_method
@both_functions
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_parameter_that_f_does_not_use(odeint, method, outputs, what) -> None:
    with keeping(what):
        gradient, calls = gradient_and_calls(odeint, f"{FLAG}:{method}", T[:outputs])
    if odeint is torchdiffeq.odeint:
        assert gradient is None
        assert calls == []
    else:
        assert torch.equal(gradient, torch.zeros(3, dtype=torch.float64))
        assert len(calls) == 2
        assert not any(call.any() for call in calls)
    theirs, their_calls = gradient_and_calls(odeint, method, T[:outputs])
    assert (gradient is None) == (theirs is None)
    assert len(calls) == len(their_calls)


@every_kept
@every_method
def test_the_event_time_of_odeint_adjoint_has_a_gradient_of_zeros(method, what) -> None:
    found = []
    for flag in ("", f"{FLAG}:"):
        field, y0, t = mlp(), Y0[0].clone().requires_grad_(), T[:2].clone().requires_grad_()
        level = float(y0[0].detach()) + 1e-2
        with keeping(what):
            event_t, y = torchdiffeq.odeint_adjoint(
                lambda t, y, field=field: field(t, y) + 2, y0, t, event_fn=lambda t, y, level=level: y[0] - level,
                method=flag + method, options=given_steps(method, 0.05), adjoint_params=tuple(field.parameters()),
            )  # fmt: skip
        assert event_t.requires_grad
        event_t.backward()
        assert y.requires_grad
        found.append([event_t.detach(), *(x.grad for x in (y0, field.w1, field.w2, field.unused))])
    torch.testing.assert_close(found[1][0], found[0][0])
    for ours, theirs in zip(found[1][1:], found[0][1:], strict=True):
        assert torch.equal(theirs, torch.zeros_like(theirs))
        assert torch.equal(ours, theirs)


@every_kept
@every_method
@both_functions
def test_one_time_alone(odeint, method, what) -> None:
    found = []
    for flag in ("", f"{FLAG}:"):
        field, y0, t = mlp(), Y0.clone().requires_grad_(), T[:1].clone().requires_grad_()
        with keeping(what):
            y = odeint(field, y0, t, method=flag + method, options=given_steps(method))
        y.sum().backward()
        found.append([x.grad for x in (y0, t, *field.parameters())])
        assert torch.equal(y[0], y0)
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
