"""What a data set is known again by."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from runner.data import fingerprint as module
from runner.data.fingerprint import difference, fingerprint, positions
from runner.data.main import Remote


class Items(Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@dataclass
class Sample:
    x: Any
    y: Any = None


def tensors(count: int = 40, seed: int = 0) -> TensorDataset:
    made = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=made), torch.arange(count))


def test_the_same_data_are_the_same() -> None:
    found = fingerprint(tensors())
    assert found == fingerprint(tensors()) == json.loads(json.dumps(found))
    assert (found["class"], found["length"]) == ("torch.utils.data.dataset.TensorDataset", 40)
    assert len(found["items"]) == 16
    assert difference(found, fingerprint(tensors())) is None


def test_what_differs_is_told() -> None:
    found = fingerprint(tensors())
    assert difference(found, fingerprint(tensors(41))) == "had 40 samples and has 41 samples"
    assert "16 of 16 samples that were looked at differ" in str(difference(found, fingerprint(tensors(seed=1))))
    other = tensors()
    other.tensors[0][positions(40)[3]] += 1
    assert "1 of 16" in str(difference(found, fingerprint(other)))
    assert "was a torch.utils.data.dataset.TensorDataset and is a " in str(
        difference(found, fingerprint(Subset(tensors(), range(40))))
    )


def test_positions_are_a_fixed_sample() -> None:
    assert positions(1) == [0]
    assert sorted(positions(5)) == [0, 1, 2, 3, 4]
    found = positions(10**9)
    assert found == positions(10**9)
    assert found[:2] == [0, 10**9 - 1]
    assert len(set(found)) == 16
    assert all(0 <= number < 10**9 for number in found)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, 1.0),
        (1, True),
        (1, "1"),
        (0.0, -0.0),
        (None, 0),
        ("a", b"a"),
        ("ab", ["a", "b"]),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"b": 1}),
        ({1, 2}, {1, 3}),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2).bfloat16(), torch.ones(2).bfloat16()),
        (torch.tensor(1), torch.tensor(2)),
        (np.zeros(3), np.ones(3)),
        (np.zeros(3), np.zeros(3, dtype="float32")),
        (np.array(["a"], dtype=object), np.array(["b"], dtype=object)),
        (Sample(1), Sample(1, 2)),
        ([{"x": (torch.ones(2), "t")}], [{"x": (torch.ones(2), "u")}]),
        (float("nan"), float("inf")),
    ],
)
def test_contents_of_every_kind(one: Any, other: Any) -> None:
    assert fingerprint(Items([one]))["items"] == fingerprint(Items([one]))["items"]
    assert fingerprint(Items([one]))["items"] != fingerprint(Items([other]))["items"]


def test_what_has_no_contents_is_left_out() -> None:
    assert fingerprint(Items([object()]))["items"] == fingerprint(Items([object()]))["items"]
    nest: list[Any] = []
    nest.append(nest)
    assert len(fingerprint(Items([nest]))["items"]) == 1


def test_a_set_of_words_does_not_depend_on_their_hashes() -> None:
    assert len({tuple(fingerprint(Items([set(order)]))["items"]) for order in (["a", "b"], ["b", "a"])}) == 1


def test_streams_and_what_others_read() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            raise AssertionError("it is not read")

    assert fingerprint(Stream())["items"] is None
    assert fingerprint(Remote(5, False)) == {"class": None, "length": 5, "items": None}
    assert difference(fingerprint(Remote(5, False)), {"class": "a.B", "length": 5, "items": ["x"]}) is None


class Augmented(Items):
    """By the generators that all share."""

    def __getitem__(self, index: int) -> Any:
        return self.items[index] + random.random() + np.random.rand() + torch.rand(1)


class Own(Items):
    """By a generator of its own that nobody seeded."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.numpy, self.python, self.torch = np.random.default_rng(), random.Random(), torch.Generator()
        self.inside = {"old": [np.random.RandomState()]}

    def __getitem__(self, index: int) -> Any:
        return (
            self.items[index] + self.numpy.random() + self.python.random() + self.inside["old"][0].rand(),
            torch.rand(1, generator=self.torch),
        )


def test_augmentation_by_common_generators_is_fixed() -> None:
    assert fingerprint(Augmented([1.0, 2.0])) == fingerprint(Augmented([1.0, 2.0]))
    assert len(fingerprint(Augmented([1.0, 2.0]))["items"]) == 2


def test_augmentation_of_its_own_is_left_out() -> None:
    assert fingerprint(Own([1.0, 2.0]))["items"] is None


def test_no_generator_moves() -> None:
    dataset = Own([1.0, 2.0])
    held = (dataset.numpy, dataset.python, dataset.torch, dataset.inside["old"][0])

    def states() -> Any:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            held[0].bit_generator.state,
            held[1].getstate(),
            held[2].get_state().tolist(),
            held[3].get_state()[1].tolist(),
        )

    before = states()
    fingerprint(dataset)
    fingerprint(Augmented([1.0]))
    assert states() == before


class Lazy(Items):
    """Opens what it reads with the first sample, as data sets for several workers must."""

    handle: Any = None

    def __getitem__(self, index: int) -> Any:
        if self.handle is None:
            self.handle = object()
        return self.items[index]


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, [0, 1]), lambda d: ConcatDataset([d, d])])
def test_what_it_opens_is_not_left_open(wrap: Any) -> None:
    dataset = Lazy([1, 2])
    assert fingerprint(wrap(dataset))["items"]
    assert dataset.handle is None


class Slow(Items):
    def __init__(self, items: list[Any], seconds: float) -> None:
        super().__init__(items)
        self.seconds = seconds

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return self.items[index]


def test_reading_ends_in_time_and_stays_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIME", 0.03)
    started = time.perf_counter()
    slow = fingerprint(Slow(list(range(100)), 0.005))
    assert time.perf_counter() - started < 1
    assert 0 < len(slow["items"]) < 16
    quick = fingerprint(Slow(list(range(100)), 0.0))
    assert difference(slow, quick) is difference(quick, slow) is None
    assert "differ" in str(difference(slow, fingerprint(Slow(list(range(1, 101)), 0.0))))
    assert fingerprint(Slow([1], 0.05))["items"] == []


class Broken(Items):
    def __getitem__(self, index: int) -> Any:
        if index:
            raise OSError("no such file")
        return 1


def test_samples_that_cannot_be_read_are_not_its_business() -> None:
    assert len(fingerprint(Broken([1, 2, 3]))["items"]) == 1
