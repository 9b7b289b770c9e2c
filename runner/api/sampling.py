"""Which batches are whose: index batches and streams shared out among processes, and orders that need no state."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler

from runner.api.window import Pass, Share
from runner.data.order import Permutation
from runner.keyed import keyed

_BLOCK = 65_536


class Epoch:
    """Where a loader stands: how many passes have begun before the present one; copies of the loader share it."""

    def __init__(self, base: int | None) -> None:
        self.number = 0
        #: What the order of every pass follows beside its number; None: each pass draws its own.
        self.base = base
        #: The order that the next pass is to have, and whether it goes on with one that was interrupted.
        self.drawn: int | None = None
        self.goes_on = False
        self.underway: tuple[Pass, Turn] | None = None

    def next(self, one: Pass, turn: Turn) -> bool:
        """Begins a pass. Whether it goes on with one that was interrupted."""
        if self.underway is not None and not self.underway[0].closed:
            self.number += 1  # the pass before is left without being closed, or is still under way
        turn.begin(self.number, self.base, self.drawn)
        self.underway = one, turn
        goes_on, self.goes_on, self.drawn = self.goes_on, False, None
        return goes_on

    def ended(self, one: Pass) -> None:
        if self.underway is not None and self.underway[0] is one:
            self.number += 1
            self.underway = None

    def set(self, number: int) -> None:
        """The next pass is that of `number`."""
        if number != self.number:
            self.drawn, self.goes_on = None, False
        self.number, self.underway = number, None


class Turn:
    """What the order of one pass follows: (base, epoch), or a number that was drawn for it alone."""

    def __init__(self) -> None:
        self.epoch = 0
        self.base: int | None = None
        self.drawn: int | None = None
        self.skipped = 0
        #: A random sampler of another kind, whose generator follows (base, epoch) where there is a base.
        self.sampler: Any = None

    def begin(self, epoch: int, base: int | None, drawn: int | None) -> None:
        self.epoch, self.base, self.drawn = epoch, base, drawn
        if self.sampler is not None:
            self.sampler.generator = None if base is None else torch.Generator()
            if base is not None:
                reseed(self.sampler.generator, base, "order", epoch)


class OrderedSampler(Sampler[int]):
    """All indices of a data set in an order of its turn; without a base that which torch's own sampler would draw."""

    def __init__(self, length: int, turn: Turn) -> None:
        self._length, self._turn = length, turn

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        turn = self._turn
        if turn.base is None or turn.drawn is not None:
            if turn.drawn is None:
                turn.drawn = int(torch.empty((), dtype=torch.int64).random_().item())
            generator = torch.Generator().manual_seed(turn.drawn)
            yield from torch.randperm(self._length, generator=generator).tolist()
            return
        order = Permutation(self._length, turn.base, "order", turn.epoch)
        for start in range(0, self._length, _BLOCK):
            yield from order(torch.arange(start, min(start + _BLOCK, self._length))).tolist()


def reseed(generator: torch.Generator, *key: int | str) -> None:
    """Starts a generator as a function of the key."""
    generator.manual_seed(keyed(*key) % 2**63)


