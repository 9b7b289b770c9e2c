"""Activation checkpointing: parts of a forward pass are computed again in the backward instead of being kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from runner.engine.wrapping import blocks_of
from runner.errors import wrong

HOW = ("none", "full", "selective")

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

#: Whose outputs `selective` keeps: they cost the most to compute again for the memory that they take.
_KEPT = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "_scaled_mm", "_grouped_mm", "convolution"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "_efficient_attention_forward"),
    # Not for its own sake: a product of more than two dimensions goes through it, and only by keeping it too is a
    # change in place of such a product noticed; what was kept would be wrong.
    "_unsafe_view",
)


def checkpoint_activations(model: nn.Module, how: str, names: Sequence[str] | None = None) -> list[str]:
    """Makes the model's repeated blocks keep less for the backward pass; returns the names of those blocks.

    `full` keeps a block's inputs and computes the rest again; `selective` also keeps the outputs of matrix products,
    convolutions and attention, so that only cheap operations are computed twice. Losses, gradients, parameter names
    and the random state afterwards are those of `none`: what was drawn in the forward is drawn alike when it is
    computed again, and running statistics are updated once. A block whose forward changes other state of its own
    (spectral norm, counters) is not for this.

    To be called on a built model, before it is compiled and before a backend wraps it: hooks of FSDP and DeepSpeed
    then stay outside, and what is computed again finds whole parameters.

    Args:
        how: `none`, `full`, `selective`.
        names: class names of the blocks; None for the blocks that the model repeats.
    """
    if how not in HOW:
        raise wrong("activation_checkpointing", "is no way to do it", f"one of {', '.join(HOW)}", value=how)
    if how == "none":
        return []
    blocks = blocks_of(model, names)
    if not blocks:
        children = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
        why = f"the model has no repeated blocks (a class used several times); it is made of {', '.join(children)}"
        fix = "activation_checkpointing=none, or build the model of blocks, such as nn.ModuleList of one class"
        raise wrong("activation_checkpointing", why, fix, value=how)
    inside = {id(inner) for _, block in blocks for inner in block.modules() if inner is not block}
    outermost = [(name, block) for name, block in blocks if id(block) not in inside]
    for _, block in outermost:
        # On the instance, so that no module is inserted and every parameter keeps its name.
        inner = block.__dict__.get("forward")
        block.forward = partial(_forward, block, inner, how == "selective")
    return [name for name, _ in outermost]


def _forward(block: nn.Module, inner: Callable[..., Any] | None, selective: bool, *args: Any, **kwargs: Any) -> Any:
    """The block's own forward, checkpointed where there will be a backward."""
    # No bound method: where the compiler breaks off here, it would take that up again by its name, which is this one's.
    call, args = (type(block).forward, (block, *args)) if inner is None else (inner, args)
    if not torch.is_grad_enabled():
        return call(*args, **kwargs)
    if torch.compiler.is_compiling():
        # The compiler functionalises running statistics itself, and takes no contexts but these.
        if selective:
            return checkpoint(call, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, **kwargs)
    return checkpoint(call, *args, use_reentrant=False, context_fn=_contexts(block, selective), **kwargs)


def _contexts(block: nn.Module, selective: bool) -> Contexts:
    """Contexts of the forward and of its repetition."""

    def make() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = _selective_contexts() if selective else (nullcontext(), nullcontext())
        # Copies are made outside of the selective context, which counts the operations inside of it.
        return first, _both(_statistics_kept(block), again)

    return make


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name() if hasattr(operation, "name") else str(operation)
    namespace, _, name = name.partition("::")
    if namespace == "aten" and name.partition(".")[0] in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer:
        try:
            with inner:
                yield
        except RuntimeError as error:
            if "has been mutated" not in str(error):
                raise
            why = "a block changes the result of a matrix product, convolution or attention in place"
            fix = "activation_checkpointing=full, or write `y = y + b` instead of `y += b` there"
            raise wrong("activation_checkpointing", why, fix, value="selective") from error


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch statistics update copies of the running ones, so that computing again does not count a batch twice."""
    kept = [
        (module, dict(module._buffers))
        for module in block.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
    ]
    for module, buffers in kept:
        for name, buffer in buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
