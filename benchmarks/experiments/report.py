"""`python -m benchmarks.experiments.report`: README.md here, from the results that the other commands left behind.

The claims are checked against these results; what is true of them is computed, not written.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.experiments import paper
from benchmarks.experiments.command import RESULTS
from benchmarks.experiments.methods import (
    BACKPROPAGATION,
    COMPETITORS,
    CONTINUOUS,
    DEFAULT,
    EXACT,
    PER_STEP,
    STAGES_KEPT,
    SYMPLECTIC,
)
from benchmarks.experiments.tables import markdown

README = Path(__file__).with_name("README.md")
SAME_LOSS = 0.01  # relative difference of two losses that count as equal
OURS = {SYMPLECTIC: "in the paper's scheme", STAGES_KEPT: "with the stages kept", DEFAULT: "by default"}
Figures = dict[str, dict[str, Any]]  # of one comparison, by method

SECTIONS = {
    "memory": (
        "Memory against steps",
        "One training iteration of {components} neural ODEs (state {batch}x{state}, two hidden layers of {hidden}), "
        "N steps of {method} in all. Backpropagation keeps every evaluation's graph; a checkpoint per component halves "
        "that; a checkpoint per step keeps a state per step and the graph of one step; the symplectic adjoint a state "
        "per step and the graph of one evaluation; the continuous adjoint no state, but its own augmented system.",
    ),
    "tabular": (
        "FFJORD on tabular data",
        "Layers, stacked components M, activations, dopri5 and tolerances are FFJORD's, whose experiments the paper "
        "repeats; layers and batches are narrower (at most {width} wide, {batch} examples), and training is "
        "{iterations} iterations: the losses show that the methods agree, not how good a flow is.",
    ),
    "images": (
        "FFJORD on images",
        "{data}. {components} convolutional components on two scales, dopri5, tolerance {tolerance}, "
        "{iterations} training iterations of {batch} images.",
    ),
    "physics": (
        "Physical systems",
        "KdV and Cahn-Hilliard on grids of 50 points, integrated by SciPy's Radau method; an energy-based model with a "
        "convolutional network of {hidden} channels learns from successive snapshots ({iterations} iterations of "
        "{batch} pairs, {training_method}) and predicts a whole unseen trajectory from its first snapshot. The "
        "variance of the unseen data is {variances}. Memory, time and gradient error are those of {method} at rtol "
        "{rtol:.0e}. The last rows are of the paper that the data come from (Matsubara, Ishikawa, Yaguchi, "
        "NeurIPS 2020), with 90 trajectories, 200 channels and 10000 iterations, as `--full` has them: a shorter "
        "training has larger errors.",
    ),
    "tolerance": (
        "Tolerance and rounding",
        "A flow on {data} is trained for {iterations} iterations at each tolerance. The gradient errors in the first "
        "table are against backpropagation with the same steps and precision; in the second against float64 "
        "backpropagation with the same steps and parameters.",
    ),
    "classification": (
        "Image classification",
        "{data}, {training_images} of them used. An ODE-Net with {blocks} convolutional ODE blocks of {steps} equal "
        "steps each; batches of {batch}; epochs: {epochs}. "
        "PNODE's ratios are of its own discrete adjoint, with a larger network on CIFAR-10 and a GPU: they show what "
        "it claims, and are no measure of ours.",
    ),
}


def read(results: Path) -> dict[str, Any]:
    """Of the experiments that have been run."""
    paths = [path for name in SECTIONS for path in (results / f"{name}.json", *sorted(results.glob(f"{name}-*.json")))]
    return {path.stem: json.loads(path.read_text()) for path in paths if path.is_file()}


def split(name: str) -> tuple[str, str]:
    """An experiment, and the data that it was run on, empty for the default ones."""
    experiment, _, data = name.partition("-")
    return experiment, data


def comparisons(records: dict[str, Any]) -> Iterator[tuple[str, Figures]]:
    """Every comparison at one setting, with its name."""
    for name, figures in records.get("tabular", {"data": {}})["data"].items():
        yield name.upper(), figures["methods"]
    for name in records:
        if split(name)[0] == "images":
            yield name.replace("-", ", ", 1), records[name]["methods"]
    for figures in records.get("physics", {"systems": {}})["systems"].values():
        yield figures["name"], figures["methods"]
    for name in records:
        if split(name)[0] == "classification":
            for scheme, methods in records[name]["schemes"].items():
                yield f"{name.replace('-', ', ', 1)}, {scheme}", methods


def verdict(holds: int, of: int) -> str:
    return "**true**" if holds == of else "**not true**" if holds == 0 else f"**true in {holds} of {of}**"


def span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2g} to {high:.2g} times" if f"{low:.2g}" != f"{high:.2g}" else f"{low:.2g} times"


def memory_claim(records: dict[str, Any]) -> tuple[str, str, str]:
    others = [BACKPROPAGATION, *COMPETITORS]
    next_best, full, continuous = [], [], []
    for _, methods in comparisons(records):
        ours = methods[SYMPLECTIC]["peak_bytes"]
        next_best.append(min(methods[row]["peak_bytes"] for row in others) / ours)
        full.append(methods[BACKPROPAGATION]["peak_bytes"] / ours)
        continuous.append(methods[CONTINUOUS]["peak_bytes"] / ours)
    evidence = (
        f"The next best exact method takes {span(next_best)} the symplectic adjoint's memory, backpropagation "
        f"{span(full)}, the continuous adjoint {span(continuous)}."
    )
    return "lowest memory of the exact methods", verdict(sum(r > 1 for r in next_best), len(next_best)), evidence


def speed(methods: Figures, row: str = SYMPLECTIC) -> float:
    """Compute how many times longer than a method the continuous adjoint takes."""
    return methods[CONTINUOUS]["seconds"] / methods[row]["seconds"]


def tolerance_claim(records: dict[str, Any]) -> tuple[str, str, str]:
    adaptive = {name: methods for name, methods in comparisons(records) if not name.startswith("classification")}
    ratios = {row: {name: speed(methods, row) for name, methods in adaptive.items()} for row in OURS}
    evidence = "Time of the continuous adjoint, as a multiple of the symplectic adjoint's, " + "; ".join(
        f"{how}: {', '.join(f'{name} {ratio:.2f}' for name, ratio in ratios[row].items())}" for row, how in OURS.items()
    )
    verdicts = [
        f"{verdict(sum(ratio > 1 for ratio in ratios[row].values()), len(adaptive))} {how}" for row, how in OURS.items()
    ]
    return "faster than the continuous adjoint, at the same tolerance", ", ".join(verdicts), evidence + "."


def accuracy_claim(records: dict[str, Any]) -> tuple[str, str, str]:
    """At the loosest tolerance from which each method trains to the loss that is best over all, within SAME_LOSS."""
    points = sorted(records["tolerance"]["tolerances"], key=lambda point: point["atol"])
    losses = {row: [point["methods"][row]["test_loss_tight"] for point in points] for row in (CONTINUOUS, SYMPLECTIC)}
    best = min(map(min, losses.values()))
    chosen = {}
    for row, values in losses.items():
        good = [index for index, value in enumerate(values) if value <= best + SAME_LOSS * abs(best)]
        chosen[row] = max(good) if good else None
    if None in chosen.values():
        return "the same, at equal loss", "**open**", "A method reaches that loss at no tolerance."
    seconds = {row: points[index]["methods"][row]["seconds"] for row, index in chosen.items()}
    evidence = (
        f"Loosest atol whose test loss is within {SAME_LOSS:.0%} of the best: "
        + ", ".join(f"{points[index]['atol']:.0e} for the {row}" for row, index in chosen.items())
        + f"; there the continuous adjoint takes {seconds[CONTINUOUS] / seconds[SYMPLECTIC]:.2f} times as long."
    )
    is_faster = seconds[CONTINUOUS] > seconds[SYMPLECTIC]
    return "faster than the continuous adjoint, at equal loss", verdict(is_faster, 1), evidence


def robustness_claim(records: dict[str, Any]) -> tuple[str, str, str]:
    """Of the loss at the tolerance of training; with a tight solver it is given too."""
    points = sorted(records["tolerance"]["tolerances"], key=lambda point: point["atol"])
    loosest = points[-1]["atol"]

    def worst(row: str, key: str) -> float:
        tight = points[0]["methods"][BACKPROPAGATION][key]
        return max(point["methods"][row][key] / tight - 1 for point in points)

    def shown(row: str, key: str) -> str:
        value = worst(row, key)
        return f"{value:+.1%}" if value < 9 else "diverged"

    degrades, stays = worst(CONTINUOUS, "test_loss") > SAME_LOSS, worst(SYMPLECTIC, "test_loss") <= SAME_LOSS
    errors = [point["methods"][CONTINUOUS]["gradient_error_float64"] for point in points]
    exact = max(point["methods"][SYMPLECTIC]["gradient_error_float64"] for point in points)
    evidence = (
        f"Largest test loss up to atol {loosest:.0e}, above backpropagation's at the tightest, with the solver of "
        f"training: continuous adjoint {shown(CONTINUOUS, 'test_loss')}, symplectic adjoint "
        f"{shown(SYMPLECTIC, 'test_loss')}; with a tight solver {shown(CONTINUOUS, 'test_loss_tight')} and "
        f"{shown(SYMPLECTIC, 'test_loss_tight')}. Gradient error in float64 from the tightest tolerance to the "
        f"loosest: continuous adjoint {errors[0]:.0e} to {errors[-1]:.0e}, symplectic adjoint at most {exact:.0e}."
    )
    return (
        "robust to a loose tolerance, where the continuous adjoint's loss degrades",
        "**true**" if degrades and stays else "**the second half is not true**" if stays else "**not true**",
        evidence,
    )


def speedups(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Compute how many times longer others take than the symplectic adjoint, by PNODE's name for them and by scheme.

    With the stages kept, as PNODE keeps them. The best other reverse-accurate method is the faster of the two that make
    checkpoints.
    """
    schemes = record["schemes"]
    exact = {
        scheme: min(methods[row]["seconds"] for row in COMPETITORS) / methods[STAGES_KEPT]["seconds"]
        for scheme, methods in schemes.items()
    }
    vanilla, best = paper.PNODE_SPEEDUP
    return {vanilla: {scheme: speed(methods, STAGES_KEPT) for scheme, methods in schemes.items()}, best: exact}