class Shard:
    """This process's part of the batches of a (batch) sampler.

    Whole batches go round the processes, process r takes r, r + N, ...; with `split` each batch is cut into N equal
    pieces. `even` fills the last round up with samples of the first, so that all processes have the same number of
    full batches; without it they have what is left. What `drop_last` says of batches also holds for rounds.

    Iterating puts a Share for every batch into a queue that `shares` returns.
    """

    def __init__(
        self, batches: Iterable[Any], rank: int, world: int, *, split: bool, even: Callable[[], bool], drop_last: bool
    ) -> None:
        self.batches = batches
        self._rank, self._world = rank, world
        self._split, self._even, self._drop_last = split, even, drop_last
        self._size: int | None = getattr(batches, "batch_size", None)
        self.skip = 0
        #: Whether a process without a batch of its own takes part with one that weighs nothing.
        self.company = False
        self._shares: deque[Share] = deque()

    def next_share(self) -> Share:
        return self._shares.popleft()

    def __iter__(self) -> Iterator[Any]:
        shares: deque[Share] = deque()
        self._shares = shares
        skip, self.skip = self.skip, 0
        for batch, share in islice(self._split_up() if self._split else self._dealt(), skip, None):
            shares.append(share)
            yield batch

    def __len__(self) -> int:
        batches = len(self.batches)  # type: ignore[arg-type]
        if self._split:
            return batches - (not self._even() and self._no_piece_of_the_last(batches))
        rounds, rest = divmod(batches, self._world)
        if self._drop_last:
            return rounds
        return rounds + ((rest > 0) if self._even() else (self._rank < rest))

    def _no_piece_of_the_last(self, batches: int) -> bool:
        sampler = getattr(self.batches, "sampler", None)
        if self._drop_last or self._size is None or not isinstance(sampler, Sized):
            return False
        last = len(sampler) - (batches - 1) * self._size
        return last <= self._rank * (self._size // self._world)

    def _dealt(self) -> Iterator[tuple[Any, Share]]:
        first: list[Any] = []
        group: list[Any] = []
        for batch in self.batches:
            group.append(batch)
            if len(group) == self._world:
                first = first or group
                yield from self._round(group, first)
                group = []
        if group and not self._drop_last:
            yield from self._round(group, first or group)

    def _round(self, group: list[Any], first: list[Any]) -> Iterator[tuple[Any, Share]]:
        """This process's batch of a round of at most a batch for each process; one alone gets them as they are."""
        even = self._even() and self._world > 1
        missing = self._world - len(group)
        active = None if even else len(group)
        if not even or not isinstance(group[0], list):
            if self._rank < len(group):
                yield group[self._rank], Share(_count(group[self._rank]), _count(group[self._rank]), active)
            elif even or self.company:
                stand_in = first[(self._rank - len(group)) % len(first)]
                yield stand_in, Share(_count(stand_in), 0, active, idle=not even)
            return
        real = len(group[self._rank]) if self._rank < len(group) else 0
        if missing or any(len(batch) < (self._size or 0) for batch in group):
            group = self._filled(group, first)
        yield group[self._rank], Share(len(group[self._rank]), real)

    def _filled(self, group: list[Any], first: list[Any]) -> list[Any]:
        """The round with its missing and short batches filled with samples from the beginning."""
        if self._size is None:
            return [*group, *islice(cycle(first), self._world - len(group))]
        again = cycle([sample for batch in first for sample in batch])
        whole = [*group, *([] for _ in range(self._world - len(group)))]
        return [[*batch, *islice(again, max(0, self._size - len(batch)))] for batch in whole]

    def _split_up(self) -> Iterator[tuple[Any, Share]]:
        first: list[Any] = []
        assert self._size is not None
        piece = self._size // self._world
        start = self._rank * piece
        for batch in self.batches:
            first = first or batch
            own = batch[start : start + piece]
            if len(batch) == self._size:
                yield own, Share(piece, piece)
            elif not self._drop_last:
                active = -(-len(batch) // piece)
                if self._even():
                    filled = [*batch, *islice(cycle(first), self._size - len(batch))]
                    yield filled[start : start + piece], Share(piece, len(own))
                elif own:
                    yield own, Share(len(own), len(own), active)
                elif self.company:
                    yield batch[:piece], Share(min(piece, len(batch)), 0, active, idle=True)


def _count(batch: Any) -> int | None:
    return len(batch) if isinstance(batch, (list, tuple)) else None


class SharedStream(IterableDataset[Any]):
    """This process's elements of an iterable data set that every process reads: `size` of each `size` x N.

    Yields (element, whether it is its own): `even` fills the last round up with elements of the first.
    """

    def __init__(
        self, dataset: Iterable[Any], rank: int, world: int, size: int, *, even: bool, drop_last: bool
    ) -> None:
        self._dataset = dataset
        self._rank, self._world, self._size = rank, world, size
        self._even, self._drop_last = even, drop_last

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        whole = self._size * self._world
        own = slice(self._rank * self._size, (self._rank + 1) * self._size)
        first: list[Any] = []
        chunk: list[Any] = []
        for element in self._dataset:
            chunk.append(element)
            if len(chunk) == whole:
                first = first or chunk
                yield from ((item, True) for item in chunk[own])
                chunk = []
        if not chunk or self._drop_last:
            return
        marked = [(item, True) for item in chunk]
        if self._even:
            marked += [(item, False) for item in islice(cycle(first or chunk), whole - len(chunk))]
        yield from marked[own]


class Marked:
    """A collate function for elements that carry whether they are this process's own: (batch, size, own)."""

    def __init__(self, collate: Callable[[Any], Any], batched: bool) -> None:
        self._collate, self._batched = collate, batched

    def __call__(self, elements: Any) -> tuple[Any, int | None, int | None]:
        if not self._batched:
            element, own = elements
            return self._collate(element), None, None if own else 0
        return self._collate([item for item, _ in elements]), len(elements), sum(own for _, own in elements)
