"""The loader: micro-batches that partition the step, the same whatever fetches them."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from runner.data.loader import Loader, StepBatches, to_device
from runner.data.order import Order
from runner.data.synthetic import random_classification, separable_classification

pytestmark = pytest.mark.usefixtures("quiet")


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Whole(Numbers):
    """Fetches many at once, and counts how often."""

    fetched = 0

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.fetched += 1
        return indices


def loader(length: int, size: int, micro: int, **how: Any) -> Loader:
    return Loader(Numbers(length), Order(length, size, 1), micro, **how)


def taken(found: StepBatches) -> list[list[int]]:
    return [batch.tolist() for batch in found.batches[: found.real]]


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize(("length", "size", "micro"), [(24, 8, 8), (24, 12, 2), (25, 12, 2), (31, 12, 4), (5, 12, 2)])
def test_readers_partition_every_step(length: int, size: int, micro: int, readers: int) -> None:
    order = Order(length, size, 1)
    steps = 2 * order.steps_per_epoch
    by_reader = [
        list(loader(length, size, micro, reader=reader, readers=readers).steps(0, steps)) for reader in range(readers)
    ]
    for step in range(steps):
        slices = [batch.tolist() for batch in order.indices(step).split(micro)]
        for reader in range(readers):
            assert taken(by_reader[reader][step]) == slices[reader::readers]


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_workers_change_nothing(readers: int) -> None:
    def steps(workers: int) -> list[list[list[int]]]:
        made = loader(31, 12, 2, num_workers=workers, reader=readers - 1, readers=readers)
        return [taken(batches) for batches in made.steps(2, 7)]

    assert steps(0) == steps(1) == steps(2)


def test_steps_may_start_anywhere() -> None:
    made = loader(31, 12, 4)
    assert [taken(step) for step in made.steps(4, 6)] == [taken(step) for step in made.steps(0, 9)][4:6]
    assert list(made.steps(3, 3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_generator_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    for _ in loader(24, 8, 4, num_workers=workers).steps(0, 3):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tensor_data_set_gives_what_the_default_collate_gives() -> None:
    data = TensorDataset(torch.randn(20, 3), torch.arange(20), torch.rand(20) > 0.5)
    order = Order(20, 8, 1)
    ((found,), real), samples = next(Loader(data, order, 8).steps(1, 2)), [data[i] for i in order.indices(1).tolist()]
    expected = default_collate(samples)
    assert real == 1
    assert type(found) is type(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_a_tensor_data_sets_heir_is_asked_sample_by_sample() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            return tuple(2 * tensor for tensor in super().__getitem__(index))

    (batch,), _ = next(Loader(Doubled(torch.arange(4)), Order(4, 4, 1), 4).steps(0, 1))
    assert sorted(batch[0].tolist()) == [0, 2, 4, 6]


def test_many_samples_are_fetched_at_once_where_the_data_set_can() -> None:
    data = Whole(24)
    for _ in Loader(data, Order(24, 8, 1), 4).steps(0, 3):
        pass
    assert data.fetched == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_of_ones_own(workers: int) -> None:
    def collate(samples: list[int]) -> dict[str, Any]:
        return {"sum": sum(samples), "samples": samples}

    made = Loader(Numbers(8), Order(8, 4, 1), 4, collate=collate, num_workers=workers)
    batches = [batch for step in made.steps(0, 2) for batch in step.batches]
    assert sum(batch["sum"] for batch in batches) == 28
    assert all(batch["sum"] == sum(batch["samples"]) for batch in batches)


def test_tensor_data_sets_of_many_types_go_through_workers() -> None:
    data = TensorDataset(torch.arange(12), torch.randn(12, 2))
    plain, ahead = (
        [batch for step in Loader(data, Order(12, 4, 1), 2, num_workers=workers).steps(0, 3) for batch in step.batches]
        for workers in (0, 1)
    )
    for one, other in zip(plain, ahead, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Pair(NamedTuple):
    x: Tensor
    name: str


@dataclass(frozen=True)
class Record:
    x: Tensor
    name: str = "n"


class Encoding(UserDict):
    """As the batches of a tokenizer: a mapping that is no dict."""


class Own:
    """Knows how to move itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device, **how: Any) -> Own:
        return Own(self.x.to(device))


def test_batches_of_any_shape_go_to_the_device_and_keep_their_type() -> None:
    x, meta = torch.zeros(2), torch.device("meta")
    counted: defaultdict[str, Any] = defaultdict(list, x=x)
    batch = {
        "pair": Pair(x, "n"),
        "record": Record(x),
        "list": [x, (x, 3)],
        "ordered": OrderedDict(x=x),
        "default": counted,
        "encoding": Encoding(x=x, word="w"),
        "own": Own(x),
        "word": "w",
        "none": None,
    }
    found = to_device(batch, meta)
    assert type(found["pair"]) is Pair
    assert found["pair"].name == "n"
    assert type(found["record"]) is Record
    assert found["record"].name == "n"
    assert type(found["list"][1]) is tuple
    assert type(found["ordered"]) is OrderedDict
    assert type(found["default"]) is defaultdict
    assert found["default"].default_factory is list
    assert type(found["encoding"]) is Encoding
    assert found["encoding"]["word"] == "w"
    assert (found["word"], found["none"], found["list"][1][1]) == ("w", None, 3)
    tensors = [
        found["pair"].x,
        found["record"].x,
        found["list"][0],
        found["list"][1][0],
        *(found[name]["x"] for name in ("ordered", "default", "encoding")),
        found["own"].x,
    ]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert x.device.type == "cpu"
    assert batch["encoding"]["x"].device.type == "cpu"


def test_batches_on_the_cpu_are_passed_as_they_are() -> None:
    record = Record(torch.zeros(1))
    made = Loader(Numbers(2), Order(2, 2, 1), 2, collate=lambda samples: record)
    assert next(made.steps(0, 1)).batches[0] is record


def test_synthetic_data_follow_their_seed() -> None:
    one, same, other = (random_classification(10, 4, 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.tensors[0], same.tensors[0])
    assert not torch.equal(one.tensors[0], other.tensors[0])
    assert one.tensors[0].shape == (10, 4)
    assert one.tensors[1].dtype == torch.int64
    assert set(one.tensors[1].tolist()) <= {0, 1, 2}
    train, held_out = (separable_classification(200, 8, 3, seed=seed, noise=0.1) for seed in (0, 1))
    centres = torch.stack([train.tensors[0][train.tensors[1] == c].mean(0) for c in range(3)])
    nearest = torch.cdist(held_out.tensors[0], centres).argmin(1)
    assert float((nearest == held_out.tensors[1]).float().mean()) > 0.95
