"""G17, augmentation: what is drawn for a sample depends on no number of workers and on no resume."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: 37 samples an epoch, 8 a step: five steps, of which the last is short; two epochs.
LENGTH, SIZE, STEPS = 37, 8, 10
WORKERS = (0, 1, 2, 4)
#: What draws, and how it is fetched.
KINDS = ("torch", "all", "seldom", "many", "collate", "grouped", "stream", "shuffled", "stateful")


@dataclass(frozen=True)
class Case:
    """A loader of so many workers goes on at a step; two processes share the steps in the odd ones."""

    kind: str
    workers: int
    first: int
    readers: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.workers}w-from{self.first}-{self.readers}"


def cases(count: int, seed: int) -> list[Case]:
    """All workers with all places to go on, then again with other kinds."""
    places = [(workers, first) for first in range(STEPS) for workers in WORKERS]
    random.Random(seed).shuffle(places)
    return [Case(KINDS[number % len(KINDS)], *places[number % len(places)], 1 + number % 2) for number in range(count)]


def run(case: Case, folder: Path | None = None) -> str | None:
    """None where each step has the bits that it has without workers and without a resume, else which has not."""
    expected, states = _reference(case.kind, case.readers)
    # Whatever else draws in this process must not matter, and must not be disturbed.
    _scramble(case)
    before = _generators()
    found, _ = _steps(case.kind, case.workers, case.first, case.readers, states.get(case.first))
    if _generators() != before:
        return f"{case}: the generators of the training have moved"
    for step in range(case.first, STEPS):
        if found[step - case.first] != expected[step]:
            return f"{case}: step {step} differs"
    return None


@cache
def _reference(kind: str, readers: int) -> tuple[list[list[bytes]], dict[int, Any]]:
    return _steps(kind, 0, 0, readers, None)


def _scramble(case: Case) -> None:
    import numpy

    number = case.first * 10 + case.workers + 1
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def _generators() -> tuple[Any, ...]:
    import numpy

    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())


def _steps(kind: str, workers: int, first: int, readers: int, state: Any) -> tuple[list[list[bytes]], dict[int, Any]]:
    """Each step's micro-batches, of all readers in turn, as bytes; the streams' states before each step."""
    loaders = [_loader(kind, workers, reader, readers) for reader in range(readers)]
    for loader in loaders if state else []:
        loader.load_state_dict(json.loads(json.dumps(state)))
    found, states = [], {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        steps = [loader.steps(first, STEPS) for loader in loaders]
        for number in range(first, STEPS):
            together = [next(one) for one in steps]
            places = range(len(together[0].batches))
            batches = [step.batches[place] for place in places for step in together if place < step.real]
            found.append([batch.numpy().tobytes() for batch in batches])
            if kind in ("stream", "shuffled", "stateful"):
                loaders[0]._trained = lambda number=number: number + 1
                states[number + 1] = loaders[0].state_dict()
        for one in steps:
            one.close()
    return found, states


def _loader(kind: str, workers: int, reader: int, readers: int) -> Any:
    from runner.data.loader import Loader
    from runner.data.order import Order
    from runner.data.stream import StreamLoader, StreamOrder

    how: dict[str, Any] = {"num_workers": workers, "reader": reader, "readers": readers}
    if kind in ("stream", "shuffled", "stateful"):
        dataset = {"stream": Stream, "shuffled": Shuffled, "stateful": Stateful}[kind]()
        return StreamLoader(dataset, StreamOrder(SIZE, LENGTH, seed=3), 2, **how, collate=noisy)
    made = {"torch": Images, "seldom": Seldom, "many": Many}.get(kind, Everything)()
    lengths = torch.arange(LENGTH) * 7 % 11 if kind == "grouped" else None
    how["collate"] = noisy if kind == "collate" else torch.stack
    return Loader(made, Order(LENGTH, SIZE, 3, lengths=lengths, window=2), 2, **how)


class Images:
    """Draws from torch alone."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3) + index


class Everything(Images):
    """Draws from torch, Python and numpy, a different number of times for each sample."""

    def __getitem__(self, index: int) -> Tensor:
        import numpy

        drawn = [random.random() for _ in range(index % 3)] + [random.gauss(0, 1), numpy.random.randn()]
        return torch.randn(3) * sum(drawn) + index


class Seldom(Images):
    """Draws for few samples only, so that it takes a while until anybody knows."""

    def __getitem__(self, index: int) -> Tensor:
        import numpy

        if index % 9 == 4:
            return torch.full((3,), random.random() + numpy.random.rand() + index)
        return (torch.randn(3) if index % 7 == 2 else torch.zeros(3)) + index


class Many(Images):
    """Fetches and changes a whole micro-batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return list(torch.rand(len(indices), 3) + torch.tensor(indices)[:, None] + random.random())


class Stream(torch.utils.data.IterableDataset[Tensor]):
    """Draws for each element."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(LENGTH):
            yield torch.randn(3) * random.random() + index

    def __len__(self) -> int:
        return LENGTH


class Shuffled(Stream):
    """Draws its order as well, at the start and by a buffer."""

    def __iter__(self) -> Iterator[Tensor]:
        buffer: list[Tensor] = []
        for index in torch.randperm(LENGTH).tolist():
            buffer.append(torch.randn(3) + index)
            if len(buffer) == 7:
                yield buffer.pop(random.randrange(7))
        yield from buffer


class Stateful(Stream):
    """Goes on by a state of its own."""

    place, goes_on = 0, False

    def __iter__(self) -> Iterator[Tensor]:
        self.place = self.place if self.goes_on else 0
        self.goes_on = False
        while self.place < LENGTH:
            self.place += 1
            yield torch.randn(3) + self.place

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place, self.goes_on = state["place"], True


def noisy(samples: list[Tensor]) -> Tensor:
    """A collate that draws."""
    return torch.stack(samples) + torch.randn(3) * random.random()
