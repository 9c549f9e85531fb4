"""The plugin is found with no import in the user's code, in every order of imports, and leaves no trace when undone.

What happens at import happens once in a process, so each test runs programs in fresh interpreters.
"""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"

# A module for the programs under test, which import nothing of the plugin themselves.
CHECKS = """
import importlib.machinery, inspect, math, sys

def solvers():
    return sys.modules["torchdiffeq._impl.odeint"].SOLVERS

def registered():
    return {"symplectic_adjoint", "symplectic_adjoint:rk4", "symplectic_adjoint:dopri5"} <= set(solvers())

def unregistered():
    return not any("symplectic" in name for name in solvers())

def solves(method="symplectic_adjoint"):
    import torch, torchdiffeq
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(2, dtype=torch.float64), t, method=method)
    return abs(y[-1, 0].item() - math.exp(-1)) < 1e-6

def host_is_intact():
    adjoint = sys.modules["torchdiffeq._impl.adjoint"]
    return (
        type(adjoint.__loader__) is importlib.machinery.SourceFileLoader
        and adjoint.__spec__.loader is adjoint.__loader__
        and "def odeint_adjoint" in inspect.getsource(adjoint)
    )
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "checks.py").write_text(CHECKS)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if name not in (SWITCH, "PYTHONWARNINGS")}
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**inherited, "PYTHONPATH": str(tmp_path), **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def distribution(folder: Path, name: str, module: str, **entry_points: str) -> None:
    """Install a distribution with one module that declares solvers for torchdiffeq."""
    package = name.replace("-", "_")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{solver} = {value}" for solver, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[torchdiffeq.solvers]", *lines, ""]))
    (folder / f"{package}.py").write_text(textwrap.dedent(module))


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, torchdiffeq",
        "import torchdiffeq",
        "from torchdiffeq import odeint",
        "from torchdiffeq._impl.adjoint import odeint_adjoint",
        "from symplectic_plugin.hosts.torchdiffeq import SymplecticAdjoint",
    ],
)
def test_found_in_every_order_of_imports(run, imports):
    done = run(
        "-W",
        "error",
        "-c",
        f"{imports}\nfrom checks import *\nassert registered() and solves() and solves('symplectic_adjoint:dopri5')\n"
        "assert host_is_intact()",
    )
    assert done.stderr == ""


def test_found_by_modules_run_as_programs_and_by_spawned_processes(run, tmp_path):
    (tmp_path / "program.py").write_text(
        textwrap.dedent("""
            import multiprocessing

            from torchdiffeq import odeint  # in the child too, which imports this module anew
            import checks

            def child(queue):
                queue.put(checks.registered() and checks.solves())

            if __name__ == "__main__":
                assert checks.registered() and checks.solves()
                context = multiprocessing.get_context("spawn")
                queue = context.Queue()
                process = context.Process(target=child, args=(queue,))
                process.start()
                assert queue.get(timeout=200)
                process.join()
        """)
    )
    run("-m", "program")


def test_register_and_unregister(run):
    run(
        "-W",
        "error",
        "-c",
        """if True:
        import torchdiffeq
        from checks import *
        import symplectic_plugin, warnings
        adjoint = sys.modules["torchdiffeq._impl.adjoint"]
        assert unregistered() and symplectic_plugin.registered() == {}
        before, names = list(solvers().items()), dict(vars(adjoint))

        symplectic_plugin.register()
        assert registered() and solves()
        by = symplectic_plugin.registered()["torchdiffeq.solvers"]
        assert set(by) == solvers().keys() - dict(before).keys() > {"gl4", "kencarp5_imex", "symplectic_adjoint:gl4"}
        assert set(by.values()) == {f"symplectic-plugin {symplectic_plugin.__version__}"}
        once, patched = list(solvers().items()), dict(vars(adjoint))
        symplectic_plugin.register("torchdiffeq")
        assert list(solvers().items()) == once and dict(vars(adjoint)) == patched
        assert symplectic_plugin.registered()["torchdiffeq.solvers"] == by

        for _ in range(2):
            symplectic_plugin.unregister()
            assert list(solvers().items()) == before and dict(vars(adjoint)) == names
            assert symplectic_plugin.registered() == {}

        # what the host got since is taken up, and what the user put somewhere is the user's
        symplectic_plugin.register()
        class MyRK4(solvers()["rk4"]): pass
        solvers()["my_rk4"] = MyRK4
        solvers()["symplectic_adjoint:euler"] = MyRK4
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            symplectic_plugin.register()
        assert ["'symplectic_adjoint:euler' is not registered" in str(each.message) for each in caught] == [True]
        assert "symplectic_adjoint:my_rk4" in symplectic_plugin.registered()["torchdiffeq.solvers"]
        assert solvers()["symplectic_adjoint:euler"] is MyRK4
        symplectic_plugin.unregister("torchdiffeq")
        assert solvers() == {**dict(before), "my_rk4": MyRK4, "symplectic_adjoint:euler": MyRK4}

        for function in symplectic_plugin.register, symplectic_plugin.unregister:
            try:
                function("nonsense")
            except ValueError as error:
                assert "torchdiffeq" in str(error)
            else:
                raise AssertionError
        """,
        **{SWITCH: "0"},
    )


def test_unregistering_before_the_host_is_imported_and_reloading_it(run):
    run(
        "-W",
        "error",
        "-c",
        """if True:
        import symplectic_plugin
        symplectic_plugin.unregister()
        import torchdiffeq
        from checks import *
        import importlib
        assert unregistered()
        adjoint = sys.modules["torchdiffeq._impl.adjoint"]
        importlib.reload(adjoint)
        assert unregistered()

        symplectic_plugin.register()
        assert registered()
        importlib.reload(adjoint)
        assert registered() and solves() and host_is_intact()
        importlib.reload(sys.modules["torchdiffeq._impl.odeint"])  # not hooked; has a new table now
        assert unregistered()
        symplectic_plugin.register()
        assert registered() and solves()
        symplectic_plugin.unregister()
        assert unregistered() and adjoint.odeint_adjoint.__module__ == adjoint.__name__
        """,
    )


OTHER = """
    from torchdiffeq import odeint  # not there before torchdiffeq is complete

    class Other:
        calls = []

        @classmethod
        def variants(cls, name, solvers):
            assert name not in solvers and not any(":" in other for other in solvers)
            return {f"{name}:{other}": cls for other in solvers}

        @classmethod
        def install(cls):
            cls.calls.append("install")

        @classmethod
        def uninstall(cls):
            cls.calls.append("uninstall")
