"""fp16: the scale is too large at first, steps are skipped on all processes, and the schedule waits for them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def train(**options: Any) -> dict[str, Any]:
    scaling = {"init_scale": 2.0**20, "growth_interval": 3}
    engine = Engine(mixed_precision="fp16", grad_scaler=scaling, split_batches=True, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, scheduler = engine.prepare(model, optimizer, scheduler)
    loader = engine.prepare(DataLoader(points(96), batch_size=12))
    skipped, rates = [], []
    for inputs, targets in loader:
        outputs = model(inputs)
        assert outputs.dtype == torch.float32
        engine.backward(cross_entropy(outputs, targets))
        engine.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(engine.optimizer_step_was_skipped)
        rates.append(scheduler.get_last_lr()[0])
    first = skipped.index(False)
    assert 0 < first < 8, skipped
    assert not any(skipped[first : first + 3])
    assert rates[first - 1] == 0.2
    assert rates[first] == 0.2 * 0.9
    return {"skipped": skipped, "scale": engine.scaler.value, "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    skipped = []
    for inputs, targets in DataLoader(points(96), batch_size=12):
        with torch.autocast("cpu", dtype=torch.float16):
            outputs = model(inputs)
        scaler.scale(cross_entropy(outputs.float(), targets)).backward()
        scale = scaler.get_scale()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
        if not skipped[-1]:
            scheduler.step()
        optimizer.zero_grad()
    return {"skipped": skipped, "scale": scaler.get_scale(), "weights": weights(model)}
