"""Time against peak memory for every policy and for budgets from the least to more than enough, beside the others.

    python -m benchmarks.memory_dial          # half an hour on a busy core
    python -m benchmarks.memory_dial --long   # a hundred thousand steps beside a thousand, too

Each cell is one forward and one backward pass through rk4 with N steps, in a process of its own: the median of the time
that the processor worked for several of them, on one thread, in turns with backpropagation; and the peak of tensor
memory. diffrax's memory is what
its compiled program says that it needs. What is not installed is skipped, by name: `pip install diffrax`. ACA is the
reference implementation in `experiments/checkpointing.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.subprocesses import ONE_THREAD, measure

RESULTS = Path(__file__).parent / "results"
BATCH, SIZE, HIDDEN = 128, 16, 128
STEPS = (20, 200, 2000)
BUDGETS = (1.0, 1.5, 3.0, 10.0, 30.0, 1000.0)
"""In units of the least."""
REPEATS = {20: 15, 200: 7, 2000: 1}
OTHERS = {
    "backpropagation": "torchdiffeq",
    "continuous adjoint": "torchdiffeq",
    "ACA": "torchdiffeq",
    "diffrax": "diffrax",
}


def torch_problem() -> tuple[Any, Any]:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(SIZE, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, SIZE)
    )

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Any, y: Any) -> Any:
            return self.net(y)

    return Field(), torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(0))


def torch_cell(method: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torchdiffeq

    import symplectic_plugin

    from .experiments.checkpointing import odeint_checkpoint_per_step
    from .peak_memory import peak_bytes

    field, start = torch_problem()
    t = torch.tensor([0.0, 1.0])

    def backpropagation() -> None:
        end = torchdiffeq.odeint(
            field, start.clone().requires_grad_(), t, method="rk4", options={"step_size": 1 / steps}
        )[-1]
        (end**2).sum().backward()
        field.zero_grad()

    def work() -> None:
        y0 = start.clone().requires_grad_()
        if method == "ACA":
            # TorchDiffEqPack's own fails on fixed steps with the torch of today: 'NoneType' object is not iterable.
            end = odeint_checkpoint_per_step(field, y0, t, method="rk4", options={"step_size": 1 / steps})[-1]
        else:
            solve = torchdiffeq.odeint_adjoint if method == "continuous adjoint" else torchdiffeq.odeint
            name = "symplectic_adjoint:rk4" if method == "symplectic adjoint" else "rk4"
            end = solve(field, y0, t, method=name, options={"step_size": 1 / steps, **options})[-1]
        (end**2).sum().backward()
        field.zero_grad()

    return measured(work, backpropagation, REPEATS[steps], peak_bytes, symplectic_plugin.profile)


def measured(work: Any, reference: Any, repeats: int, peak_bytes: Any, profile: Any) -> dict[str, Any]:
    """Times in turns with those of the reference, so that what else the machine does meets both."""
    with profile() as solves:
        work()
    times, of_reference = [], []
    for _ in range(repeats):
        for run, taken in ((work, times), (reference, of_reference)):
            begin = time.process_time()
            run()
            taken.append(time.process_time() - begin)
    ratios = [mine / theirs for mine, theirs in zip(times, of_reference, strict=True)]
    result = {
        "seconds": statistics.median(times),
        "of_backpropagation": statistics.median(ratios),
        "peak_bytes": peak_bytes(work),
    }
    return result | ({"kept": solves[0].kept, "recomputed": solves[0].recomputed} if len(solves) else {})


def diffrax_cell(steps: int) -> dict[str, Any]:
    import diffrax
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    sizes = [(SIZE, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, SIZE)]
    weights = [
        (jax.random.normal(key, size) / size[0] ** 0.5, jnp.zeros(size[1]))
        for key, size in zip(keys, sizes, strict=False)
    ]
    start = jax.random.normal(keys[3], (BATCH, SIZE))

    def field(t: Any, y: Any, weights: Any) -> Any:
        for w, b in weights[:-1]:
            y = jnp.tanh(y @ w + b)
        return y @ weights[-1][0] + weights[-1][1]

    # diffrax has no rk4: dopri5 with constant steps.
    def loss(start: Any, weights: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Dopri5(), 0.0, 1.0, 1 / steps, start, weights, max_steps=steps + 1,
            adjoint=diffrax.RecursiveCheckpointAdjoint(),
        )  # fmt: skip
        return (solution.ys[-1] ** 2).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(start, weights).compile()
    jax.block_until_ready(gradient(start, weights))
    times = []
    for _ in range(REPEATS[steps]):
        begin = time.process_time()
        jax.block_until_ready(gradient(start, weights))
        times.append(time.process_time() - begin)
    # Its dopri5 makes six evaluations a step where rk4 makes four.
    return {"seconds": statistics.median(times) * 4 / 6, "peak_bytes": gradient.memory_analysis().temp_size_in_bytes}


def long_cell(steps: int) -> dict[str, Any]:
    import torch
    import torchdiffeq

    import symplectic_plugin

    from .peak_memory import peak_bytes

    torch.set_num_threads(1)
    w = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y0 = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def work() -> None:
        y = torchdiffeq.odeint(
            lambda t, y: torch.tanh(y @ w), y0, torch.tensor([0.0, 1.0]), method="symplectic_adjoint:euler",
            options={"step_size": 1 / steps, "checkpoint": "binomial"},
        )  # fmt: skip
        y[-1].sum().backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    with symplectic_plugin.profile() as solves:
        work()
    seconds = time.process_time() - begin
    return {
        "seconds_per_step": seconds / steps,
        "checkpoint_bytes": solves[0].checkpoint_bytes,
        "recomputed_per_step": solves[0].recomputed / steps,
        "resident_MiB_grew_by": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        # The profiler behind it keeps every allocation.
        "peak_bytes": peak_bytes(work) if steps <= 10_000 else None,
    }


def cell(*arguments: Any) -> dict[str, Any]:
    return measure("benchmarks.memory_dial", *arguments, environment=ONE_THREAD)


def least(steps: int) -> int:
    """The least budget, as the error says."""
    message = cell("symplectic adjoint", steps, {"memory_budget": 1})["error"]
    return int(message.split("needs at least ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        method, *rest = json.loads(given.cell)
        run = {"diffrax": diffrax_cell, "long": long_cell}.get(method)
        print(json.dumps(run(*rest) if run else torch_cell(method, *rest)))
        return
    rows: list[dict[str, Any]] = []
    others = [name for name, package in OTHERS.items() if importlib.util.find_spec(package)]
    for name in OTHERS.keys() - set(others):
        print(f"{name}: skipped, {OTHERS[name]} is not installed")
    with tqdm(total=len(STEPS) * (len(others) + 4 + len(BUDGETS))) as progress:
        for steps in STEPS:
            bottom = least(steps)
            cells: list[tuple[str, tuple[Any, ...], int | None]] = [
                (name, (name, steps) if name == "diffrax" else (name, steps, {}), None) for name in others
            ]
            ours = "symplectic adjoint"
            cells += [(f'"{p}"', (ours, steps, {"checkpoint": p}), None) for p in ("steps", "stages", "binomial")]
            cells.append(("default", (ours, steps, {}), None))
            for factor in BUDGETS:
                budget = int(factor * bottom)
                cells.append((f"{factor:g} x least", (ours, steps, {"memory_budget": budget}), budget))
            for name, arguments, budget in cells:
                rows.append({"steps": steps, "method": name, "budget": budget, **cell(*arguments)})
                progress.update()
    result: dict[str, Any] = {"device": platform.processor() or platform.machine(), "rows": rows}
    if given.long:
        result["long"] = {str(steps): cell("long", steps) for steps in (1000, 10_000, 100_000)}
        print(json.dumps(result["long"], indent=1))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_dial.json").write_text(json.dumps(result, indent=1) + "\n")
    table = render(rows)
    (RESULTS / "memory_dial.md").write_text(table)
    print(table)
    plot(rows)


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| N | method | budget, MiB | peak, MiB | time, ms | of backpropagation's | kept |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['steps']} | {row['method']} | | | | | {row['error'][:80]} |")
            continue
        budget = f"{row['budget'] / 2**20:.2f}" if row["budget"] else ""
        lines.append(
            f"| {row['steps']} | {row['method']} | {budget} | {row['peak_bytes'] / 2**20:.2f} | "
            f"{row['seconds'] * 1e3:.0f} | {_of_backpropagation(row, rows):.2f} | {row.get('kept', '')} |"
        )
    return "\n".join(lines) + "\n"


def _of_backpropagation(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """The time, of that of backpropagation in turns with it; of its own row's where it was measured apart."""
    reference = next((r for r in rows if r["steps"] == row["steps"] and r["method"] == "backpropagation"), row)
    return row.get("of_backpropagation", row["seconds"] / reference.get("seconds", float("nan")))


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STEPS), figsize=(4 * len(STEPS), 3.6), constrained_layout=True)
    for axis, steps in zip(axes, STEPS, strict=True):
        good = [row for row in rows if row["steps"] == steps and "error" not in row]
        dial = sorted((r["peak_bytes"] / 2**20, _of_backpropagation(r, rows)) for r in good if r["budget"])
        axis.plot(*zip(*dial, strict=True), "o-", label="the flag, by budget", zorder=3)
        for row in good:
            if not row["budget"]:
                other = row["method"] in OTHERS
                at = row["peak_bytes"] / 2**20, _of_backpropagation(row, rows)
                point = axis.plot(*at, "s" if other else "*", ms=9)
                point[0].set_label(row["method"] if other else f"the flag, {row['method']}")
        axis.set(xscale="log", yscale="log", title=f"N = {steps} steps", xlabel="peak memory, MiB")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("time, of backpropagation's")
    axes[-1].legend(fontsize=7)
    figure.savefig(RESULTS / "memory_dial.png", dpi=130)


if __name__ == "__main__":
    main()