"""


def test_solvers_of_other_distributions(run, tmp_path):
    distribution(tmp_path, "other-plugin", OTHER, other="other_plugin:Other", alias="other_plugin:Other")
    distribution(tmp_path, "broken-plugin", "raise OSError('out of order')", broken="broken_plugin:Solver")
    distribution(tmp_path, "constant-plugin", "Solver = 3", constant="constant_plugin:Solver")
    distribution(
        tmp_path,
        "a-rival-plugin",
        "class Solver: pass",
        symplectic_adjoint="a_rival_plugin:Solver",  # ours
        dopri5="a_rival_plugin:Solver",  # the host's
        rival="a_rival_plugin:Solver",
    )
    distribution(tmp_path, "b-rival-plugin", "class Solver: pass", rival="b_rival_plugin:Solver")
    program = """if True:
        import torchdiffeq
        from checks import *
        import symplectic_plugin
        from other_plugin import Other
        assert registered() and solves()
        by = symplectic_plugin.registered()["torchdiffeq.solvers"]
        assert by["symplectic_adjoint"].startswith("symplectic-plugin ")
        assert by["other"] == by["other:rk4"] == by["alias"] == "other-plugin 1.0"
        assert by["rival"] == "a-rival-plugin 1.0"
        assert "broken" not in solvers() and "constant" not in solvers() and "dopri5" not in by
        assert solvers()["dopri5"].__module__ == "torchdiffeq._impl.dopri5"
        assert Other.calls == ["install"]
        symplectic_plugin.unregister()
        assert Other.calls == ["install", "uninstall"]
        assert not any(":" in name or name in ("other", "alias", "rival") for name in solvers())
        """
    for arguments in ("-W", "always"), ("-W", "error"):
        stderr = run(*arguments, "-c", program).stderr
        assert "broken-plugin 1.0: the entry point 'broken' cannot be loaded: OSError: out of order" in stderr
        assert "constant-plugin 1.0: the entry point 'constant' cannot be loaded" in stderr
        assert "a-rival-plugin 1.0: 'dopri5' is not registered, a solver of that name exists already" in stderr
        assert "and a-rival-plugin 1.0 both have a 'symplectic_adjoint'" in stderr
        assert "a-rival-plugin 1.0 and b-rival-plugin 1.0 both have a 'rival'" in stderr
        assert "other-plugin" not in stderr
        assert stderr.count("RuntimeWarning: ") == 5


def test_plugin_whose_own_module_imports_the_host(run, tmp_path):
    module = (
        "import torchdiffeq\nassert 'mine' not in torchdiffeq._impl.odeint.__globals__['SOLVERS']\nclass Mine: pass"
    )
    distribution(tmp_path, "my-plugin", module, mine="my_plugin:Mine")
    done = run(
        "-c", "from my_plugin import Mine\nfrom checks import *\nassert registered() and solvers()['mine'] is Mine"
    )
    assert done.stderr == ""


def test_the_package_is_light_and_does_not_need_torch(run):
    run(
        "-c",
        """if True:
        import sys, symplectic_plugin
        assert {name for name in sys.modules if name.startswith("symplectic_plugin")} == {"symplectic_plugin"}
        assert set(symplectic_plugin.__all__) <= set(dir(symplectic_plugin))
        symplectic_plugin.unregister()
        assert symplectic_plugin.registered() == {}
        assert not hasattr(symplectic_plugin, "nonsense")
        assert "torch" not in sys.modules

        sys.modules["torchdiffeq"] = sys.modules["torchdyn"] = None  # as if they were not installed
        for arguments in (), ("torchdiffeq",):
            try:
                symplectic_plugin.register(*arguments)
            except ImportError as error:
                assert "pip install torchdiffeq" in str(error)
            else:
                raise AssertionError
        """,
    )


def test_report_of_what_is_registered(run):
    report = run("-m", "symplectic_plugin").stdout
    assert "autoload: active" in report
    line = next(line for line in report.splitlines() if line.startswith("torchdiffeq.solvers: by symplectic-plugin "))
    assert {"symplectic_adjoint", "symplectic_adjoint:rk4"} <= set(line.split(": ", 2)[2].split(", "))

    report = run("-m", "symplectic_plugin", **{SWITCH: "0"}).stdout
    assert f"autoload: switched off by {SWITCH}=0" in report
    assert "torchdiffeq.solvers: nothing registered" in report

    without_host = (
        "import runpy, sys; sys.modules['torchdiffeq'] = None; runpy.run_module('symplectic_plugin', None, '__main__')"
    )
    assert "torchdiffeq: not installed" in run("-c", without_host).stdout


def test_import_of_torch_never_fails(run, tmp_path):
    without_hook = "import sys; sys.modules['symplectic_plugin.registration.import_hook'] = None; import torch"
    assert "symplectic-plugin could not prepare" in run("-W", "error", "-c", without_hook).stderr

    # A host with other insides than the known ones: only a warning.
    package = tmp_path / "torchdiffeq" / "_impl"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("import torchdiffeq._impl.adjoint")
    (package / "__init__.py").touch()
    (package / "adjoint.py").touch()
    program = "from symplectic_plugin.registration.autoload import autoload; autoload(); import torchdiffeq; autoload()"
    for action in "always", "error":
        stderr = run("-W", action, "-c", program).stderr
        assert "this version of torchdiffeq has no torchdiffeq._impl.odeint.SOLVERS" in stderr


def test_cost_to_programs_that_only_use_torch(run):
    program = """if True:
        import torch, time
        start = time.perf_counter()
        from symplectic_plugin.registration.autoload import autoload
        autoload()
        print(time.perf_counter() - start)
        """
    costs = []
    for _ in range(5):  # other processes can only make it slower
        done = run("-X", "importtime", "-c", program, **{SWITCH: "0"})
        costs.append(float(done.stdout))
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert {name for name in imported if name.split(".")[0] == "symplectic_plugin"} == {
            "symplectic_plugin",
            "symplectic_plugin.registration",
            "symplectic_plugin.registration.autoload",
            "symplectic_plugin.registration.import_hook",
        }
        if min(costs) < 5e-3:
            break
    assert min(costs) < 5e-3, costs


needs_torchdyn = pytest.mark.skipif(importlib.util.find_spec("torchdyn") is None, reason="torchdyn is not installed")

# The same for torchdyn, whose import takes seconds.
TORCHDYN_CHECKS = """
import inspect, math, sys
import checks

