from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from symplectic_plugin.record import defaults

# No deadline: the machines that run this are shared. No randomness between runs: what fails, fails again.
settings.register_profile("symplectic", deadline=None, derandomize=True)
settings.load_profile("symplectic")

# The problems are small: threads that wait for each other at every operation cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture
def states_alone() -> Iterator[None]:
    """Solves keep the states of their steps alone by default, so that f is evaluated again in the backward pass."""
    with defaults.override(checkpoint="steps"):
        yield
