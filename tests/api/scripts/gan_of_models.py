"""Two models that train each other, with `zero_grad` of the models in the order of torch's own example."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from api.scripts.gan import pairs
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(split_batches=True, **options)
    makes, judges = mlp(1, last=4), mlp(2, last=1)
    by_maker = torch.optim.Adam(makes.parameters(), lr=0.02)
    by_judge = torch.optim.Adam(judges.parameters(), lr=0.02)
    loader = DataLoader(points(48), batch_size=12)
    judges, loader = engine.prepare(judges, loader)
    by_maker, makes, by_judge = engine.prepare(by_maker, makes, by_judge)
    loop(makes, judges, by_maker, by_judge, loader, engine.backward)
    return {"maker": weights(makes), "judge": weights(judges)}


def bare() -> dict[str, Any]:
    makes, judges = mlp(1, last=4), mlp(2, last=1)
    by_maker = torch.optim.Adam(makes.parameters(), lr=0.02)
    by_judge = torch.optim.Adam(judges.parameters(), lr=0.02)
    loop(makes, judges, by_maker, by_judge, DataLoader(points(48), batch_size=12), torch.Tensor.backward)
    return {"maker": weights(makes), "judge": weights(judges)}


def loop(makes: Any, judges: Any, by_maker: Any, by_judge: Any, loader: Any, backward: Any) -> None:
    for real, noise in pairs(loader):
        made = makes(noise)
        judges.zero_grad()
        backward(softplus(-judges(real)).mean())
        backward(softplus(judges(made.detach())).mean())
        by_judge.step()
        makes.zero_grad()
        backward(softplus(-judges(made)).mean())
        by_maker.step()
