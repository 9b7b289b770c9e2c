"""Two models that train each other: two optimizers, one loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(split_batches=True, **options)
    makes, judges = mlp(1, last=4), mlp(2, last=1)
    by_maker = torch.optim.Adam(makes.parameters(), lr=0.02)
    by_judge = torch.optim.Adam(judges.parameters(), lr=0.02)
    loader = DataLoader(points(48), batch_size=12)
    makes, by_judge, loader, judges, by_maker = engine.prepare(makes, by_judge, loader, judges, by_maker)
    for real, noise in pairs(loader):
        by_judge.zero_grad()
        engine.backward(softplus(-judges(real)).mean() + softplus(judges(makes(noise).detach())).mean())
        by_judge.step()
        by_maker.zero_grad()
        engine.backward(softplus(-judges(makes(noise))).mean())
        by_maker.step()
    return {"maker": weights(makes), "judge": weights(judges)}


def bare() -> dict[str, Any]:
    makes, judges = mlp(1, last=4), mlp(2, last=1)
    by_maker = torch.optim.Adam(makes.parameters(), lr=0.02)
    by_judge = torch.optim.Adam(judges.parameters(), lr=0.02)
    for real, noise in pairs(DataLoader(points(48), batch_size=12)):
        by_judge.zero_grad()
        (softplus(-judges(real)).mean() + softplus(judges(makes(noise).detach())).mean()).backward()
        by_judge.step()
        by_maker.zero_grad()
        softplus(-judges(makes(noise))).mean().backward()
        by_maker.step()
    return {"maker": weights(makes), "judge": weights(judges)}


def pairs(loader: Any) -> Any:
    """Real points, and noise that is the same whoever makes it: a function of the point."""
    return ((real, noise_of(real)) for real, _ in loader)


def noise_of(real: Tensor) -> Tensor:
    return torch.sin(real * 37)
