"""The figures as tables in Markdown and as pictures."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.experiments.tables import error, markdown, megabytes, milliseconds
from benchmarks.speed.methods import METHODS
from benchmarks.speed.per_step import STEPS
from benchmarks.speed.problems import PROBLEMS, SOLVERS

COLUMNS = (
    "method", "time", "of backpropagation's", "on the processor", "of bare calls'", "forward", "backward",
    "evaluations", "peak memory", "gradient error",
)  # fmt: skip
Record = dict[str, Any]


def tables(record: Record) -> str:
    """All of them, with what was skipped and what to know of the rest below each."""
    parts = [f"{record['device']}, float64; {_versions(record)}."]
    parts.append("Ratios are of times in the same process, in turns; on the processor: of processor time, likewise.")
    for problem, solver, rows in _groups(record["cells"]):
        parts.append(f"## {problem}: {PROBLEMS[problem]}; {solver}")
        parts.append(markdown(COLUMNS, [_row(row) for row in rows if "skipped" not in row]))
        remarks = [f"- {row['method']}: {row['note']}" for row in rows if "note" in row]
        remarks += [f"- {row['method']}: skipped, {row['skipped']}" for row in rows if "skipped" in row]
        parts.append("\n".join(remarks))
    if record["per_step"]:
        parts += ["## Time per step: rk4, forward and backward, state 4x2, 1 hidden layer of 8", _per_step(record)]
        parts.append(f"The second figure: of the time per step with {STEPS[0]} steps and one output, in turns with it.")
    return "\n\n".join(part for part in parts if part)


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)


def _groups(cells: list[Record]) -> list[tuple[str, str, list[Record]]]:
    """By problem and solver, in the order in which they are defined."""
    order = list(METHODS)
    groups = []
    for problem in PROBLEMS:
        for solver in SOLVERS:
            rows = [cell for cell in cells if (cell["problem"], cell["solver"]) == (problem, solver)]
            if rows:
                groups.append((problem, solver, sorted(rows, key=lambda row: order.index(row["method"]))))
    return groups


def _row(row: Record) -> list[str]:
    forward, backward = row["evaluations_forward"], row["evaluations_backward"]
    return [
        row["method"],
        milliseconds(row["seconds"]),
        f"{row['ratio_to_backpropagation']:.2f}",
        f"{row['processor_ratio_to_backpropagation']:.2f}",
        f"{row['ratio_to_bare']:.2f}",
        milliseconds(row["forward_seconds"]),
        milliseconds(row["backward_seconds"]),
        str(forward) if backward is None else f"{forward} + {backward}",
        megabytes(row["peak_bytes"]),
        error(row["gradient_error"]) if "gradient_error" in row else "own steps" if row["reference"] else "",
    ]


def _per_step(record: Record) -> str:
    found = {(row["policy"], row["steps"], row["outputs"]): row for row in record["per_step"] if "error" not in row}
    sizes = sorted({(steps, outputs) for _, steps, outputs in found}, key=lambda size: (size[1], size[0]))
    policies = list(dict.fromkeys(policy for policy, _, _ in found))

    def cell(key: tuple[str, int, int]) -> str:
        row = found.get(key)
        return f"{row['seconds_per_step'] * 1e6:.0f} µs, {row['ratio_to_shortest']:.2f}" if row else ""

    columns = ["steps", "outputs", *policies]
    return markdown(columns, [[*size, *(cell((policy, *size)) for policy in policies)] for size in sizes])


def times_figure(record: Record) -> Figure:
    """Time as a multiple of backpropagation's, for every method."""
    groups = _groups([cell for cell in record["cells"] if "skipped" not in cell])
    figure = Figure(figsize=(10, 3.6 * max(1, (len(groups) + 1) // 2)), layout="constrained")
    for axis, (problem, solver, rows) in zip(_axes(figure, len(groups)), groups, strict=False):
        names = [row["method"] for row in reversed(rows)]
        forward, total = ([row[key] for row in reversed(rows)] for key in ("forward_seconds", "seconds"))
        ratios = [row["ratio_to_backpropagation"] for row in reversed(rows)]
        # The split of the median pass, on the scale of the ratios.
        inner = [ratio * min(1.0, a / b) for ratio, a, b in zip(ratios, forward, total, strict=True)]
        axis.barh(names, ratios, color=[_colour(name) for name in names], alpha=0.5)
        axis.barh(names, inner, color=[_colour(name) for name in names])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{problem}, {solver}", fontsize=9)
        axis.set_xlabel("time, of backpropagation's (dark: forward pass)", fontsize=8)
        axis.tick_params(labelsize=6)
    return figure


def memory_figure(record: Record) -> Figure:
    """Time against peak memory."""
    groups = _groups([cell for cell in record["cells"] if "skipped" not in cell])
    figure = Figure(figsize=(10, 0.5 + 2.8 * max(1, (len(groups) + 1) // 2)), layout="constrained")
    for axis, (problem, solver, rows) in zip(_axes(figure, len(groups)), groups, strict=False):
        for row in rows:
            point = max(row["peak_bytes"], 1) / 2**20, row["ratio_to_backpropagation"]
            axis.plot(*point, "*" if row["method"].startswith("ours") else "o", color=_colour(row["method"]))
            axis.annotate(row["method"], point, fontsize=4.5, xytext=(3, 2), textcoords="offset points")
        axis.set(xscale="log", yscale="log", xlabel="peak memory, MiB", ylabel="time, of backpropagation's")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.25)
        axis.set_title(f"{problem}, {solver}", fontsize=9)
        axis.tick_params(labelsize=6, which="both")
        axis.grid(alpha=0.3, which="both")
    return figure


def per_step_figure(record: Record) -> Figure:
    """Time per step against the number of steps and that of outputs."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rows = [row for row in record["per_step"] if "error" not in row]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        for axis, key, kept in ((axes[0], "steps", lambda r: r["outputs"] == 1), (axes[1], "outputs", _has_outputs)):
            points = sorted(
                (row[key], row["ratio_to_shortest"]) for row in rows if row["policy"] == policy and kept(row)
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=policy)
    axes[0].set(
        xscale="log", xlabel="steps, one output", ylabel=f"time per step, of that with {STEPS[0]} steps", ylim=(0, None)
    )
    axes[1].set(xscale="log", xlabel="outputs, the same number of steps")
    if rows:
        axes[0].legend(fontsize=7, frameon=False)
    return figure


def _has_outputs(row: Record) -> bool:
    return row["outputs"] > 1


def _axes(figure: Figure, count: int) -> list[Any]:
    return list(figure.subplots((count + 1) // 2, 2, squeeze=False).flat) if count else []


def _colour(name: str) -> str:
    hosts = {
        "bare": "grey",
        "ours": "tab:red",
        "torchdiffeq": "tab:blue",
        "torchdyn": "tab:green",
        "diffrax": "tab:purple",
    }
    return next((colour for host, colour in hosts.items() if name.startswith(host)), "tab:orange")
