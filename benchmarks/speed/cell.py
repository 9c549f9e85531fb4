"""One cell of the table, in the process that this module is run as: a method on a problem with a solver.

Machines are noisy: the bare calls and torchdiffeq's backpropagation run in turns with the method, in the same process,
and the ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.experiments.measure import relative_error
from benchmarks.speed.bare import BareCalls, Calls
from benchmarks.speed.methods import BACKPROPAGATION, ITSELF, METHODS, reference_pass
from benchmarks.speed.passes import Pass, Timing, TorchPass
from benchmarks.speed.per_step import per_step
from benchmarks.speed.problems import PROBLEMS, SOLVERS

LONG = 2.0
"""Seconds of bare calls from which the first round is one of the rounds; a shorter one warms up."""
LEAST = 2.0
"""Seconds of rounds of short passes, for five repetitions."""
EVALUATIONS = 80
"""About as many evaluations as a solve takes."""
SAMPLE = 8
"""Evaluations of which the bare calls' time is drawn beside long ones."""

Round = dict[str, list[Timing]]


def measure(
    problem: str, solver: str, name: str, device: str = "cpu", repetitions: int = 5, seconds: float = 6.0
) -> dict[str, Any]:
    """The figures of a cell.

    Args:
        repetitions: rounds after the one that warms up, at least; more of short passes.
        seconds: after which no further round begins.
    """
    where, method = torch.device(device), METHODS[name]
    if where.type == "cpu":
        torch.set_num_threads(1)
    for package in method.packages:
        importlib.import_module(package)
    field, y0 = PROBLEMS[problem].build(where)
    row = method.build(field, y0, SOLVERS[solver])
    backpropagation = METHODS[BACKPROPAGATION].build(*PROBLEMS[problem].build(where), SOLVERS[solver])

    bare = BareCalls(*PROBLEMS[problem].build(where), Calls(kept=SAMPLE))
    is_long = min(bare.run().total for _ in range(2)) / SAMPLE * EVALUATIONS > LONG
    if is_long and isinstance(row, TorchPass):  # what is imported at first use does not count
        for each in (name, BACKPROPAGATION):
            METHODS[each].build(*PROBLEMS["tiny"].build(where), SOLVERS[solver]).run()
    began = time.perf_counter()
    passes = {"bare": bare, "backpropagation": backpropagation, "method": row}
    # Beside a long pass a sample of the bare calls, before and after it, is enough; beside a short one all are made.
    order = ("bare", "backpropagation", "bare", "method", "bare") if is_long else tuple(passes)
    first = _round(passes, order, count=True)
    forward = (first["backpropagation"][0].evaluations or (0,))[0]
    result = {**_evaluations(first["method"][0]), **_errors(problem, solver, name, row, backpropagation)}
    if not is_long:
        bare.calls = Calls(kept=forward)
    rounds = [first] if is_long else []
    begin = time.perf_counter()
    while not rounds or (
        time.perf_counter() - began < seconds
        and (len(rounds) < repetitions or time.perf_counter() - begin < LEAST * repetitions / 5)
    ):
        # There and back, so that what grows slower in the meantime does so for all of them.
        rounds.append(_round(passes, order[::-1] if len(rounds) % 2 else order))

    scale = {"bare": forward / bare.calls.kept}

    def median(of: str, beside: str = "", figure: str = "total") -> float:
        def mean(timings: Round, key: str) -> float:
            return statistics.mean(getattr(timing, figure) for timing in timings[key]) * scale.get(key, 1)

        return statistics.median(mean(each, of) / (mean(each, beside) if beside else 1) for each in rounds)

    result |= {
        "repetitions": len(rounds),
        "seconds": median("method"),
        "forward_seconds": median("method", figure="forward"),
        "backward_seconds": statistics.median(t.total - t.forward for each in rounds for t in each["method"]),
        "bare_seconds": median("bare"),
        "backpropagation_seconds": median("backpropagation"),
        "ratio_to_bare": median("method", "bare"),
        "ratio_to_backpropagation": median("method", "backpropagation"),
        # Of time on the processor, which other work on the machine does not take part in.
        "processor_ratio_to_bare": median("method", "bare", "processor"),
        "processor_ratio_to_backpropagation": median("method", "backpropagation", "processor"),
        "cores_used": median("method", figure="processor") / median("method"),
    }
    backpropagation.gradients = ()
    gc.collect()
    result["peak_bytes"] = row.peak_bytes()
    return result | ({"note": row.note} if row.note else {})


def _round(passes: dict[str, Pass], order: tuple[str, ...], *, count: bool = False) -> Round:
    timings: Round = {key: [] for key in passes}
    for key in order:
        timings[key].append(passes[key].run(count=count))
    return timings


def _evaluations(timing: Timing) -> dict[str, Any]:
    forward, backward = timing.evaluations or (None, None)
    return {"evaluations_forward": forward, "evaluations_backward": backward}


def _errors(problem: str, solver: str, name: str, row: Any, backpropagation: Any) -> dict[str, Any]:
    """Of the gradient: from that of the same discrete solution, and from torchdiffeq's."""
    method = METHODS[name]
    reference = method.reference[solver]
    if not reference:
        return {"exact": None, "reference": None}
    gradient, host = row.gradient(), backpropagation.gradient()
    result = {
        "exact": method.exact,
        "reference": reference,
        "difference_from_torchdiffeq": relative_error(gradient, host),
    }
    if reference == ITSELF:
        return result
    own = reference_pass(method, *PROBLEMS[problem].build(backpropagation.y0.device), SOLVERS[solver])
    if own is not None:
        own.run()
    return {**result, "gradient_error": relative_error(gradient, host if own is None else own.gradient())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", required=True)
    section, *arguments = json.loads(parser.parse_args().cell)
    print("\n" + json.dumps({"methods": measure, "steps": per_step}[section](*arguments)))


if __name__ == "__main__":
    main()
