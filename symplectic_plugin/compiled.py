"""A vector field compiled by torch.compile, and evaluated as it is where that fails."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_programs: weakref.WeakKeyDictionary[Compiled, Callable[..., Any]] = weakref.WeakKeyDictionary()
"""What torch.compile made. Not attributes: what a vector field holds is looked through, and not this."""


class Compiled:
    """A function, compiled.

    Args:
        function: the function or module.
        how: True; a mode of torch.compile, as "reduce-overhead", with which a GPU replays CUDA graphs; or a dictionary
            of its keyword arguments.

    Raises:
        ValueError: if `how` is none of those.
    """

    def __init__(self, function: Callable[..., Any], how: bool | str | Mapping[str, Any]) -> None:
        if not (how is True or isinstance(how, str | Mapping)):
            raise ValueError(
                "symplectic_adjoint: compile must be True, a mode of torch.compile or a dictionary of its arguments, "
                f"got {how!r}"
            )
        options = {"mode": how} if isinstance(how, str) else {} if how is True else dict(how)
        self.function = function
        _programs[self] = torch.compile(function, **options)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        program = _programs.get(self)
        if program is not None:
            try:
                result = program(*args, **keywords)
                # What CUDA graphs return is theirs, and overwritten when they run again.
                return result.clone() if isinstance(result, Tensor) and result.is_cuda else result
            except Exception as error:
                if not _is_of_compilation(error):
                    raise
                del _programs[self]
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    "symplectic_adjoint: torch.compile failed, so the vector field is evaluated as it is: "
                    f"{type(error).__name__}: {reason}",
                    stacklevel=2,
                )
        return self.function(*args, **keywords)


def _is_of_compilation(error: BaseException) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
