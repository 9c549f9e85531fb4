"""The implicit methods as plain methods of torchdiffeq's."""

from __future__ import annotations

import math

import pytest
import torch
import torchdiffeq

from .hosts import IMPLICIT_ADAPTIVE, IMPLICIT_FIXED, REGISTRY


class Stiff(torch.nn.Module):
    """dx/dt = rate (x - cos t) - sin t, whose solution from 1 is cos t (Prothero, Robinson 1974)."""

    def __init__(self, rate: float = -1e4) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(rate, dtype=torch.float64))
        self.accepted = self.rejected = 0

    def stiff(self, t, x):
        return self.rate.to(x.dtype) * (x - torch.cos(t))

    def nonstiff(self, t, x):
        return -torch.sin(t) + 0 * x

    def forward(self, t, x):
        return self.stiff(t, x) + self.nonstiff(t, x)

    def callback_accept_step(self, t, x, dt):
        self.accepted += 1

    def callback_reject_step(self, t, x, dt):
        self.rejected += 1


TIMES = torch.linspace(0, 2, 9, dtype=torch.float64)
ONE = torch.ones(3, 2, dtype=torch.float64)


@pytest.mark.parametrize("name", IMPLICIT_FIXED)
@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_stiffness_does_not_bound_the_steps_of_fixed_grids(name: str, interp: str) -> None:
    options = {"step_size": 0.05, "interp": interp}
    with torch.no_grad():
        x = torchdiffeq.odeint(Stiff(), ONE, TIMES, method=name, options=options)
    assert (x - torch.cos(TIMES)[:, None, None]).abs().max() < (3e-2 if name == "implicit_euler" else 1e-3)


@pytest.mark.parametrize("name", IMPLICIT_ADAPTIVE)
@pytest.mark.parametrize(("rtol", "sign"), [(1e-3, -1), (1e-5, 1)])
def test_adaptive_steps_meet_the_tolerance_in_few_steps(name: str, rtol: float, sign: int) -> None:
    field = Stiff(-1e4 * sign)
    with torch.no_grad():
        x = torchdiffeq.odeint(field, ONE, sign * TIMES, method=name, rtol=rtol, atol=rtol)
    assert (x - torch.cos(TIMES)[:, None, None]).abs().max() < 40 * rtol
    assert field.accepted < 20 * rtol ** (-1 / 3)


@pytest.mark.parametrize("name", ["kencarp3", "kencarp5_imex", "radauIIA5"])
def test_float32_complex_and_tuples(name: str) -> None:
    options = {} if name.startswith("kencarp") else {"step_size": 0.05}
    times = TIMES.float()

    class Pair(Stiff):
        def stiff(self, t, xs):
            return tuple(-100 * (x - torch.cos(t)) for x in xs)

        def nonstiff(self, t, xs):
            return tuple(-torch.sin(t) + 0 * x for x in xs)

        def forward(self, t, xs):
            return tuple(a + b for a, b in zip(self.stiff(t, xs), self.nonstiff(t, xs), strict=True))

    with torch.no_grad():
        solve = {"method": name, "rtol": 1e-4, "atol": 1e-4, "options": options}
        x = torchdiffeq.odeint(Stiff(-100.0), ONE.float(), times, **solve)
        z = torchdiffeq.odeint(Stiff(-100.0), ONE.to(torch.complex128), TIMES, **solve)
        pair = torchdiffeq.odeint(Pair(), (ONE, ONE[0, 0]), TIMES, **solve)
    assert x.dtype == torch.float32
    for each in (x, z.real, *pair):
        assert (each - torch.cos(TIMES).view(-1, *[1] * (each.ndim - 1))).abs().max() < 2e-3


