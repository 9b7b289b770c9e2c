"""The plain loop: one model, one optimizer, one batch a step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(split_batches=True, **options)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader, optimizer, model = engine.prepare(DataLoader(points(48), batch_size=12), optimizer, model)
    losses = []
    for _ in range(2):
        for inputs, targets in loader:
            loss = cross_entropy(model(inputs), targets)
            engine.backward(loss)
            norm = engine.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(engine.reduce(loss, "mean").item())
    return {"losses": losses, "norm": norm.item(), "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        for inputs, targets in DataLoader(points(48), batch_size=12):
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return {"losses": losses, "norm": norm.item(), "weights": weights(model)}
