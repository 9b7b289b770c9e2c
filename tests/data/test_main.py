"""One process reads for all; streams that end raggedly; both over true processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch.utils.data import IterableDataset

from runner import distributed
from runner.data.loader import Loader
from runner.data.main import MainLoader, Remote
from runner.data.order import Order
from runner.data.reading import Reading
from runner.errors import InputError, RunnerError

pytestmark = pytest.mark.usefixtures("quiet")


class Texts:
    """Dynamic padding, fields that are no tensors, and a length a sample."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.lengths = [1 + i % 4 for i in range(samples)]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"ids": [i] * self.lengths[i], "text": f"t{i}", "more": (None, {"n": i})}


class Stream(IterableDataset):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(sample["ids"]) for sample in samples)
    ids = torch.tensor([sample["ids"] + [0] * (longest - len(sample["ids"])) for sample in samples])
    return {"ids": ids, "text": [sample["text"] for sample in samples], "more": samples[0]["more"]}


def plain(batch: dict[str, Any]) -> tuple[Any, ...]:
    return batch["ids"].tolist(), batch["text"], batch["more"]


def parts_of(dataset: Any, *, main: bool, evaluation: bool = False, workers: int = 0, group: bool = False) -> Any:
    """Each step's batches of this process, how many are its own, and the samples seen after it."""
    rank, world = distributed.rank(), distributed.world_size()
    how: dict[str, Any] = {"main": main, "collate": padded, "num_workers": workers, "group_by_length": group}
    reading = Reading(reader=rank, readers=world, **how)
    told = Remote.of(dataset) if main and rank else dataset
    if evaluation:
        made = reading.evaluation(told, 3)
        stop = min(made.order.steps_per_epoch, 99)
    else:
        made = reading.training(told, 6 * world, 3, 1)
        stop = 7
    found = []
    for number, step in enumerate(made.steps(0, stop)):
        found.append(([plain(batch) for batch in step.batches], step.real, made.order.samples(number + 1)))
    return found


def everything(main: bool) -> list[Any]:
    results = []
    for samples in (1, 5, 25, 29):
        for stream in (False, True):
            dataset: Any = Stream(Texts(samples)) if stream else Texts(samples)
            for evaluation in (False, True):
                results.append(parts_of(dataset, main=main, evaluation=evaluation))
            results.append(parts_of(dataset, main=main, workers=1))
    results.append(parts_of(Texts(29), main=main, group=True))
    return results


def both() -> tuple[list[Any], list[Any]]:
    return everything(False), everything(True)


@pytest.mark.parametrize("world", [2, 3])
def test_one_process_reads_and_all_get_what_they_would_have_read(world: int) -> None:
    for reads, sent in run_ranks(both, world):
        assert reads == sent


def caught(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        return "no error", repr(call())
    except RunnerError as error:
        return type(error).__name__, str(error)
    except OSError as error:
        return "OSError", str(error)


class Broken:
    """Cannot be read beyond its fourth sample."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> int:
        if i >= 4:
            raise OSError("the disk is gone")
        return i


def ragged() -> list[tuple[str, str]]:
    """What each process is told where the streams of several differ, or one cannot be read."""
    rank = distributed.rank()

    def steps(dataset: Any, *, main: bool = False, stream: bool = True) -> Callable[[], Any]:
        reading = Reading(reader=rank, readers=2, main=main)
        if not stream:
            order = Order(12, 4, shuffle=False)
            source = Loader(dataset, order, 2) if rank == 0 else None
            return lambda: [
                b.tolist() for s in MainLoader(source, order, reader=rank, readers=2).steps(0, 3) for b in s[0]
            ]
        return lambda: [b.tolist() for s in reading.training(dataset, 4, 2, 0).steps(0, 4) for b in s[0]]

    return [
        caught(steps(Stream(range(10 - rank)))),
        caught(steps(Stream(Broken() if rank else range(12)))),
        caught(steps(Broken(), stream=False)),
        caught(steps(Stream(Broken()) if rank == 0 else Remote(None, True), main=True)),
        caught(steps(Stream([]) if rank == 0 else Remote(None, True), main=True)),
        caught(steps(Stream(range(9)) if rank == 0 else Remote(None, True), main=True)),
    ]


def test_streams_that_end_raggedly_or_break_stop_all_processes() -> None:
    one, other = run_ranks(ragged, 2, timeout=40)
    assert one[0][0] == other[0][0] == "InputError"
    assert "2 samples of this step here" in one[0][1]
    assert "1 samples of this step here" in other[0][1]
    assert one[1] == ("Follows", "another process could not read its data")
    assert other[1] == ("OSError", "the disk is gone")
    for number in (2, 3):
        assert one[number] == ("OSError", "the disk is gone")
        assert other[number] == ("NotRead", "the first process could not read the data")
    assert one[4][0] == "InputError"
    assert other[4][0] == "NotRead"
    # 9 samples, 4 a step, and again: the third step has one, and the second process a batch that counts nothing.
    assert one[5] == ("no error", "[[0, 1], [4, 5], [8], [0, 1]]")
    assert other[5] == ("no error", "[[2, 3], [6, 7], [8], [2, 3]]")


def test_the_others_know_how_long_the_data_are() -> None:
    assert Remote.of(Texts(7)) == Remote(7, False)
    assert Remote.of(Stream(Texts(7))) == Remote(None, True)
    with pytest.raises(InputError):
        parts_of(Stream([]), main=False)
