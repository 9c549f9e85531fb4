from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from symplectic_plugin.record import defaults

from .hosts import KEPT, REGISTRY, keeping

# No deadline: the machines that run this are shared. No randomness between runs: what fails, fails again.
settings.register_profile("symplectic", deadline=None, derandomize=True)
settings.load_profile("symplectic")

# The problems are small: threads that wait for each other at every operation cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(params=KEPT)
def kept(request) -> Iterator[str]:
    """Run the test with each of the kinds of what is kept of a solve; for tests whose outcome can depend on it."""
    with keeping(request.param):
        yield request.param


@pytest.fixture
def states_alone() -> Iterator[None]:
    """Keep the states of steps alone, so that f is evaluated again in the backward pass."""
    with defaults.override(checkpoint="steps"):
        yield


@pytest.fixture(scope="module")
def implicit_references() -> Iterator[None]:
    """Register the implicit methods that autograd can go through with torchdiffeq, as `reference_NAME`."""
    from .implicit_reference import references

    with pytest.MonkeyPatch.context() as patch:
        for name, solver in references().items():
            patch.setitem(REGISTRY, f"reference_{name}", solver)
        yield
