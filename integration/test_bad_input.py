"""Bad input: what happens is what the host does by itself, or a clear error. The table lists which."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE
from torchdyn.numerics import odeint

from .exactness import assert_same
from .fields import Y0, T, random
from .hosts import FLAG, SOLVERS, TORCHDIFFEQ, TORCHDYN, solve

NAN, INF = float("nan"), float("inf")


def times(*t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


Field = Callable[[Tensor, Tensor], Any]


def good(w: Tensor) -> Field:
    return lambda t, y: torch.tanh(y @ w)


def returning(change: Callable[[Tensor], Any], after: float = -INF) -> Callable[[Tensor], Field]:
    """A field with what it returns changed, from some time on."""
    return lambda w: lambda t, y: change(torch.tanh(y @ w)) if t > after else torch.tanh(y @ w)


def backward_times(factor: float) -> Callable[[Tensor], Field]:
    """A field whose backward pass alone returns what is not finite."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return cotangent * factor

    return returning(Spoilt.apply)


@dataclasses.dataclass(frozen=True)
class Bad:
    """A row of the table: an input, and who refuses it; all others do what the host does.

    Args:
        field: the vector field, made of a parameter.
        y0, t, options: of the solve.
        refused: what the flag's error, a ValueError, says; the same for all solvers, or by solver.
        solvers: which of them to try it with: some hosts go on for ever, or have no such option.
        bound: relative error of the gradients, if there are any.
    """

    field: Callable[[Tensor], Field] = good
    y0: Tensor = Y0
    t: Any = T
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    refused: str | dict[str, str] = ""
    solvers: tuple[str, ...] = SOLVERS
    bound: float = 1e-12


SHAPE = r"must return a tensor of the state's shape \(3, 2\), got "
# torchdyn itself tries again and again with a step size of nan.
FOR_EVER = {"torchdyn tsit5": "with which torchdyn goes on for ever"}
ALL_BUT_TSIT5 = (*TORCHDIFFEQ, "torchdyn rk4")

