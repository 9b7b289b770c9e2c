"""Tied and frozen parameters, and an exponential moving average by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import points, weights, whole
from runner import Engine


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.into = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.into.weight
        self.frozen = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.again(torch.tanh(self.into(x))) * self.scale)


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(split_batches=True, **options)
    model = Tied()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    average = copy.deepcopy(model)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(points(48), batch_size=12))
    for inputs, targets in loader:
        engine.backward(cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(whole(new).float(), 0.1)
    assert type(engine.unwrap_model(model)).__name__.endswith("Tied")
    assert model.again.weight is model.into.weight
    return {"weights": weights(model), "average": weights(average), "names": len(engine.get_state_dict(model))}


def bare() -> dict[str, Any]:
    model = Tied()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    average = copy.deepcopy(model)
    for inputs, targets in DataLoader(points(48), batch_size=12):
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)
    return {"weights": weights(model), "average": weights(average), "names": len(model.state_dict())}
