"""Gradients by their global norm."""

from __future__ import annotations

import torch
from torch import Tensor

#: What Tensor.backward calls in the end; None where a version of torch has it no longer.
_run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)


def wide(device: torch.device) -> torch.dtype:
    """The type for sums and counts that processes add up: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def backward(loss: Tensor, factor: Tensor) -> None:
    """Adds the gradient of factor * loss (both 0-d), without a multiplication in the graph.

    Not by loss.backward(factor): that checks the factor's shape by torch's symbolic shapes, whose import takes half a
    second before the first step.
    """
    if _run_backward is None:
        (loss * factor).backward()
    else:
        _run_backward((loss,), (factor,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector: 0-d, float32 on the first gradient's device."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.stack(norms), dtype=torch.float32)


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales the gradients in place so that their norm is at most `max_norm`, as torch's clip_grad_norm_ does."""
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device))


class Finite:
    """Whether gradients are finite: one kernel for each type and device, the same that torch's GradScaler uses.

    Costs half of what a norm does, and its answer is the flag by which torch's fused optimizers skip a step.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
        self._uniform = len(kinds) == 1
        self._flags = {device: (torch.zeros((), device=device), torch.ones((), device=device)) for device, _ in kinds}

    def found(self, gradients: list[Tensor]) -> Tensor:
        """0-d float32 on the first gradient's device: 0 where all are finite, else 1 or more. Owned by this object."""
        if self._uniform and gradients:
            ((flag, one),) = self._flags.values()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, flag.zero_(), one)
            return flag
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in gradients:
            kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        flags = []
        for device in dict.fromkeys(device for device, _ in kinds):
            flags.append(self._flags[device][0].zero_())
        for (device, _), same in kinds.items():
            torch._amp_foreach_non_finite_check_and_unscale_(same, *self._flags[device])
        if not flags:
            return torch.zeros(())
        return flags[0] if len(flags) == 1 else torch.stack([flag.to(flags[0].device) for flag in flags]).sum()