TABLE = {
    "nan from f": Bad(returning(lambda k: k * NAN), refused=FOR_EVER),
    "nan from f later on": Bad(returning(lambda k: k * NAN, after=0.5), refused=FOR_EVER),
    "infinity from f": Bad(returning(lambda k: k + INF), refused=FOR_EVER),
    "infinity from f later on": Bad(returning(lambda k: k + INF, after=0.5), refused=FOR_EVER),
    "nan from f's backward pass": Bad(backward_times(NAN)),
    "infinity from f's backward pass": Bad(backward_times(INF)),
    "nan in the initial state": Bad(y0=Y0 * NAN, refused=FOR_EVER),
    "a slope of another shape": Bad(returning(lambda k: k[:1]), refused=SHAPE + r"\(1, 2\)"),
    "a slope of another shape later on": Bad(returning(lambda k: k[:1], after=0.5), refused=SHAPE + r"\(1, 2\)"),
    "a slope without a shape": Bad(returning(lambda k: k.sum()), refused=SHAPE + r"\(\)"),
    "a slope that is no tensor": Bad(returning(lambda k: 1.0), refused=SHAPE + "float"),
    "a slope that is no tensor later on": Bad(returning(lambda k: 1.0, after=0.5), refused=SHAPE + "float"),
    "no slope": Bad(returning(lambda k: None), refused=dict.fromkeys(ALL_BUT_TSIT5, SHAPE + "NoneType")),
    "no slope later on": Bad(returning(lambda k: None, after=0.5), refused=SHAPE + "NoneType"),
    "a tuple for a tensor": Bad(returning(lambda k: (k,)), refused=dict.fromkeys(ALL_BUT_TSIT5, SHAPE + "tuple")),
    "a slope less precise than the state": Bad(returning(Tensor.float), bound=3e-6),
    "a slope less precise later on": Bad(returning(Tensor.float, after=0.5), bound=3e-6),
    "a slope more precise than the state": Bad(
        lambda w: lambda t, y: -y.double(), y0=Y0.float(), solvers=TORCHDIFFEQ, refused="return the state's dtype"
    ),
    "a complex slope": Bad(returning(lambda k: k + 0j), refused=dict.fromkeys(TORCHDIFFEQ, "return the state's dtype")),
    "an integer slope": Bad(returning(lambda k: (3 * k).long())),
    "an integer slope later on": Bad(returning(lambda k: (3 * k).long(), after=0.5)),
    "a boolean slope": Bad(returning(lambda k: k > 0), solvers=TORCHDIFFEQ, refused="booleans"),
    "a slope on another device": Bad(returning(lambda k: k.to("meta"))),
    "a slope on another device later on": Bad(returning(lambda k: k.to("meta"), after=0.5)),
    "an integer state": Bad(
        lambda w: lambda t, y: -y * w[0],
        y0=torch.tensor([10, 20]),
        refused=dict.fromkeys(ALL_BUT_TSIT5, "floating-point or complex dtype"),
    ),
    "a state of no elements": Bad(y0=Y0[:0], refused=FOR_EVER),
    "a state on another device": Bad(y0=Y0.to("meta"), solvers=("torchdiffeq rk4", *TORCHDYN)),
    "times on another device": Bad(t=T.to("meta")),
    "times that repeat": Bad(t=times(0, 0.5, 0.5, 1)),
    "the same time twice": Bad(t=times(0.5, 0.5)),
    "no times": Bad(t=times()),
    "times that turn back": Bad(t=times(0, 0.7, 0.5, 1)),
    "nan among the times": Bad(t=times(0, 0.5, NAN)),
    "integer times": Bad(t=torch.tensor([0, 1]), refused=FOR_EVER),
    "times that are no tensor": Bad(t=[0, 1]),
    "times in rows": Bad(t=T[None]),
    "one time that is no vector": Bad(t=T[0]),
    "max_num_steps": Bad(options={"max_num_steps": 2}, solvers=TORCHDIFFEQ),
    # torchdyn takes ever smaller steps.
    "underflow of the step size": Bad(
        lambda w: lambda t, y: y**2 * w[0, 0].abs(), y0=Y0.abs(), t=times(0, 9), solvers=ALL_BUT_TSIT5
    ),
    "an unknown option": Bad(options={"no_such_option": 1}, solvers=TORCHDIFFEQ),
    "a step of no size": Bad(options={"step_size": 0.0}, solvers=TORCHDIFFEQ),
    "a step backwards": Bad(options={"step_size": -0.1}, solvers=TORCHDIFFEQ),
    "a grid with a point twice": Bad(
        options={"grid_constructor": lambda f, y, t: torch.cat([t[:2], t[1:]])}, solvers=("torchdiffeq rk4",)
    ),
    "a grid that begins elsewhere": Bad(options={"grid_constructor": lambda f, y, t: t[1:]}, solvers=TORCHDIFFEQ),
}


def limited(field: Field) -> Field:
    """A field that puts an end to a solve that goes on for ever."""
    evaluations = itertools.count()

    def evaluate(t: Tensor, y: Tensor) -> Any:
        assert next(evaluations) < 10_000, "the solve goes on for ever"
        return field(t, y)

    return evaluate


def happens(solver: str, flag: bool, row: Bad) -> tuple[BaseException | None, list[str], list[Tensor | None]]:
    """The exception, or else the solution and gradients; and the warnings."""
    w = random(2, 2).requires_grad_()
    y0 = row.y0.clone().requires_grad_(row.y0.is_floating_point())
    t = row.t.clone().requires_grad_() if isinstance(row.t, Tensor) and row.t.is_floating_point() else row.t
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y = solve(solver, flag, limited(row.field(w)), y0, t, **row.options)
            inputs = [x for x in (w, y0, t) if isinstance(x, Tensor) and x.requires_grad]
            found = [y.detach(), *torch.autograd.grad((y**2).sum(), inputs, allow_unused=True)]
        except Exception as error:
            return error, [], []
    return None, [str(warning.message) for warning in caught], found


@pytest.mark.parametrize(("solver", "what"), [(s, what) for what, row in TABLE.items() for s in row.solvers])
def test_bad_input(solver, what) -> None:
    row = TABLE[what]
    actual, actual_warnings, found = happens(solver, True, row)
    refused = row.refused if isinstance(row.refused, str) else row.refused.get(solver, "")
    if refused:
        with pytest.raises(ValueError, match=f"symplectic_adjoint.*{refused}"):
            raise actual or AssertionError("not refused")
        return
    expected, expected_warnings, theirs = happens(solver, False, row)
    assert isinstance(actual, type(expected))
    if what != "a state on another device":  # which is found out a little earlier
        assert str(actual) == str(expected).replace(", requires_grad=True", "")  # of a tensor that a message prints
    assert actual_warnings == expected_warnings
    for ours, reference in zip(found, theirs, strict=True):
        ours, reference = (torch.zeros(()).double() if x is None else x for x in (ours, reference))
        assert torch.equal(ours.isnan(), reference.isnan())
        ours, reference = ours.nan_to_num(), reference.nan_to_num()
        assert (ours - reference).norm() <= row.bound * reference.norm()


