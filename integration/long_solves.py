"""Solves of so many steps that whatever recurses from step to step runs out of stack.

Run as a program, in a process of its own: running out of stack ends the process. It prints a line before each case, so
that the last line names the case in which it ended.

    python -m integration.long_solves {torchdiffeq,torchdyn} {main,thread}
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

STEPS = {"main": 50_000, "thread": 5_000}
"""Steps of euler's method on the main stack, usually 8 MiB, and on one of `SMALL_STACK` bytes."""
SMALL_STACK = 512 * 1024


class InterruptedByFieldError(Exception):
    """Raised by f after as many evaluations as it was told."""


class Field(nn.Module):
    """A network of two layers, which raises after a number of evaluations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.evaluations_left: list[int] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.evaluations_left:
            self.evaluations_left[0] -= 1
            if self.evaluations_left[0] < 0:
                raise InterruptedByFieldError
        return self.net(y)


def solve(host: str, method: str, steps: int, field: Field, **options: Any) -> Tensor:
    """Solve for a batch of 4 from 0 to 1; outputs are at 0, 1/2 and 1."""
    y0 = torch.ones(4, 2)
    if host == "torchdiffeq":
        options = {"step_size": 1 / steps, **options}
        return torchdiffeq.odeint(
            field, y0, torch.linspace(0, 1, 3), method=f"symplectic_adjoint:{method}", options=options
        )
    from torchdyn.numerics import odeint
    from torchdyn.numerics.solvers.ode import SOLVER_DICT

    solver = SOLVER_DICT[f"symplectic_adjoint:{method}"](**options)
    t_span = torch.linspace(0, 1, steps + 1)
    # It looks through all the times to save at in every step.
    return odeint(field, y0, t_span, solver=solver, save_at=t_span[:: steps // 2])[1]


def differentiated(host: str, method: str, steps: int, **options: Any) -> None:
    field = Field()
    y = solve(host, method, steps, field, **options)
    y[-1].sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in field.parameters())
    del y


def dropped(host: str, method: str, steps: int, **options: Any) -> None:
    y = solve(host, method, steps, Field(), **options)
    assert y.requires_grad
    del y


def partly_differentiated(host: str, method: str, steps: int, **options: Any) -> None:
    y = solve(host, method, steps, Field(), **options)
    y[1].sum().backward()
    del y


def interrupted(host: str, method: str, steps: int, **options: Any) -> None:
    field = Field()
    field.evaluations_left.append(steps - 10)
    try:
        solve(host, method, steps, field, **options)
    except InterruptedByFieldError:
        return
    raise AssertionError("f did not raise")


def run(host: str, stack: str) -> None:
    """Run all cases."""
    methods: list[tuple[str, int]] = [("euler", STEPS[stack])]
    cases: list[Callable[..., None]] = [differentiated, dropped]
    if stack == "thread":
        methods.append(("rk4", 2_000))
        cases += [partly_differentiated, interrupted]
    for method, steps in methods:
        for options in ({}, {"checkpoint": "steps"}):
            for case in cases:
                if (host, stack) == ("torchdyn", "main") and options and case is differentiated:
                    continue  # takes a third of the time of all of them; the thread has less stack a step
                print(f"{steps} steps of {method}, options {options}: {case.__name__}", flush=True)
                case(host, method, steps, **options)


def main(host: str, stack: str) -> None:
    torch.set_num_threads(1)
    if host == "torchdyn":
        import torchdyn.numerics  # noqa: F401  (here, and not in the thread, whose stack its imports might not fit)
    if stack == "main":
        run(host, stack)
    else:
        threading.stack_size(SMALL_STACK)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                run(host, stack)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
