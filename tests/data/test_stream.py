"""Streams: dealt as indexed data are, over any readers and workers; going on; what is told of bad ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from runner.data.loader import Loader
from runner.data.order import Order
from runner.data.stream import StreamLoader, StreamOrder, is_stream, length_of
from runner.errors import InputError

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


class Count(IterableDataset):
    """0, 1, 2 …; shares itself out among workers, as torch's own pages advise."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        if worker is None:
            return iter(range(self.samples))
        return iter(range(worker.id, self.samples, worker.num_workers))


class Sized(Count):
    def __init__(self, samples: int, says: int | None = None) -> None:
        super().__init__(samples)
        self.says = samples if says is None else says

    def __len__(self) -> int:
        return self.says


class Plain:
    """No base class; another order each epoch; remembers how often it was opened."""

    def __init__(self, samples: int) -> None:
        self.samples, self.epoch, self.opened = samples, -1, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.opened += 1
        return iter((i * 7 + self.epoch) % self.samples for i in range(self.samples))


class Stateful(Plain):
    """Knows where it stands, and counts what it has read."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.place, self.read = 0, 0

    def __iter__(self) -> Iterator[int]:
        first, self.place = self.place, 0
        for i in range(first, self.samples):
            self.read += 1
            self.place = i + 1
            yield (i * 7 + self.epoch) % self.samples
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def loader(dataset: Any, size: int, micro: int, *, drop_last: bool = False, **how: Any) -> StreamLoader:
    return StreamLoader(dataset, StreamOrder(size, length_of(dataset), drop_last=drop_last), micro, **how)


def taken(made: StreamLoader, first: int, stop: int) -> list[list[list[int]]]:
    """By step, the samples of each of the reader's own micro-batches."""
    return [[batch.tolist() for batch in step.batches[: step.real]] for step in made.steps(first, stop)]


def flat(step: list[list[int]]) -> list[int]:
    return [sample for batch in step for sample in batch]


