"""A stream without a length, read by all processes (each its part) or by the first for all, with accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from api.scripts.data import mlp, points, weights
from runner import Engine


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from points(54)


def train(dispatch_batches: bool | None = None, **options: Any) -> dict[str, Any]:
    engine = Engine(accumulation_steps=4, dispatch_batches=dispatch_batches, split_batches=True, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(Stream(), batch_size=6))
    steps = 0
    for inputs, targets in loader:
        with engine.accumulate(model):
            engine.backward(cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        steps += engine.sync_gradients
    return {"steps": steps, "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    inputs, targets = points(54).tensors
    for start in range(0, 54, 24):
        cross_entropy(model(inputs[start : start + 24]), targets[start : start + 24]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"steps": 3, "weights": weights(model)}
