"""Training over what is left: without even batches no sample is repeated, and each micro-batch counts once."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(even_batches=False, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loader = DataLoader(points(44), batch_size=12 // engine.num_processes if engine.num_processes < 3 else 4)
    model, optimizer, loader = engine.prepare(model, optimizer, loader)
    for inputs, targets in loader:
        # As sums over a weight, so that the short batch counts by its samples.
        engine.backward(cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    return {"steps": optimizer.taken, "length": len(loader), "weights": weights(model)}


def bare(processes: int = 1) -> dict[str, Any]:
    """The mean of the means of the batches that are there."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    inputs, targets = points(44).tensors
    batches = range(0, 44, 12 // processes)
    size = 12 // processes
    for first in range(0, len(batches), processes):
        parts = [
            cross_entropy(model(inputs[b : b + size]), targets[b : b + size])
            for b in batches[first : first + processes]
        ]
        torch.stack(parts).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"steps": 4, "length": 4, "weights": weights(model)}
