"""torch.compile: a vector field compiled by it, evaluated as it is where that fails; and what it is to leave alone."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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
                _programs.pop(self, None)
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    "symplectic_adjoint: torch.compile failed, so the vector field is evaluated as it is: "
                    f"{type(error).__name__}: {reason}",
                    stacklevel=2,
                )
        return self.function(*args, **keywords)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def not_compiled(method: _Method) -> _Method:
    """Have torch.compile, if it compiles what calls this, leave this alone: its control flow depends on data."""

    left_alone: Callable[..., Any] | None = None

    @functools.wraps(method)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        nonlocal left_alone
        if left_alone is None:
            dynamo = sys.modules.get("torch._dynamo")  # not imported for this: it takes seconds
            if dynamo is None:
                return method(*args, **keywords)
            left_alone = dynamo.disable(method)
        return left_alone(*args, **keywords)

    return wrapped  # type: ignore[return-value]


def _is_of_compilation(error: BaseException) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
