"""Small models and data that every process makes alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def points(count: int, seed: int = 0) -> TensorDataset:
    """Points of four numbers and a class of three."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator))


def mlp(seed: int = 1, last: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, last))


def weights(model: nn.Module) -> list[float]:
    """All parameters as numbers."""
    return [number for p in model.parameters() for number in whole(p).flatten().tolist()]


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().double()
