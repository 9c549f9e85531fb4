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
from benchmarks.speed.passes import TorchPass
from benchmarks.speed.per_step import per_step
from benchmarks.speed.problems import PROBLEMS, SOLVERS

LONG = 2.0
"""Seconds of bare calls from which the first round is one of the rounds; a shorter one warms up."""
EVALUATIONS = 80
"""What a solve takes about."""
SAMPLE = 8
"""Evaluations of which the bare calls' time is drawn beside long ones."""


def measure(
    problem: str, solver: str, name: str, device: str = "cpu", repetitions: int = 5, seconds: float = 6.0
) -> dict[str, Any]:
    """The figures of a cell.

    Args:
        repetitions: rounds after the one that warms up, at least; of short passes there are as many as take a second.
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
    first = {"backpropagation": backpropagation.run(count=True), "method": row.run(count=True)}
    result = {**_evaluations(first["method"].evaluations), **_errors(problem, solver, name, row, backpropagation)}
    # Beside a long pass a sample of the bare calls is exact enough, and beside a short one all of them are.
    forward = (first["backpropagation"].evaluations or (0,))[0]
    sample = min(forward, SAMPLE) if is_long else forward
    bare.calls = Calls(kept=sample)
    passes = {"bare": bare, "backpropagation": backpropagation, "method": row}
    rounds = [{**first, "bare": bare.run()}] if is_long else []
    processor = wall = 0.0
    begin = time.perf_counter()
    while not rounds or (
        time.perf_counter() - began < seconds
        and (len(rounds) < repetitions or time.perf_counter() - begin < repetitions / 5)
    ):
        timings = {}
        # There and back, so that what grows slower in the meantime does so for all of them.
        for key in reversed(passes) if len(rounds) % 2 else passes:
            before = time.process_time(), time.perf_counter()
            timings[key] = passes[key].run()
            if key == "method":
                processor += time.process_time() - before[0]
                wall += time.perf_counter() - before[1]
        rounds.append(timings)
    if wall:
        result["cores_used"] = round(processor / wall, 2)

    def median(figure: Any) -> float:
        return statistics.median(figure(timings) for timings in rounds)

    scale = forward / sample
    result |= {
        "repetitions": len(rounds),
        "seconds": median(lambda r: r["method"].total),
        "forward_seconds": median(lambda r: r["method"].forward),
        "backward_seconds": median(lambda r: r["method"].total - r["method"].forward),
        "bare_seconds": median(lambda r: r["bare"].total * scale),
        "backpropagation_seconds": median(lambda r: r["backpropagation"].total),
        "ratio_to_bare": median(lambda r: r["method"].total / (r["bare"].total * scale)),
        "ratio_to_backpropagation": median(lambda r: r["method"].total / r["backpropagation"].total),
    }
    backpropagation.gradients = ()
    gc.collect()
    result["peak_bytes"] = row.peak_bytes()
    return result | ({"note": row.note} if row.note else {})


def _evaluations(counted: Any) -> dict[str, Any]:
    forward, backward = counted
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
