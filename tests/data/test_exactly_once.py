"""Generated: the readers' parts of each step make up the step of one reader, each sample once an epoch."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from runner.data.loader import Loader, shares
from runner.data.order import Order
from runner.data.reading import Reading
from runner.data.stream import StreamLoader, StreamOrder

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


class Numbers:
    """Sample i is i; iterated or indexed."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index >= self.length:
            raise IndexError(index)
        return index


def drawn(seed: int, workers: int) -> dict[str, int]:
    """A case: any length, sizes that fit together, readers, epochs."""
    made = random.Random(seed)
    readers, micro, accumulation = made.randint(1, 5), made.randint(1, 5), made.randint(1, 3)
    return {
        "length": made.choice([1, 2, made.randint(3, 30), made.randint(30, 90)]),
        # Now and then a size that the equation of the batch would not allow: an automatic micro-batch gives such.
        "size": micro * accumulation * readers + (made.randint(0, 4) if seed % 4 == 0 else 0),
        "micro": micro,
        "readers": readers,
        "epochs": made.randint(1, 3),
        "workers": workers,
        "seed": seed,
    }


def check(case: dict[str, int], *, stream: bool, drop_last: bool, grouped: bool) -> None:
    length, size, micro, readers = (case[name] for name in ("length", "size", "micro", "readers"))
    lengths = torch.arange(length) * 7 % 11 if grouped else None
    order = Order(length, size, case["seed"], drop_last=drop_last, lengths=lengths, window=3, shuffle=not stream)
    stop = order.steps_per_epoch * case["epochs"]
    if not stop:
        return

    def loader(reader: int) -> Loader | StreamLoader:
        how = {"num_workers": case["workers"], "reader": reader, "readers": readers}
        if not stream:
            return Loader(Numbers(length), order, micro, **how)
        known = length if case["seed"] % 2 else None
        dataset = Numbers(length) if known else range(length)
        return StreamLoader(dataset, StreamOrder(size, known, drop_last=drop_last), micro, **how)

    parts = [list(loader(reader).steps(0, stop)) for reader in range(readers)]
    by_epoch: list[list[int]] = [[] for _ in range(case["epochs"])]
    for step in range(stop):
        here = [part[step] for part in parts]
        assert len({len(found.batches) for found in here}) == 1
        assert len(here[0].batches) >= 1
        for reader, found in enumerate(here):
            assert (len(found.batches), found.real) == shares(order.count(step), micro, reader, readers)
            # Padding is the step's first slice.
            for batch in found.batches[found.real :]:
                assert torch.equal(batch, here[0].batches[0])
        # Slice j * readers + r is micro-batch j of reader r: dealt in turn, they are the step in its order.
        dealt = [found.batches[place] for place in range(len(here[0].batches)) for found in here if place < found.real]
        assert torch.cat(dealt).tolist() == order.indices(step).tolist()
        by_epoch[step // order.steps_per_epoch] += torch.cat(dealt).tolist()
    for seen in by_epoch:
        assert len(set(seen)) == len(seen) == order.samples_per_epoch
        assert drop_last or sorted(seen) == list(range(length))


@pytest.mark.parametrize("seed", range(60))
def test_every_sample_once_an_epoch(seed: int) -> None:
    case = drawn(seed, workers=0)
    check(case, stream=False, drop_last=seed % 5 == 1, grouped=seed % 3 == 0)
    check(case, stream=True, drop_last=seed % 5 == 1, grouped=False)


@pytest.mark.parametrize("seed", range(100, 106))
def test_every_sample_once_an_epoch_with_workers(seed: int) -> None:
    case = {**drawn(seed, workers=1 + seed % 3), "readers": 1 + seed % 2, "epochs": 2}
    case["size"] = case["micro"] * case["readers"] * 2
    check(case, stream=bool(seed % 2), drop_last=False, grouped=False)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("length", [1, 7, 20, 43])
def test_slices_of_an_evaluation_do_not_depend_on_the_readers(length: int, grouped: bool) -> None:
    class Texts(Numbers):
        lengths = torch.arange(length) * 5 % 13

    def slices(readers: int) -> list[list[int]]:
        loaders = [
            Reading(reader=reader, readers=readers, group_by_length=grouped).evaluation(Texts(length), 3)
            for reader in range(readers)
        ]
        steps = loaders[0].order.steps_per_epoch
        found = zip(*(made.steps(0, steps) for made in loaders), strict=True)
        return [b.tolist() for step in found for part in step for b in part.batches[: part.real]]

    assert slices(1) == slices(2) == slices(3)
    assert sorted(chain.from_iterable(slices(1))) == list(range(length))
