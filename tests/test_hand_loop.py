"""The runner trains as a loop does that one would write by hand: the same losses for the same seed and order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import CLASSES, FEATURES, Result, mlp, spec
from torch.nn.functional import cross_entropy

from runner.data.order import Order
from runner.data.synthetic import random_classification


def by_hand(
    seed: int, epochs: int, size: int, rate: float, clip: float | None, warmup: int
) -> tuple[list[float], float]:
    """The losses of all steps and the mean loss over the held-out data."""
    features, labels = random_classification(50, FEATURES, CLASSES, seed=0).tensors
    order = Order(50, size, seed)
    steps = epochs * order.steps_per_epoch
    torch.manual_seed(seed)
    model = mlp()
    groups = [
        {"params": [p for name, p in model.named_parameters() if not name.endswith("bias")]},
        {"params": [p for name, p in model.named_parameters() if name.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
    losses = []
    for step in range(steps):
        factor = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * ((step + 1) / (warmup + 1) if step < warmup else factor)
        batch = order.indices(step)
        loss = cross_entropy(model(features[batch]), labels[batch])
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    held_out, targets = random_classification(21, FEATURES, CLASSES, seed=1).tensors
    with torch.no_grad():
        return losses, cross_entropy(model(held_out), targets).item()


@pytest.mark.parametrize(("seed", "clip", "warmup"), [(0, None, 0), (1, 0.3, 4), (2, 1.0, 0)])
def test_the_same_losses_as_by_hand(job: Callable[..., Result], seed: int, clip: float | None, warmup: int) -> None:
    scheduler: dict[str, Any] = spec("runner.train.schedules.cosine", warmup=warmup)
    result = job(seed=seed, grad_clip=clip, scheduler=scheduler, train__epochs=4)
    losses, held_out = by_hand(seed, epochs=4, size=8, rate=1e-2, clip=clip, warmup=warmup)
    assert len(losses) == 28
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert result.eval[-1]["loss"] == pytest.approx(held_out, rel=1e-6)
    assert losses[-1] < losses[0]
