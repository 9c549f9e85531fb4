"""torchdiffeq: the solver class that its SOLVERS holds, and its adjoint interface."""

from .solver import SymplecticAdjoint

__all__ = ["SymplecticAdjoint"]
