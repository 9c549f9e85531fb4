"""Private interfaces of torch that the package relies on, each with the releases that it was seen in (2.5 to 2.14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

sequence_number = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""Number of the next autograd node that this thread makes. Reading the number touches no node: a node that Python has
seen is freed recursively with those behind it, which overflows the stack in long solves (2.5 to 2.14)."""


def _any_autocast_enabled() -> bool:
    kinds = ("cpu", "cuda", "xpu", "mps")
    return any(torch.is_autocast_enabled(kind) for kind in kinds if torch.amp.is_autocast_available(kind))


any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", _any_autocast_enabled)
"""Tells whether autocast is on for any kind of device (2.6 to 2.14; 2.5 has no such function)."""

AccumulateGrad: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
"""Type of the autograd nodes at which graphs end in leaves (2.5 to 2.14)."""


NormBase = torch.nn.modules.batchnorm._NormBase
"""Base class of batch and instance norms, which may keep running statistics (2.5 to 2.14)."""

foreach_add_ = torch._foreach_add_
"""Adds tensors of one list to those of another, in place (2.5 to 2.14)."""


def run_backward(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], *, keep_graph: bool
) -> tuple[Tensor | None, ...]:
    """Call autograd's engine as `torch.autograd.grad(..., allow_unused=True)` does, less its checks of arguments.

    The time that the checks take shows where the network is small.

    Args:
        outputs: tensors with a history.
        cotangents: a tensor for each output, in its shape and dtype.
        inputs: tensors that the outputs may depend on.
        keep_graph: whether the graph stays for another backward pass.

    Returns:
        The product of the cotangents with the Jacobian in each input, None for an input without influence.
    """
    return torch.autograd.Variable._execution_engine.run_backward(
        tuple(outputs), tuple(cotangents), keep_graph, False, tuple(inputs),
        allow_unreachable=True, accumulate_grad=False,
    )  # fmt: skip


def at_end_of_backward(call: Any) -> None:
    """Have a function called when the backward pass that is going on ends."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def graph_is_kept() -> bool:
    """Return whether the backward pass that is going on leaves the graph for another one (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def saved_tensor_hooks_are_active() -> bool:
    """Return whether hooks of the user's take over what autograd saves now, to recompute or to offload it."""
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    with torch.enable_grad():  # torch 2.5: a saved tensor takes no second pair of hooks
        probe = torch.ones((), requires_grad=True).exp()
    try:
        probe.grad_fn._raw_saved_result.register_hooks(lambda x: x, lambda x: x)  # type: ignore[union-attr]
    except RuntimeError:
        return True
    return False


def is_transformed() -> bool:
    """Return whether forward mode, or a transform of torch.func, is active."""
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def is_batch_of_cotangents(tensor: Tensor) -> bool:
    """Return whether a cotangent is a batch of cotangents (`is_grads_batched=True`, `vectorize=True`)."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def has_storage(tensor: Tensor) -> bool:
    """Return whether there is memory behind a tensor: none is behind sparse ones, nor zeros that stand for tangents."""
    return tensor.layout is torch.strided and not tensor._is_zerotensor()


def has_hooks(tensor: Tensor) -> bool:
    """Return whether differentiating with respect to a tensor runs a hook of the user's, or fills its `.grad`."""
    hooks = (tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None))
    return any(hooks) or (not tensor.is_leaf and tensor.retains_grad)
