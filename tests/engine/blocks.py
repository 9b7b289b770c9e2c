"""A small transformer with repeated blocks, for tests of what is done block by block."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

WIDTH, CLASSES = 16, 3


class Block(nn.Module):
    def __init__(self, dropout: float, statistics: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.statistics = nn.BatchNorm1d(WIDTH) if statistics else nn.Identity()

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        query, key, value = self.attention(self.norm(x)).chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.drop(self.out(mixed)) * scale
        x = x + self.drop(self.narrow(functional.gelu(self.wide(x)))) * scale
        return self.statistics(x.transpose(1, 2)).transpose(1, 2)


class Transformer(nn.Module):
    """Sequences of 8 numbers each to 3: (batch, length, 8) -> (batch, length, 3)."""

    def __init__(self, layers: int = 3, dropout: float = 0.0, statistics: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout, statistics) for _ in range(layers))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)


def batches(steps: int, rank: int = 0, size: int = 1) -> list[Tensor]:
    """A part of each step's four sequences of five."""
    return [torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(step))[rank::size] for step in range(steps)]


def trained(model: nn.Module, steps: int = 3) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses, gradients by name at each step, and the state in the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, gradients = [], []
    torch.manual_seed(1)
    for inputs in batches(steps):
        loss = model(inputs).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: value.clone() for name, value in model.state_dict().items()}
