"""torch.compile: a compiled vector field with its plain function as the fallback, and code that Dynamo leaves alone."""

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
"""Compiled functions, by the code object or class of the user's function, then by the options of compilation."""

_numbers = itertools.count()

_not_now: ContextVar[bool] = ContextVar("symplectic_adjoint: compiled functions call the plain ones", default=False)

_COUNTERS = "allow_unspec_int_on_nn_module"
"""Option of Dynamo: a module that counts its evaluations is not compiled anew for each number. Not in torch 2.5."""


class CompiledFunction:
    """A function or module, compiled; its plain self, with a warning, once compilation has failed.

    Args:
        function: the function or module.
        how: True; a mode of torch.compile, as "reduce-overhead", with which a GPU replays CUDA graphs; or a dictionary
            of torch.compile's keyword arguments.

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

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling() or _not_now.get() or not self.is_compiled:
            return self.function(*args, **keywords)
        try:
            with _counters_do_not_recompile():
                result = self._program()(self.function, *args, **keywords)
            # Results of CUDA graphs are overwritten when the graphs run again.
            return tree_map_only(Tensor, _clone_on_gpu, result) if torch.cuda.is_initialized() else result
        except Exception as error:
            result = self.function(*args, **keywords)
            # An exception that the plain function does not raise is compilation's.
            reason = " ".join(str(error).split("\n")[:2]).strip()
            self.give_up(f"torch.compile failed: {type(error).__name__}: {reason}")
            return result

    def give_up(self, why: str) -> None:
        """Call the plain function from now on, and warn with the reason."""
        self.is_compiled = False
        warnings.warn(f"symplectic_adjoint: the vector field is evaluated as it is, not compiled: {why}", stacklevel=4)

    def _program(self) -> Callable[..., Any]:
        """Look up or make the compiled function.

        Each user's function gets a code object of its own: torch.compile makes few programs for one, and keeps them
        as long as the code object lives.
        """
        programs = _programs.setdefault(getattr(self.function, "__code__", type(self.function)), {})
        key = repr(sorted(self._options.items()))
        if key not in programs:
            code = _call.__code__.replace(co_name=f"{_call.__name__}_{next(_numbers)}")
            copy = types.FunctionType(code, _call.__globals__, code.co_name)
            programs[key] = torch.compile(copy, **self._options)
        return programs[key]


def _call(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    return function(*args, **keywords)


def _clone_on_gpu(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_cuda else tensor


@contextlib.contextmanager
def _counters_do_not_recompile() -> Iterator[None]:
    before = getattr(torch._dynamo.config, _COUNTERS, None)
    if before is not False:
        yield
        return
    setattr(torch._dynamo.config, _COUNTERS, True)
    try:
        yield
    finally:
        setattr(torch._dynamo.config, _COUNTERS, False)


@contextlib.contextmanager
def without_compilation() -> Iterator[None]:
    """Have compiled functions call the plain ones, in this thread."""
    token = _not_now.set(True)
    try:
        yield
    finally:
        _not_now.reset(token)


_Method = TypeVar("_Method", bound=Callable[..., Any])


def not_compiled(method: _Method) -> _Method:
    """Keep a method out of a torch.compile around its caller: the method's control flow depends on data."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(method)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            dynamo = sys.modules.get("torch._dynamo")  # importing Dynamo takes seconds
            if dynamo is None:
                return method(*args, **keywords)
            disabled = dynamo.disable(method)
        return disabled(*args, **keywords)

    return wrapped  # type: ignore[return-value]
