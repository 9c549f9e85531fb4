"""Solves of many steps run out of no stack, neither in the passes nor when their graphs are dropped."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("stack", ["main", "thread"])
@pytest.mark.parametrize("host", ["torchdiffeq", "torchdyn"])
def test_many_steps_end_with_no_crash(host, stack) -> None:
    if importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed")
    command = [sys.executable, "-m", "integration.long_solves", host, stack]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    last = (result.stdout.splitlines() or ["it did not start"])[-1]
    assert result.returncode == 0, f"exit status {result.returncode} in: {last}\n{result.stderr[-3000:]}"
    assert last == "done"
