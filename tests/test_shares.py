"""Tensors of which each process holds a part: how they are cut, and that every bit comes back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor

from runner import distributed, shares

SHAPES = [(), (1,), (3,), (4,), (5, 7), (1, 9), (2, 1, 6), (0, 3), (8, 2)]


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((8, 3), 1, None),
        ((), 4, None),
        ((0, 3), 4, None),
        ((8, 3), 4, 0),
        ((1, 9), 4, 1),
        ((5, 8), 4, 1),  # 2 of 5 rows would be more than a quarter
        ((6, 6), 4, 0),
        ((1,), 4, 0),
    ],
)
def test_the_most_even_dimension(shape: tuple[int, ...], size: int, expected: int | None) -> None:
    assert shares.dimension(shape, size) == expected


def test_one_process_holds_all_in_memory_of_its_own() -> None:
    full = torch.arange(6.0).view(2, 3)
    part = shares.cut(full)
    assert torch.equal(part, full)
    assert part.data_ptr() != full.data_ptr()
    assert shares.whole(part) is part
    assert shares.own(part) is part
    assert shares.row(torch.ones(2)).shape == (1, 2)


def value(shape: tuple[int, ...]) -> Tensor:
    """Numbers with signed zeros and others that arithmetic does not keep."""
    found = torch.arange(math.prod(shape), dtype=torch.float32).sub(3).view(shape)
    flat = found.view(-1)
    for number, odd in enumerate((-0.0, float("nan"), float("-inf"), 1e-45)):
        if number < flat.numel():
            flat[number] = odd
    return found


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.int32).tolist()


def parted() -> dict[str, Any]:
    rank = distributed.rank()
    found: dict[str, Any] = {"same": [], "held": [], "own_memory": []}
    for shape in SHAPES:
        full = value(shape)
        part = shares.cut(full)
        there = part.detach()
        target = shares.empty(shape, torch.float32)
        shares.own(target).copy_(shares.own(there))
        found["same"].append(bits(shares.whole(part)) == bits(full) == bits(shares.whole(target)))
        found["same"].append(part.shape == target.shape == shares.stand_in(shape).shape == shape)
        found["held"].append(shares.own(part).numel())
        found["own_memory"].append(
            shares.own(part).untyped_storage().nbytes() == shares.own(part).numel() * 4
            and shares.own(shares.stand_in(shape)).untyped_storage().nbytes() <= 4
        )
    rows = shares.row(torch.tensor([rank, 7]))
    found["rows"] = (shares.own(rows).tolist(), shares.whole(rows).tolist())
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_bit_comes_back(world: int) -> None:
    ranks = run_ranks(parted, world)
    for rank, found in enumerate(ranks):
        assert all(found["same"]), found["same"]
        assert all(found["own_memory"])
        assert found["rows"] == ([[rank, 7]], [[other, 7] for other in range(world)])
    for number, shape in enumerate(SHAPES):
        held = [found["held"][number] for found in ranks]
        whole = math.prod(shape)
        dim = shares.dimension(shape, world)
        assert sum(held) == (whole if dim is not None else whole * world)
        if dim is not None:
            assert max(held) == whole // shape[dim] * math.ceil(shape[dim] / world)
