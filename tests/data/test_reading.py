"""Data sets to loaders, and what is wrong with a data set before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from runner.data.loader import Loader
from runner.data.main import MainLoader, Remote
from runner.data.order import Order
from runner.data.reading import Reading, problems, training_order
from runner.data.stream import StreamLoader, StreamOrder

pytestmark = pytest.mark.usefixtures("quiet")


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


class Sized(Stream):
    def __len__(self) -> int:
        return 10


INDEXED = TensorDataset(torch.arange(10))


def test_the_loader_fits_the_data_set() -> None:
    one, two = Reading(), Reading(reader=1, readers=2, main=True)
    assert type(one.training(INDEXED, 4, 2, 0)) is Loader
    assert type(one.training(Stream(), 4, 2, 0)) is StreamLoader
    assert type(Reading(main=True).training(Stream(), 4, 2, 0)) is StreamLoader
    remote = two.training(Remote(10, False), 4, 2, 0)
    assert type(remote) is MainLoader
    assert remote.source is None
    assert (remote.order.steps_per_epoch, remote.order.samples(3)) == (3, 10)
    source = Reading(readers=2, main=True).evaluation(INDEXED, 2)
    assert type(source) is MainLoader
    assert source.order.global_size == 4


def test_a_copy_of_a_loader_with_another_size_leaves_it_alone() -> None:
    made = Reading(readers=2, main=True).training(Stream(), 4, 2, 0)
    assert isinstance(made, MainLoader)
    trial = copy(made)
    trial.micro_size, trial.order = 1, StreamOrder(4)
    next(trial.steps(0, 1))
    assert (made.micro_size, trial.micro_size) == (2, 1)
    assert (made.source.order is made.order, trial.source.order is trial.order) == (True, True)  # type: ignore[union-attr]
    remote = Reading(reader=1, readers=2, main=True).training(Remote(10, False), 4, 2, 0)
    remote.micro_size = 1
    assert (remote.micro_size, remote.dataset) == (None, None)


def test_orders_of_streams() -> None:
    known, unknown = (training_order(data, 4, 0) for data in (Sized(), Stream()))
    assert isinstance(known, StreamOrder)
    assert isinstance(training_order(INDEXED, 4, 0), Order)
    same = Order(10, 4)
    for name in ("length", "global_size", "steps_per_epoch", "samples_per_epoch"):
        assert getattr(known, name) == getattr(same, name)
    assert [known.samples(step) for step in range(9)] == [same.samples(step) for step in range(9)]
    assert training_order(Sized(), 4, 0, drop_last=True).samples(5) == 20
    assert unknown.length is None
    assert unknown.steps_per_epoch > 10**9
    assert unknown.samples(7) == 28


def found(key: str, dataset: Any, **how: Any) -> list[tuple[str | None, str]]:
    return [(problem.key, problem.why) for problem in problems(key, dataset, **{"global_size": 4, **how})]


def test_what_is_right_has_no_problem() -> None:
    for dataset in (INDEXED, [1, 2], Stream(), Sized(), iter([1])):
        assert found("data.train", dataset) == []
    # Fewer samples than a step: one short step, which is exact.
    assert found("data.train", [1, 2], epochs=True) == []
    assert found("data.train", Sized(), epochs=True) == []
    assert found("data.eval", [1, 2], drop_last=True) == []
    order = training_order([1, 2], 4, 0)
    assert (order.steps_per_epoch, order.samples_per_epoch) == (1, 2)


def test_what_is_wrong_is_said() -> None:
    assert found("data.train", 3) == [
        ("data.train", "built a int, which has neither a length and an index nor an iterator")
    ]
    assert found("data.eval", []) == [("data.eval", "is empty: it has no sample")]
    for dataset in ([1, 2, 3], TensorDataset(torch.arange(3))):
        (problem,) = problems("data.train", dataset, global_size=4, drop_last=True)
        assert problem.key == "data.drop_last"
        assert problem.why == "leaves nothing: 3 samples are fewer than batch.global_size=4"
        assert problem.fix.endswith("to at most 3")
    assert found("data.train", Sized(), drop_last=True, global_size=11)[0][0] == "data.drop_last"
    assert found("data.train", INDEXED, group_by_length=True)[0][0] == "data.group_by_length"
    assert found("data.train", Stream(), group_by_length=True, epochs=True) == [
        ("train.epochs", "Stream is a stream and has no length, so nobody knows how long an epoch is"),
        (
            "data.group_by_length",
            "Stream is a stream: which samples have similar lengths is not known before they are read",
        ),
    ]


def test_a_stream_that_is_shared_out_already() -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    whole = datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    assert found("data.train", whole) == []
    ((key, why),) = found("data.train", split_dataset_by_node(whole, rank=0, world_size=2))
    assert key == "data.train"
    assert "shared out among processes already" in why