class Failing(nn.Module):
    """A field that draws, normalises and has a context, and raises when told to: in f, or in f's own backward pass."""

    # Of the class, so that they are not put back in the backward pass to what they were, as the module's own are.
    evaluations_left = 10**9
    in_its_backward_pass = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)
        self.net = nn.Sequential(*layers).double()
        self.context = random(2)

    def forward(self, t, y, args=None):
        slope = torch.tanh(self.net(y) + self.context)
        Failing.evaluations_left -= 1
        if Failing.evaluations_left <= 0:
            if not Failing.in_its_backward_pass:
                raise ZeroDivisionError
            if slope.requires_grad:
                slope.register_hook(lambda g: 1 / 0)
        return slope


@pytest.mark.usefixtures("states_alone")
class TestExceptions:
    """Wherever f raises, nothing is left of the solve, and the next one is right."""

    @staticmethod
    def gradients(field: Failing, solver: str, flag: bool) -> list[Tensor]:
        torch.manual_seed(3)
        y = solve(solver, flag, field, Y0, T)
        return [y.detach(), *torch.autograd.grad((y**2).sum(), list(field.parameters()))]

    @pytest.mark.parametrize("solver", ["torchdiffeq rk4", "torchdyn rk4"])
    @pytest.mark.parametrize("evaluation", [1, 2, 7])
    @pytest.mark.parametrize("place", ["f on the way forward", "f in the backward pass", "the backward pass of f"])
    def test_leave_nothing_behind(self, solver, evaluation, place, monkeypatch) -> None:
        expected = self.gradients(Failing(), solver, flag=False)
        field, y0, other = Failing(), Y0.clone().requires_grad_(), random(2)
        statistics, context = field.net[1].running_mean, field.context
        monkeypatch.setattr(Failing, "in_its_backward_pass", place == "the backward pass of f")
        if place == "f on the way forward":
            monkeypatch.setattr(Failing, "evaluations_left", evaluation)
            with pytest.raises(ZeroDivisionError):
                solve(solver, True, field, y0, T)
        else:
            loss = solve(solver, True, field, y0, T).sum()
            field.context = other
            field.eval()
            monkeypatch.setattr(Failing, "evaluations_left", evaluation)
            generator = torch.get_rng_state()
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            del loss
            assert torch.equal(torch.get_rng_state(), generator)
            assert field.context is other
            assert not field.training
            assert field.net[1].running_mean is statistics
        assert torch.is_grad_enabled()
        assert all(x.grad is None for x in (y0, *field.parameters()))
        held = weakref.ref(y0)
        del y0
        gc.collect()
        assert held() is None
        monkeypatch.undo()
        field.context = context
        field.train()
        assert_same(self.gradients(field, solver, flag=True), expected)


class TestNamesThatDoNotExist:
    """torchdiffeq's are in test_torchdiffeq_interface.py."""

    @pytest.mark.parametrize("solver", ["no_such_solver", f"{FLAG}:no_such_solver"])
    def test_torchdyns_solvers(self, solver) -> None:
        with pytest.raises(KeyError, match=solver):
            odeint(good(random(2, 2)), Y0, T, solver=solver)
        with pytest.raises(KeyError, match=solver):
            NeuralODE(nn.Linear(2, 2).double(), solver=solver, sensitivity=FLAG)(Y0, T)

    @pytest.mark.parametrize("sensitivity", [f"{FLAG}:rk4", f"{FLAG}s"])
    def test_torchdyns_sensitivities(self, sensitivity) -> None:
        with pytest.raises(ValueError, match=r'Use sensitivity="symplectic_adjoint".*solver="rk4"'):
            NeuralODE(nn.Linear(2, 2).double(), solver="rk4", sensitivity=sensitivity)(Y0, T)
