"""Saving in the middle of an epoch and going on in a new engine: the same as never having stopped."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import points, weights
from runner import Engine


class Count:
    """Something of the user's own that is saved along."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def parts(engine: Engine) -> tuple[Any, ...]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    loader = DataLoader(points(40), batch_size=4, shuffle=True)
    return engine.prepare(model, optimizer, scheduler, loader)


def loop(engine: Engine, prepared: Any, count: Count, batches: Any) -> None:
    model, optimizer, scheduler, _ = prepared
    for inputs, targets in batches:
        engine.backward(cross_entropy(model(inputs), targets))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        count.number += 1


def train(**options: Any) -> dict[str, Any]:
    whole, count = Engine(seed=5, **options), Count()
    prepared = parts(whole)
    for _ in range(2):
        loop(whole, prepared, count, prepared[3])
    expected = weights(prepared[0])

    first, count = Engine(seed=5, **options), Count()
    prepared = parts(first)
    first.register_for_checkpointing(count)
    folder = first.broadcast(tempfile.mkdtemp() if first.is_main_process else None)
    steps = len(prepared[3]) + 2
    loop(first, prepared, count, prepared[3])
    for number, batch in enumerate(prepared[3]):
        loop(first, prepared, count, [batch])
        if number == 1:
            first.save_state(folder)
            break
    second, again = Engine(seed=5, **options), Count()
    torch.manual_seed(99)
    prepared = parts(second)
    second.register_for_checkpointing(again)
    second.load_state(folder)
    loader = prepared[3]
    assert again.number == count.number == steps
    assert loader.epoch == 1
    rest = second.skip_first_batches(loader, again.number - len(loader))
    loop(second, prepared, again, rest)
    assert loader.epoch == 2
    same = max(abs(a - b) for a, b in zip(expected, weights(prepared[0]), strict=True))
    return {"difference": same, "rate": prepared[2].get_last_lr()[0], "count": again.number == 2 * len(loader)}


def bare() -> dict[str, Any]:
    return {"difference": 0.0, "count": True}