@pytest.mark.parametrize("kind", [Count, Sized, Plain])
@pytest.mark.parametrize(("samples", "size", "micro"), [(24, 12, 2), (25, 12, 4), (7, 12, 5), (31, 6, 2)])
@pytest.mark.parametrize("readers", [1, 2, 3])
def test_readers_share_each_step_as_an_indexed_set_does(
    kind: Any, samples: int, size: int, micro: int, readers: int
) -> None:
    order = Order(samples, size, shuffle=False)
    steps = 2 * order.steps_per_epoch + 1
    numbers = [list(kind(samples)) if kind is not Plain else None for _ in range(3)]
    for reader in range(readers):
        streamed = loader(kind(samples), size, micro, reader=reader, readers=readers)
        indexed = Loader(range(samples), order, micro, reader=reader, readers=readers)
        for step, (one, other) in enumerate(zip(streamed.steps(0, steps), indexed.steps(0, steps), strict=True)):
            assert (len(one.batches), one.real) == (len(other.batches), other.real)
            assert streamed.order.samples(step + 1) == order.samples(step + 1)
            if numbers[0] is not None:
                assert [b.tolist() for b in one.batches] == [b.tolist() for b in other.batches]
            elif step // order.steps_per_epoch == 1:
                found = [b.tolist() for b in one.batches[: one.real]]
                wanted = [[(i * 7 + 1) % samples for i in b.tolist()] for b in other.batches[: other.real]]
                assert found == wanted


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2])
def test_workers_change_nothing(workers: int, readers: int) -> None:
    for kind in (Count, Plain):
        here, ahead = (
            taken(loader(kind(31), 12, 2, num_workers=number, reader=readers - 1, readers=readers), 0, 7)
            for number in (0, workers)
        )
        assert here == ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_without_repeating_the_steps_end_with_the_stream(workers: int) -> None:
    made = loader(Count(10), 4, 4, repeat=False, num_workers=workers)
    for _ in range(2):
        steps = taken(made, 0, made.order.steps_per_epoch)
        assert [flat(step) for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert made.order.samples(3) == 10
    whole = loader(Count(8), 4, 2, repeat=False, num_workers=workers)
    assert len(taken(whole, 0, whole.order.steps_per_epoch)) == 2
    assert whole.order.samples(2) == 8


def test_a_short_last_step_is_left_out_where_asked() -> None:
    made = loader(Count(10), 4, 4, drop_last=True)
    assert [flat(step) for step in taken(made, 0, 5)] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2 + [[0, 1, 2, 3]]
    assert made.order.samples(5) == 20


@pytest.mark.parametrize("kind", [Plain, Stateful, Count, Sized])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", range(1, 9))
def test_going_on_continues_with_what_was_not_trained(
    kind: Any, workers: int, stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    """31 samples, 12 a step; the run ends after `stop` steps, when the next two are fetched already."""
    caplog.set_level(logging.INFO, "runner")
    whole = taken(loader(kind(31), 12, 4), 0, 9)
    trained = 0
    first = loader(kind(31), 12, 4, num_workers=workers, trained=lambda: trained)
    steps = first.steps(0, 9)
    for number in range(min(stop + 2, 9)):
        # A checkpoint of step n is written while the step after it is there already.
        next(steps)
        trained = min(number, stop)
    trained = stop
    saved = first.state_dict()
    assert saved["step"] == stop
    again = loader(kind(31), 12, 4, num_workers=workers, reader=1, readers=2)
    again.load_state_dict(saved)
    assert again.order.samples(stop) == stop // 3 * 31 + stop % 3 * 12
    other = loader(kind(31), 12, 4, num_workers=workers, reader=0, readers=2)
    other.load_state_dict(saved)
    rest = [sorted(flat(a) + flat(b)) for a, b in zip(taken(other, stop, 9), taken(again, stop, 9), strict=True)]
    assert rest == [sorted(flat(step)) for step in whole[stop:]]
    skipped = [record for record in caplog.records if "reading past" in record.message]
    assert len(skipped) == (1 if stop % 3 and kind is not Stateful else 0)


def test_a_state_of_its_own_saves_reading() -> None:
    first = loader(Stateful(31), 12, 4)
    steps = first.steps(0, 2)
    next(steps), next(steps)
    dataset = Stateful(31)
    again = loader(dataset, 12, 4)
    again.load_state_dict(first.state_dict())
    next(again.steps(2, 3))
    assert dataset.read == 7


def test_elements_of_any_kind_and_a_collate_of_ones_own() -> None:
    class Words:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter({"text": "abc"[:n], "label": n, "pair": None} for n in (1, 2, 3, 1))

    (batch,), _ = next(loader(Words(), 3, 3).steps(0, 1))
    assert batch["text"] == ["a", "ab", "abc"]
    assert batch["label"].tolist() == [1, 2, 3]
    assert batch["pair"] is None
    own = loader(Words(), 3, 2, collate=lambda samples: [len(sample["text"]) for sample in samples])
    assert next(own.steps(0, 1)).batches == [[1, 2], [3]]


def test_what_is_a_stream() -> None:
    assert is_stream(Count(3))
    assert is_stream(Plain(3))
    assert is_stream(iter([1]))
    assert not is_stream([1, 2])
    assert not is_stream(torch.utils.data.TensorDataset(torch.zeros(3)))
    assert (length_of(Count(3)), length_of(Sized(3)), length_of(iter([1])), length_of([1, 2])) == (None, 3, None, 2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "options", "said"),
    [
        (Count(0), {}, "gave no sample"),
        (iter(range(12)), {}, "gave no sample the 2. time it was read"),
        (Count(5), {"drop_last": True}, "ended after 5 samples, batch.global_size is 6"),
        (Sized(10, says=13), {}, "ended after 10 samples, and its length says 13"),
        (Sized(10, says=8), {}, "goes on after 8 samples, and its length says 8"),
        ([1, 2, 3, None], {}, "sample 3 of the data set is None"),
    ],
)
def test_streams_that_are_wrong(dataset: Any, options: dict[str, Any], said: str, workers: int) -> None:
    if workers and not isinstance(dataset, (Count, list)):
        pytest.skip("an iterator cannot be sent to a worker")
    made = StreamLoader(dataset, StreamOrder(6, getattr(dataset, "says", None), **options), 3, num_workers=workers)
    with pytest.raises(InputError, match=said):
        list(made.steps(0, 5))


def test_an_error_while_reading_is_the_readers_own() -> None:
    def broken() -> Iterator[int]:
        yield from range(7)
        raise OSError("the disk is gone")

    made = loader(broken(), 6, 6)
    steps = made.steps(0, 3)
    next(steps)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


# --- Hugging Face's streams -------------------------------------------------------------------------------------------


def hugging_face(shuffled: bool) -> Any:
    datasets = pytest.importorskip("datasets")

    def rows(shards: list[int]) -> Iterator[dict[str, int]]:
        for shard in shards:
            for i in range(8):
                yield {"number": shard * 100 + i}

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})
    return stream.shuffle(seed=1, buffer_size=4) if shuffled else stream


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_streams_of_hugging_face(workers: int, shuffled: bool) -> None:
    def numbers(made: StreamLoader, first: int, stop: int) -> list[list[int]]:
        return [batch["number"].tolist() for step in made.steps(first, stop) for batch in step.batches[: step.real]]

    every = [shard * 100 + i for shard in range(4) for i in range(8)]
    made = loader(hugging_face(shuffled), 16, 4, num_workers=workers)
    found = numbers(made, 0, 4)
    one, two = found[:8], found[8:]
    assert sorted(chain.from_iterable(one)) == sorted(chain.from_iterable(two)) == every
    assert (one == two) is not shuffled
    by_reader = [
        numbers(loader(hugging_face(shuffled), 16, 4, reader=reader, readers=2, num_workers=workers), 0, 4)
        for reader in range(2)
    ]
    assert [batch for pair in zip(*by_reader, strict=True) for batch in pair] == found
    half = loader(hugging_face(shuffled), 16, 4, num_workers=workers)
    numbers(half, 0, 3)
    again = loader(hugging_face(shuffled), 16, 4, num_workers=workers)
    again.load_state_dict(half.state_dict())
    assert numbers(again, 3, 4) == found[12:]
