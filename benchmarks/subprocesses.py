"""A measurement in a process of its own: nothing that ran before it is in its memory or in its caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# jax reads its own when it is imported: one thread of Eigen's, and one in the pool of its client.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "NPROC": "1",
}


def measure(module: str, *arguments: Any, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `python -m module --cell ARGUMENTS`: return the last thing printed, or {"error": last line of the error}.

    The arguments go there, and the result comes back, as JSON.
    """
    command = [sys.executable, "-m", module, "--cell", json.dumps(arguments)]
    given = {**os.environ, **(environment or {})}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(run.stdout.splitlines()[-1])
