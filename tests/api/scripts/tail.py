"""Accumulation over four micro-batches, with a last window of two, and a schedule by the step."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(gradient_accumulation_steps=4, split_batches=True, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)
    # Separate calls, the optimizer before its model.
    optimizer = engine.prepare(optimizer)
    scheduler = engine.prepare(scheduler)
    model, loader = engine.prepare(model, DataLoader(points(60), batch_size=6))
    synchronised, rates = [], []
    for _ in range(2):
        for inputs, targets in loader:
            with engine.accumulate(model):
                engine.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            synchronised.append(engine.sync_gradients)
            rates.append(scheduler.get_last_lr()[0])
    return {"synchronised": synchronised, "rates": rates, "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    inputs, targets = points(60).tensors
    synchronised, rates, rate = [], [], 0.2
    for _ in range(2):
        for start, stop in ((0, 24), (24, 48), (48, 60)):
            cross_entropy(model(inputs[start:stop]), targets[start:stop]).backward()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            micro = (stop - start) // 6
            synchronised += [False] * (micro - 1) + [True]
            rates += [rate] * (micro - 1) + [rate * 0.8]
            rate *= 0.8
    return {"synchronised": synchronised, "rates": rates, "weights": weights(model)}
