"""torch.compile: a vector field compiled by it, evaluated as it is where that fails; and what it is to leave alone."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_programs: weakref.WeakKeyDictionary[Any, dict[str, Callable[..., Any]]] = weakref.WeakKeyDictionary()
"""What torch.compile made, by the code or the class of a user's function, and what is made of it."""

_numbers = itertools.count()

_as_it_is: ContextVar[bool] = ContextVar("symplectic_adjoint: functions are evaluated as they are", default=False)


class Compiled:
    """A function, compiled.

    Args:
        function: the function or module.
        how: True; a mode of torch.compile, as "reduce-overhead", with which a GPU replays CUDA graphs; or a dictionary
            of its keyword arguments.

    Attributes:
        is_compiled: whether compilation has not failed.

    Raises:
        ValueError: if `how` is none of those.
    """

    def __init__(self, function: Callable[..., Any], how: bool | str | Mapping[str, Any]) -> None:
        if not (how is True or isinstance(how, str | Mapping)):
            raise ValueError(
                "symplectic_adjoint: compile must be True, a mode of torch.compile or a dictionary of its arguments, "
                f"got {how!r}"
            )
        self.function = function
        self.is_compiled = True
        self._options = {"mode": how} if isinstance(how, str) else {} if how is True else dict(how)
        self._key = repr(sorted(self._options.items()))

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling() or _as_it_is.get() or not self.is_compiled:
            return self.function(*args, **keywords)
        return self.run("", lambda: _evaluate, self.function, *args, **keywords)

    def run(self, key: str, make: Callable[[], Callable[..., Any]], *args: Any, **keywords: Any) -> Any:
        """Call a function in which this one is called, compiled; or as it is, with a warning, if that fails.

        Args:
            key: tells it from other such functions.
            make: returns it. It is called with all else.
        """
        # torch.compile makes few programs of one piece of code, and keeps them as long as that; and calling it takes a
        # millisecond.
        given: Any = self.function
        programs = _programs.setdefault(getattr(given, "__code__", type(given)), {})
        key += self._key
        if key not in programs:
            function = make()
            code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
            copy = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
            programs[key] = torch.compile(copy, **self._options)
        try:
            with _counters():
                result = programs[key](*args, **keywords)
            # What CUDA graphs return is theirs, and overwritten when they run again.
            return tree_map_only(Tensor, _own, result) if torch.cuda.is_initialized() else result
        except Exception as error:
            with evaluated_as_it_is():
                result = make()(*args, **keywords)
            # If that raises too, it is not to do with compilation.
            reason = " ".join(str(error).split("\n")[:2]).strip()
            self.give_up(f"torch.compile failed: {type(error).__name__}: {reason}")
            return result

    def give_up(self, why: str) -> None:
        """Evaluate the function as it is from now on, with a warning that says why."""
        self.is_compiled = False
        warnings.warn(f"symplectic_adjoint: the vector field is evaluated as it is, not compiled: {why}", stacklevel=4)


def _evaluate(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    return function(*args, **keywords)


class _counters:  # noqa: N801
    """A context in which a module that counts its evaluations is not compiled anew for each number."""

    def __enter__(self) -> None:
        self.before = getattr(torch._dynamo.config, _COUNTERS, None)  # torch 2.5 has no such option
        if self.before is False:
            setattr(torch._dynamo.config, _COUNTERS, True)

    def __exit__(self, *_: object) -> None:
        if self.before is False:
            setattr(torch._dynamo.config, _COUNTERS, False)


_COUNTERS = "allow_unspec_int_on_nn_module"


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_cuda else tensor


@contextlib.contextmanager
def evaluated_as_it_is() -> Iterator[None]:
    """A context in which what is compiled is evaluated as if it were not."""
    token = _as_it_is.set(True)
    try:
        yield
    finally:
        _as_it_is.reset(token)


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
