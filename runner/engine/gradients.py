"""Gradients by their global norm."""

from __future__ import annotations

import torch
from torch import Tensor


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients as one vector: 0-d, float32 on the first gradient's device."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.stack(norms), dtype=torch.float32)


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales the gradients in place so that their norm is at most `max_norm`, as torch's clip_grad_norm_ does."""
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
