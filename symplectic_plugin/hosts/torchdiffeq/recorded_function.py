"""The vector field as torchdiffeq's solvers call it, with a recorder behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...field.vector_field import VectorField
from ...record.recorder import Recorder
from ._compat import Perturb


class RecordedFunction:
    """The vector field as the base solver calls it: evaluated without graphs, as far as the solver can see.

    Args:
        field: the vector field.
        func: the function that torchdiffeq hands to its solvers; its callbacks are attributes of this too.

    Attributes:
        recorder: the solve's, None for a solve without gradients.
        evaluated_after_jump: whether f was evaluated beyond a jump since the last step began.
    """

    def __init__(self, field: VectorField, func: Any) -> None:
        self.field = field
        self.func = func
        self.recorder: Recorder | None = None
        self.evaluated_after_jump = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        if perturb is Perturb.NEXT:
            self.evaluated_after_jump = True
        keywords = {} if perturb is Perturb.NONE else {"perturb": perturb}
        if self.recorder is None:
            self.field.report.evaluations += 1
            return self.field(t, y, keywords)
        return self.recorder.evaluate(t, y, keywords)

    def record(self, recorder: Recorder) -> None:
        """Record the solve that begins."""
        self.recorder = recorder

    def begin_step(self, y0: Tensor, f0: Tensor | None, h: Tensor | float, *, follows: bool = True) -> None:
        """Begin a step of size h, or another attempt at it, from y0 and, if it is not evaluated in it, the slope f0."""
        self.evaluated_after_jump = False
        if self.recorder is not None:
            self.recorder.begin_step(y0, f0, float(h), follows=follows)