@pytest.mark.parametrize("name", ["kencarp3", "kencarp5"])
def test_dense_output_is_as_accurate_as_it_is_said_to_be(name: str) -> None:
    def field(t, x):
        return torch.stack([x[..., 1], -x[..., 0]], -1)

    y0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    errors = []
    for h in (0.2, 0.1):
        solver = REGISTRY[name](
            func=_WithCallbacks(field),
            y0=y0,
            rtol=1.0,
            atol=1.0,
            norm=torch.linalg.vector_norm,
            first_step=h,
            max_step=h,
        )
        t = torch.linspace(0, h, 11, dtype=torch.float64)
        errors.append(float((solver.integrate(t)[:, 0] - torch.sin(t)).abs().max()))
    order = {"kencarp3": 3, "kencarp5": 4}[name]
    assert math.log2(errors[0] / errors[1]) > order + 0.6


class _WithCallbacks:
    def __init__(self, field) -> None:
        self.field = field

    def __call__(self, t, x, perturb=None):
        return self.field(t, x)

    def __getattr__(self, name):
        return lambda *args: None


def test_a_jump_is_stepped_to_and_events_are_found() -> None:
    def field(t, x):
        return torch.where(t < 1, -1e3 * (x - 1), -1e3 * (x - 2))

    x0 = torch.zeros(1, dtype=torch.float64)
    t = torch.tensor([0, 0.9, 1.1, 2], dtype=torch.float64)
    options = {"jump_t": torch.tensor([1.0], dtype=torch.float64)}
    x = torchdiffeq.odeint(field, x0, t, method="kencarp5", options=options)
    torch.testing.assert_close(x[1:, 0], torch.tensor([1.0, 2, 2], dtype=torch.float64), rtol=1e-6, atol=0)
    event_t, _ = torchdiffeq.odeint_event(
        lambda t, x: -x, 1 + x0, t[0], event_fn=lambda t, x: x[0] - 0.5, method="kencarp5"
    )
    assert float(event_t) == pytest.approx(math.log(2), abs=1e-6)


def test_a_step_that_newton_can_not_take_is_made_smaller() -> None:
    field = Stiff()
    blowing_up = field.forward
    field.forward = lambda t, x: blowing_up(t, x) + torch.where((x - torch.cos(t)).abs() > 0.1, float("nan"), 0.0)
    with torch.no_grad():
        x = torchdiffeq.odeint(field, ONE, TIMES, method="kencarp3", rtol=1e-2, options={"first_step": 1.9})
    assert field.rejected > 0
    assert (x - torch.cos(TIMES)[:, None, None]).abs().max() < 1e-2


def test_a_step_that_newton_can_not_take_raises_where_it_is_given_or_can_not_be_smaller() -> None:
    def field(t, x):
        return torch.log(x - 2) * 1e3

    for name in ("implicit_euler", "gl4", "kencarp3"):
        options = {"first_step": 0.5} if name == "kencarp3" else {}
        with pytest.raises(RuntimeError, match=f"{name}: Newton's method did not solve the step from t = 0"):
            torchdiffeq.odeint(field, ONE, TIMES, method=name, options=options)


def test_there_is_no_silent_gradient() -> None:
    field = Stiff()
    x = torchdiffeq.odeint(field, ONE, TIMES, method="implicit_euler")
    assert x.requires_grad
    with pytest.raises(RuntimeError, match="symplectic_adjoint:implicit_euler"):
        x.sum().backward()
    assert not torchdiffeq.odeint(lambda t, x: -x, ONE, TIMES, method="implicit_euler").requires_grad


def test_a_field_without_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"func\.stiff"):
        torchdiffeq.odeint(lambda t, x: -x, ONE, TIMES, method="kencarp3_imex")

    class Wrong(Stiff):
        def nonstiff(self, t, x):
            return x

        def forward(self, t, x):
            return self.stiff(t, x)

    with pytest.raises(ValueError, match="not the sum"):
        torchdiffeq.odeint(Wrong(), ONE, TIMES, method="kencarp3_imex")


def test_states_of_one_batch_that_are_not_independent() -> None:
    def field(t, x):
        return -100 * (x - x.mean(0))

    x0 = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="independent_batch"):
        torchdiffeq.odeint(field, x0, TIMES, method="sdirk2")
    x = torchdiffeq.odeint(field, x0, TIMES, method="sdirk2", options={"independent_batch": False})
    torch.testing.assert_close(x[-1], torch.ones_like(x0), rtol=1e-3, atol=0)
