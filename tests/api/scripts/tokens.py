"""A language model: losses are sums over tokens, and every token of a window counts the same, on any process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from api.scripts.data import weights
from runner import Engine

LENGTHS = [3, 9, 5, 2, 8, 4, 7, 6, 1, 9, 3, 5, 2, 6, 8, 4, 7, 1, 5, 3]


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 11, (length,), generator=generator) for length in LENGTHS]


def padded(items: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(items, batch_first=True)


def language_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))


def loss_sum(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=0, reduction="sum")


def windows(loader: Any, size: int) -> Iterator[list[Any]]:
    batches = iter(loader)
    while window := [batch for _, batch in zip(range(size), batches, strict=False)]:
        yield window


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(accumulation_steps=3, split_batches=True, **options)
    model = language_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loader = DataLoader(texts(), batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
    model, optimizer, loader = engine.prepare(model, optimizer, loader)
    totals = []
    for window in windows(loader, 3):
        total = engine.reduce(sum((ids > 0).sum() for ids in window))
        for ids in window:
            with engine.accumulate(model, weight=total):
                engine.backward(loss_sum(model(ids), ids))
                optimizer.step()
                optimizer.zero_grad()
        assert engine.sync_gradients
        totals.append(total.item())
    return {"totals": totals, "weights": weights(model)}


def bare() -> dict[str, Any]:
    model = language_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    totals = []
    for start in range(0, 20, 6):
        ids = padded(texts()[start : start + 6])
        totals.append(int((ids > 0).sum()))
        (loss_sum(model(ids), ids) / totals[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"totals": totals, "weights": weights(model)}