def pnode_claim(records: dict[str, Any]) -> tuple[str, str, str]:
    schemes = records["classification"]["schemes"]
    continuous, exact = speedups(records["classification"]).values()
    accuracy = max(abs(m[STAGES_KEPT]["accuracy"] - m[BACKPROPAGATION]["accuracy"]) for m in schemes.values())
    evidence = (
        "The symplectic adjoint with the stages kept is faster than the vanilla neural ODE (continuous adjoint, the "
        "same fixed steps) by: "
        + ", ".join(f"{scheme} {ratio:.2f}" for scheme, ratio in continuous.items())
        + "; than the faster of the two checkpointing methods by: "
        + ", ".join(f"{scheme} {ratio:.2f}" for scheme, ratio in exact.items())
        + "; by default than the continuous adjoint by: "
        + ", ".join(f"{scheme} {speed(methods, DEFAULT):.2f}" for scheme, methods in schemes.items())
        + f". Accuracy differs from backpropagation's by at most {accuracy:.1%}."
    )
    holds = sum(ratio > 1 for ratio in continuous.values())
    return (
        "faster than the vanilla neural ODE, PNODE says “up to two times”, with its scheme",
        verdict(holds, len(continuous)),
        evidence,
    )


def beside_ours(name: str, record: dict[str, Any]) -> list[str]:
    """Lines of Markdown, below the section's table, with the papers' own figures."""
    if name == "physics":
        label = f"HNN++, dopri5, 2020 ({paper.THEIRS})"
        systems = [figures["name"] for figures in record["systems"].values()]
        return [f"| {key} | {label} | | {paper.HNN_ENERGY_MSE[key]:.3g} | | | | | |" for key in systems]
    if name == "classification":
        ratios = speedups(record)
        rows = [
            (other, f"{min(here.values()):.2f} to {max(here.values()):.2f}", f"up to {paper.PNODE_SPEEDUP[other]:.2g}")
            for other, here in ratios.items()
        ]
        return ["", markdown(["slower than it, by", f"{STAGES_KEPT}, here", f"PNODE ({paper.THEIRS})"], rows)]
    return []