NAMES = {"symplectic_adjoint", "symplectic_adjoint:rk4", "symplectic_adjoint:dopri5", "symplectic_adjoint:alf"}

def tables():
    ode = sys.modules["torchdyn.numerics.solvers.ode"]
    return ode.SOLVER_DICT, ode.MS_SOLVER_DICT

def registered():
    solvers, shooting = tables()
    return NAMES <= set(solvers) and "symplectic_adjoint:parareal" in shooting

def unregistered():
    return not any("symplectic" in name for table in tables() for name in table)

def host():
    # all that a registration may touch
    odeint = sys.modules["torchdyn.numerics.odeint"]
    problems = sys.modules.get("torchdyn.core.problems")
    methods = [vars(problems.ODEProblem), vars(problems.MultipleShootingProblem)] if problems else []
    modules = [vars(sys.modules[name]) for name in sorted(sys.modules) if name.split(".")[0] == "torchdyn"]
    return [list(table.items()) for table in tables()], [dict(each) for each in modules + methods]

def solves(solver="symplectic_adjoint"):
    import torch
    from torchdyn.numerics import odeint
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    t_span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with sys.modules["symplectic_plugin"].profile() as seen:
        y = odeint(lambda t, x: -x, x, t_span, solver, atol=1e-8, rtol=1e-8)[1]
    y[-1].sum().backward()
    return abs(x.grad[0].item() - math.exp(-1)) < 1e-6 and len(seen) == 1

