"""The memory in which a data worker's batches reach the training process has no name in any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runner.data.loader import Loader
from runner.data.order import Order

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd")


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.full((2048,), float(index)), index


def as_they_are(samples: list[Any]) -> Any:
    """Tensors that are not made in shared memory, one of them empty, one a piece of another."""
    return {"first": samples[0][0], "empty": torch.empty(0), "piece": samples[-1][0][1024:]}


def mapped() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("own", [None, as_they_are])
def test_batches_come_in_memory_without_a_name(own: Any) -> None:
    loader = Loader(Numbers(), Order(12, 4, shuffle=False), 4, collate=own, num_workers=1)
    received = [batches.batches[0] for batches in loader.steps(0, 3)]
    assert mapped().count("/memfd:batch (deleted)") >= 3
    assert "/dev/shm/torch_" not in mapped()
    for step, batch in enumerate(received):
        check_collated(step, *batch) if own is None else check_sent(step, **batch)
    received.clear()
    del batch
    assert "/memfd:batch" not in mapped()


def check_collated(step: int, points: Tensor, numbers: Tensor) -> None:
    assert numbers.tolist() == list(range(4 * step, 4 * step + 4))
    assert points.equal(numbers.float()[:, None].expand(4, 2048))


def check_sent(step: int, first: Tensor, empty: Tensor, piece: Tensor) -> None:
    assert first.equal(torch.full((2048,), 4.0 * step))
    assert piece.equal(torch.full((1024,), 4.0 * step + 3))
    assert empty.numel() == 0
    piece.fill_(-1.0)  # it is this process's own now, to be written to as well
    assert piece.sum() == -1024