def rounding_claim(records: dict[str, Any]) -> tuple[str, str, str]:
    points = records["tolerance"]["rounding"]
    better = [point["gradient_error"][SYMPLECTIC] <= point["gradient_error"][BACKPROPAGATION] for point in points]
    evidence = []
    for precision in dict.fromkeys(point["precision"] for point in points):
        last = [point for point in points if point["precision"] == precision][-1]
        errors = last["gradient_error"]
        evidence.append(
            f"{precision}, {last['steps']} steps: {SYMPLECTIC} {errors[SYMPLECTIC]:.1e}, {BACKPROPAGATION} "
            f"{errors[BACKPROPAGATION]:.1e}, {PER_STEP} {errors[PER_STEP]:.1e}, {CONTINUOUS} {errors[CONTINUOUS]:.1e}"
        )
    return (
        "rounding: no larger gradient error than backpropagation in low precision",
        verdict(sum(better), len(better)),
        "; ".join(evidence) + ".",
    )


def settings(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Collect the settings of a record that a section's text names."""
    if name == "tabular":
        parts = record["data"].values()
        return {key: max(part[key] for part in parts) for key in ("width", "batch", "iterations")}
    if name == "physics":
        parts = list(record["systems"].values())
        variances = ", ".join(f"{part['name']} {part['variance_of_test_data']:.3g}" for part in parts)
        return {**parts[0], "variances": variances}
    return record


def page(records: dict[str, Any], results: Path) -> str:
    devices = sorted({record["device"] for record in records.values()})
    sizes = sorted({record["size"] for record in records.values()})
    claims = [memory_claim(records), tolerance_claim(records)]
    if "tolerance" in records:
        claims += [accuracy_claim(records), robustness_claim(records), rounding_claim(records)]
    if "classification" in records:
        claims.append(pnode_claim(records))
    minutes = sum(record["seconds_in_all"] for record in records.values()) / 60
    relative = os.path.relpath(results, README.parent)
    exact = max(methods[row]["gradient_error_float64"] for _, methods in comparisons(records) for row in EXACT)
    median = statistics.median(speed(methods) for _, methods in comparisons(records))
    lines = [
        "# The papers' experiments",
        "",
        "Matsubara, Miyatake, Yaguchi, *Symplectic Adjoint Method for Exact Gradient of Neural ODE with Minimal "
        "Memory*, NeurIPS 2021 (arXiv 2102.09750); Zhang, Zhao, *A Memory-Efficient Neural Ordinary Differential "
        "Equation Framework Based on High-Level Adjoint Differentiation* (PNODE), IEEE TAI 2022 (arXiv 2206.01298). "
        "Every system runs with torchdiffeq and the flag; each command prints the table and writes it with a picture "
        "and all figures to `benchmarks/results/experiments/`:",
        "",
        "```",
        *(f"python -m benchmarks.experiments.{name}" for name in SECTIONS),
        "python -m benchmarks.experiments.report          # this page, from their results",
        "```",
        "",
        "`--quick` is a check of seconds, `--full` the full size, whose settings have [these sources]"
        "(#settings-and-their-sources) (for a GPU: `--device cuda`, not measured yet), `--seed`, `--output` and "
        "`--data DIRECTORY` (the MAF repository's tables, MNIST's or Fashion-MNIST's IDX files; Debian's package "
        "`dataset-fashion-mnist` is found by itself) do what they say; `--images` takes other images, whose results "
        "get a name of their own. "
        "`pip install 'symplectic-plugin[experiments]'` installs what the commands need.",
        "",
        f"Below: size {', '.join(sizes)}, {', '.join(devices)} of a shared machine, {minutes:.0f} minutes in all. "
        "Memory is counted exactly; times are medians of iterations taken in turns, and only their ratios mean "
        f"something. Where the data are stand-ins it says so. “{paper.THEIRS}” marks the papers' own figures, of full "
        "data and sizes on their hardware: errors of the energy are comparable with ours at `--full`, ratios of times "
        "roughly. Only figures that could be checked against a source are quoted; the NLL, MiB and seconds of each "
        "method in the papers' tables could not be, and are left out. The columns “the paper's” hold the orders that "
        "Matsubara et al.'s Table 1 gives, for N steps of s stages, L layers and M components (Ñ steps backward), an "
        "evaluation and a backward pass through it counted as one each. “Symplectic adjoint” is their scheme "
        '(`checkpoint="steps"`), “stages kept” PNODE\'s (`checkpoint="stages"`), “default” what the flag alone does: '
        "it keeps graphs too as far as 32 MiB go, in each component.",
        "",
        "## The claims, as they came out",
        "",
        markdown(["claim", "here", "figures"], claims),
        "",
        f"Over all comparisons, the largest gradient error of an exact method in float64 is {exact:.0e}, and the "
        f"median time of the continuous adjoint is {median:.2f} times the symplectic adjoint's.",
    ]  # fmt: skip
    for experiment, (title, text) in SECTIONS.items():
        if experiment not in records:
            lines += ["", f"## {title}", "", "Not run yet."]
        for name, record in records.items():
            if split(name)[0] != experiment:
                continue
            heading = ": ".join(filter(None, (title, split(name)[1])))
            lines += [
                "", f"## {heading}", "", text.format(**settings(experiment, record)), "",
                f"![{heading}]({relative}/{name}.png)", "", (results / f"{name}.md").read_text().rstrip(),
                *beside_ours(experiment, record),
            ]  # fmt: skip
    lines += ["", "## Settings and their sources", "", markdown(["settings", "source"], paper.SOURCES)]
    return "\n".join(lines) + "\n"


def main() -> None:
    README.write_text(page(read(RESULTS), RESULTS))
    print(README)


if __name__ == "__main__":
    main()
