"""Report of ``python -m symplectic_plugin``: installed versions, autoload, and the names registered with each host."""

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from symplectic_plugin.registration.import_hook import is_active
from symplectic_plugin.registration.registry import HOSTS, registered

_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def main() -> None:
    """Import torch and the hosts as a program would, and print the report."""
    print(f"Python {platform.python_version()}")
    for distribution in ("symplectic-plugin", "torch", "torchdiffeq", "torchdyn"):
        print(f"{distribution} {_version(distribution)}")
    failed = {name: failure for name in ("torch", *HOSTS) if (failure := _import_failure(name)) is not None}
    print(f"autoload: {_autoload()}")
    for host, groups in HOSTS.items():
        if host in failed:
            print(f"{host}: {failed[host]}")
            continue
        for group in groups:
            _print_group(group.name)


def _print_group(group: str) -> None:
    distributions = registered().get(group, {})
    for distribution in dict.fromkeys(distributions.values()):
        names = [name for name, by in distributions.items() if by == distribution]
        print(f"{group}: by {distribution}: {', '.join(names)}")
    if not distributions:
        print(f"{group}: nothing registered")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _import_failure(name: str) -> str | None:
    try:
        importlib.import_module(name)
        for group in HOSTS.get(name, ()):
            importlib.import_module(group.after)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"cannot be imported: {error}"
    except Exception as error:  # any failure of a broken installation, which is what a user looks for here
        return f"cannot be imported: {type(error).__name__}: {error}"
    return None


def _autoload() -> str:
    if is_active():
        return "active"
    if os.getenv(_SWITCH, "1") != "1":
        return f"switched off by {_SWITCH}={os.environ[_SWITCH]}; call symplectic_plugin.register()"
    return "not active: torch >= 2.5 and an installed symplectic-plugin are needed; call symplectic_plugin.register()"


if __name__ == "__main__":
    main()
