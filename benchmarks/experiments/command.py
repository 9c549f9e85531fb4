"""The options that every experiment's command line has: sizes, device, seed, and where the results go."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from matplotlib.figure import Figure

from benchmarks.devices import device_name

RESULTS = Path(__file__).resolve().parents[1] / "results" / "experiments"
QUICK, REDUCED, FULL = SIZES = ("quick", "reduced", "full")


@dataclass
class Run:
    """One run of an experiment."""

    name: str
    size: str
    device: torch.device
    seed: int
    output: Path
    arguments: argparse.Namespace
    began: float

    def show(self, text: str) -> None:
        print(text, flush=True)

    def of(self, data: str | None, default: str) -> str:
        """The name of the data to use; the results of others than the default ones get names of their own."""
        if data not in (None, default):
            self.name += f"-{data}"
        return data or default

    def with_arguments(self, size: Any, *options: str) -> Any:
        """A size's settings, but for those of these options that were given."""
        given = {option: getattr(self.arguments, option) for option in options}
        return replace(size, **{option: value for option, value in given.items() if value is not None})

    def draw(self, figure: Figure, suffix: str = "") -> None:
        """Save a picture."""
        figure.savefig(self.output / f"{self.name}{suffix}.png", dpi=110)

    def save(self, figures: dict[str, Any], table: str) -> None:
        """Save the results as JSON, the table as Markdown, and print it."""
        record = {
            "experiment": self.name,
            "size": self.size,
            "seed": self.seed,
            "device": device_name(self.device),
            "torch": torch.__version__,
            "torchdiffeq": torchdiffeq.__version__,
            "seconds_in_all": round(time.perf_counter() - self.began, 1),
            **figures,
        }
        (self.output / f"{self.name}.json").write_text(json.dumps(record, indent=2) + "\n")
        (self.output / f"{self.name}.md").write_text(table + "\n")
        self.show(f"\n{table}\n\n{record['seconds_in_all']} s on {record['device']}; results in {self.output}")


def begin(name: str, description: str | None, **options: dict[str, Any]) -> Run:
    """Read the command line; `options` are the experiment's own, by name without dashes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const=QUICK, help="a check that it runs: seconds")
    size.add_argument("--full", dest="size", action="store_const", const=FULL, help="full size: a GPU, and hours")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a directory (default: %(default)s)")
    for option, settings in options.items():
        parser.add_argument(f"--{option}", **settings)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        # The layers are small: a second thread gains little, and where other work shares the cores, threads that wait
        # for each other at every layer lose far more.
        torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    size_name = arguments.size or REDUCED
    return Run(name, size_name, device, arguments.seed, arguments.output, arguments, time.perf_counter())
