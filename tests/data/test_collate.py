"""Collate: torch's results where torch has one; dataclasses, None and what does not fit beyond."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from runner.data.collate import collate
from runner.data.loader import Loader, to_device
from runner.data.order import Order
from runner.errors import InputError

pytestmark = pytest.mark.usefixtures("quiet")


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Sample:
    x: Tensor
    name: str
    weight: float | None = None
    parts: tuple[Any, ...] = ()
    seen: int = field(default=0, init=False)


class Encoding(UserDict):
    pass


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (dict, UserDict)):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    "make",
    [
        lambda i: i,
        lambda i: float(i),
        lambda i: f"word {i}",
        lambda i: torch.full((2, 3), i),
        lambda i: np.arange(3) + i,
        lambda i: np.float32(i),
        lambda i: (torch.tensor(i), i),
        lambda i: [i, [i, "w"]],
        lambda i: {"x": torch.tensor([i]), "y": {"z": (i, i)}},
        lambda i: Pair(torch.tensor(i), {"a": i}),
        lambda i: OrderedDict(b=i, a=i),
        lambda i: defaultdict(list, x=i),
        lambda i: Encoding(x=torch.tensor(i), text="t"),
    ],
)
def test_what_torch_takes_becomes_what_torch_makes(make: Any) -> None:
    samples = [make(i) for i in range(4)]
    assert same(collate(samples), default_collate(samples))
    # The same inside of something that torch refuses.
    inside, _ = collate([(sample, None) for sample in samples])
    assert same(inside, default_collate(samples))


def test_dataclasses_and_none() -> None:
    samples = [
        Sample(torch.tensor([i, i]), f"n{i}", parts=(i, None, {"a": None, "b": Pair(i, None)})) for i in range(3)
    ]
    batch = collate(samples)
    assert type(batch) is Sample
    assert batch.x.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (batch.name, batch.weight, batch.seen) == (["n0", "n1", "n2"], None, 0)
    numbers, nothing, inner = batch.parts
    assert numbers.tolist() == [0, 1, 2]
    assert nothing is None
    assert inner["a"] is None
    assert type(inner["b"]) is Pair
    assert inner["b"].y is None
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is Sample
    assert moved.x.device.type == moved.parts[2]["b"].x.device.type == "meta"
    assert moved.parts[1] is None


def test_mappings_keep_their_class() -> None:
    for like in (OrderedDict(x=None, y=1), Encoding(x=None, y=1), defaultdict(int, x=None, y=1)):
        batch = collate([like, like])
        assert type(batch) is type(like)
        assert batch["x"] is None
        assert batch["y"].tolist() == [1, 1]
    assert collate([MappingProxyType({"x": None})] * 2) == {"x": None}


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([(1, None), (1, 2)], "None in the batch's sample 0 and a int in sample 1"),
        ([Sample(torch.zeros(1), "a"), Sample(torch.zeros(1), "a", weight=1.0)], "None in the batch's sample 0"),
        ([(None, 1), [None, 1]], "several types in one batch: list, tuple"),
        ([(None, 1), (None, 1, 2)], "different lengths"),
    ],
)
def test_samples_that_do_not_fit_together(samples: list[Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        collate(samples)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("other", [torch.zeros(2), None])
def test_a_sample_that_is_none_is_named(workers: int, other: Any) -> None:
    made = Loader([other, other, None], Order(3, 3, shuffle=False), 3, num_workers=workers)
    with pytest.raises(InputError) as caught:
        list(made.steps(0, 1))
    (problem,) = caught.value.problems
    assert problem.key == "data"
    assert problem.why == f"sample {0 if other is None else 2} of the data set is None"


def test_a_collate_of_ones_own_may_know_what_none_means() -> None:
    def without(samples: list[Any]) -> list[Any]:
        return [sample for sample in samples if sample is not None]

    made = Loader([1, None, 2], Order(3, 3, shuffle=False), 3, collate=without)
    assert next(made.steps(0, 1)).batches == [[1, 2]]


def test_other_errors_stay_what_they_are() -> None:
    made = Loader([torch.zeros(2), torch.zeros(3)], Order(2, 2), 2)
    with pytest.raises(RuntimeError, match="equal size"):
        list(made.steps(0, 1))
