"""Registration and exact gradients in every mode and thread in which a host can be imported.

Modules are executed once in a process, so each test runs a program in a fresh interpreter.
"""

import os
import subprocess
import sys
import textwrap

import pytest

TORCHDIFFEQ = """
def solution(y0, t, adjoint):
    import torchdiffeq
    return torchdiffeq.odeint(f, y0, t, method="symplectic_adjoint:rk4" if adjoint else "rk4")
"""
TORCHDYN = """
def solution(y0, t, adjoint):
    from torchdyn.core import ODEProblem
    vector_field = lambda t, x, args=None: f(t, x)
    sensitivity = "symplectic_adjoint" if adjoint else "autograd"
    return ODEProblem(vector_field, sensitivity=sensitivity, solver="rk4").odeint(y0, t)[1]
"""
COMPARISON = """
import torch

def f(t, x):
    return torch.tanh(x) * w

def gradients(adjoint):
    with torch.no_grad():
        solution(y0, t, adjoint)
    return torch.autograd.grad(solution(y0, t, adjoint)[-1].square().sum(), [y0, w])

w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
y0 = torch.tensor([[0.3, -0.7]], dtype=torch.float64, requires_grad=True)
t = torch.linspace(0, 1, 5, dtype=torch.float64)
for ours, theirs in zip(gradients(True), gradients(False), strict=True):
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm(), (ours, theirs)
"""
MODES = {
    "in inference mode": "import torch\nwith torch.inference_mode(): import {host}",
    "without gradients": "import torch\nwith torch.no_grad(): import {host}",
    "in a thread": """if True:
        import importlib, threading
        thread = threading.Thread(target=importlib.import_module, args=["{host}"])
        thread.start()
        thread.join()
        """,
    "in a thread in inference mode": """if True:
        import importlib, threading, torch
        thread = threading.Thread(target=torch.inference_mode()(importlib.import_module), args=["{host}"])
        thread.start()
        thread.join()
        """,
    "adapter in inference mode": "import torch\nwith torch.inference_mode(): import symplectic_plugin.hosts.{package}",
}


@pytest.mark.parametrize(
    ("host", "solution"), [("torchdiffeq", TORCHDIFFEQ), ("torchdyn.core", TORCHDYN)], ids=["torchdiffeq", "torchdyn"]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_plain_rk4(mode, host, solution, tmp_path):
    imports = textwrap.dedent(MODES[mode].format(host=host, package=host.partition(".")[0]))
    done = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{solution}\n{COMPARISON}"],
        env={name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RuntimeWarning: symplectic-plugin" not in done.stderr
