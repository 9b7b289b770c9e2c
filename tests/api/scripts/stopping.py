"""Early stopping: one process sees it, all stop after the same step; then a second loop starts clean."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(accumulation_steps=2, split_batches=True, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(points(48), batch_size=6))
    stops = []
    for _ in range(2):
        for number, (inputs, targets) in enumerate(loader):
            with engine.accumulate(model):
                engine.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
            if engine.is_last_process and number == 4:  # in the middle of a window
                engine.set_trigger()
            if engine.check_trigger():
                stops.append(number)
                break
    return {"stops": stops, "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    inputs, targets = points(48).tensors
    for _ in range(2):
        for start in (0, 12):
            cross_entropy(model(inputs[start : start + 12]), targets[start : start + 12]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"stops": [4, 4], "weights": weights(model)}
