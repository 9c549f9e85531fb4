"""``python -m symplectic_plugin``: what is installed, whether torch loads the plugin, what is registered where."""

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from symplectic_plugin.registration.autoload import is_active
from symplectic_plugin.registration.registry import HOSTS, registered

_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def main() -> None:
    """Import torch and the hosts as a program would, and print what came of it."""
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
            names_by_distribution: dict[str, list[str]] = {}
            for name, distribution in registered().get(group.name, {}).items():
                names_by_distribution.setdefault(distribution, []).append(name)
            for distribution, names in names_by_distribution.items():
                print(f"{group.name}: by {distribution}: {', '.join(names)}")
            if not names_by_distribution:
                print(f"{group.name}: nothing registered")


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
    except Exception as error:  # a broken installation is what this is run to find
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
