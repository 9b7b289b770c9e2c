"""How an optimizer is made and called: which parameters decay, fused where torch can, no compiler for plain steps."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from runner.errors import wrong

_FUSED_DEVICES = ("cpu", "cuda", "mps")


def parameter_groups(model: nn.Module, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """The trainable parameters, those that `no_decay` names in a group with weight_decay 0.

    Words of `no_decay`: `bias` (parameters called bias), `norm` (all parameters of modules whose class is called
    …Norm…), anything else is a pattern for the parameter's full name, such as `*.embeddings.*`.
    """
    norms = {
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }

    def excluded(name: str) -> bool:
        for word in no_decay:
            if word == "bias" and name.rpartition(".")[2] == "bias":
                return True
            if word == "norm" and name in norms:
                return True
            if fnmatchcase(name, word):
                return True
        return False

    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if excluded(name) else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed or not free else []
    return [*groups, {"params": free, "weight_decay": 0.0}] if free else groups


def fused_by_default(
    factory: Callable[..., Any], given: Sequence[str], device: torch.device, able: Collection[str] | None = None
) -> dict[str, bool]:
    """{"fused": True} where torch's own optimizer offers it on this device and the user chose no implementation.

    `able` are the only optimizers that the backend steps fused; None for all.
    """
    if able is not None and getattr(factory, "__name__", None) not in able:
        return {}
    if not getattr(factory, "__module__", "").startswith("torch.optim") or device.type not in _FUSED_DEVICES:
        return {}
    if {"fused", "foreach", "differentiable", "capturable"} & set(given):
        return {}
    return {"fused": True} if "fused" in inspect.signature(factory).parameters else {}


def without_compiler() -> None:
    """Lets optimizers be built without importing torch._dynamo, which costs as much as importing torch.

    torch wraps Optimizer.add_param_group and others to be ignored by torch.compile and imports the compiler at the
    first call to do so. While nothing is compiled there is nothing to be ignored by: the wrapper finds the plain
    function where it keeps the wrapped one.
    """
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if plain is not None:
            plain.__dict__.setdefault("__dynamo_disable", plain)


def plain_step(optimizer: Optimizer) -> Callable[[], Any]:
    """The optimizer's step without the guards for torch.compile and the profiler, where that changes nothing.

    For torch's own optimizers as long as no step hooks are registered: the guards import torch._dynamo (about a
    second) and cost some 15 µs a step. The caller holds no_grad. Raises InputError for one that needs a closure.
    """
    kind = type(optimizer)
    bare: Any = kind.step
    while hasattr(bare, "__wrapped__"):
        bare = bare.__wrapped__
    closure = inspect.signature(bare).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        why = "computes the loss several times a step (it needs a closure), and a step here computes it once"
        raise wrong("optimizer", why, "choose another optimizer", value=f"{kind.__module__}.{kind.__name__}")
    ours = kind.__module__.startswith("torch.optim") and not optimizer.defaults.get("differentiable")
    if not ours or "torch._dynamo" in sys.modules:
        # Looked up at each call: a scheduler that is made later puts its own in this place.
        return lambda: optimizer.step()

    def step() -> None:
        own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            optimizer.step()
        else:
            bare(optimizer)
        # What torch's schedulers look at to warn of a schedule that moves before the optimizer does.
        optimizer._opt_called = True  # type: ignore[attr-defined]

    return step
