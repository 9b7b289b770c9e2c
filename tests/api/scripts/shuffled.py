"""A shuffled loader under a seed: the same samples make the same steps on any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine
from runner.data.order import Permutation


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(seed=7, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loader = DataLoader(points(48), batch_size=12 // engine.num_processes, shuffle=True)
    model, optimizer, loader = engine.prepare(model, optimizer, loader)
    for _ in range(3):
        for inputs, targets in loader:
            engine.backward(cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    return {"epochs": loader.epoch, "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    inputs, targets = points(48).tensors
    for epoch in range(3):
        for chosen in Permutation(48, 7, "order", epoch)(torch.arange(48)).split(12):
            cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"epochs": 3, "weights": weights(model)}