def trains():
    import torch
    from torchdyn.core import NeuralODE
    field = torch.nn.Linear(2, 2)
    model = NeuralODE(field, sensitivity="symplectic_adjoint")
    model(torch.ones(3, 2), torch.tensor([0.0, 1.0]))[1][-1].sum().backward()
    return field.weight.grad.norm() > 0
"""


@pytest.fixture
def run_torchdyn(run, tmp_path):
    (tmp_path / "torchdyn_checks.py").write_text(TORCHDYN_CHECKS)
    return run


@needs_torchdyn
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, torchdyn.core",
        "from torchdyn.core import NeuralODE",
        "from torchdyn.numerics import odeint",
        "from symplectic_plugin.hosts.torchdyn import SymplecticAdjoint",
    ],
)
def test_found_in_every_order_of_imports_of_torchdyn(run_torchdyn, imports):
    done = run_torchdyn(
        "-c",
        f"{imports}\nimport torchdyn.numerics\nfrom torchdyn_checks import *\n"
        "assert registered() and solves() and solves('symplectic_adjoint:dopri5') and trains()",
    )
    assert "symplectic" not in done.stderr


@needs_torchdyn
@pytest.mark.parametrize("order", [("torchdiffeq", "torchdyn.core"), ("torchdyn.core", "torchdiffeq")])
def test_both_hosts_in_either_order(run_torchdyn, order):
    imports = "".join(f"import {host}\n" for host in order)
    done = run_torchdyn(
        "-c",
        f"{imports}from torchdyn_checks import *\nassert registered() and solves() and trains()\n"
        "assert checks.registered() and checks.solves() and checks.host_is_intact()",
    )
    assert "symplectic" not in done.stderr


@needs_torchdyn
def test_torchdyn_is_registered_with_and_left_exactly_as_it_was(run_torchdyn):
    run_torchdyn(
        "-c",
        """if True:
        import torchdyn.core
        from torchdyn_checks import *
        import symplectic_plugin
        from torchdyn.core import NeuralODE
        assert unregistered() and symplectic_plugin.registered() == {}
        before, names = host(), set(tables()[0])

        symplectic_plugin.register("torchdyn")
        assert registered() and solves() and trains()
        by = symplectic_plugin.registered()
        assert set(by["torchdyn.solvers"]) == set(tables()[0]) - names > {"gl4", "symplectic_adjoint:gl4"}
        assert set(by["torchdyn.sensitivities"]) == {"symplectic_adjoint"}
        once = host()
        assert once != before
        symplectic_plugin.register("torchdyn")
        assert host() == once

        for _ in range(2):
            symplectic_plugin.unregister("torchdyn")
            assert unregistered() and host() == before and symplectic_plugin.registered() == {}
        try:
            trains()
        except TypeError:  # torchdyn's way to say that it does not know a sensitivity
            pass
        else:
            raise AssertionError
        symplectic_plugin.register("torchdyn")
        assert registered() and solves() and trains()
        """,
        **{SWITCH: "0"},
    )


@needs_torchdyn
def test_torchdyn_is_not_imported_for_programs_that_do_not(run):
    run(
        "-c",
        "import torch, torchdiffeq, sys, symplectic_plugin\nsymplectic_plugin.register()\n"
        "assert not any(name.split('.')[0] == 'torchdyn' for name in sys.modules)",
    )
