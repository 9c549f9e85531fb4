"""torchdyn: the solvers that its SOLVER_DICT holds, and the sensitivity that its ODE problems take."""

from .sensitivity import SENSITIVITIES, symplectic_adjoint
from .solver import SymplecticAdjoint

__all__ = ["SENSITIVITIES", "SymplecticAdjoint", "symplectic_adjoint"]
