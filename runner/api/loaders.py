"""Prepared loaders: still a DataLoader, whose batches are this process's own, on its device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sized
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from runner import collectives, distributed
from runner.api.sampling import Epoch, Marked, OrderedSampler, Shard, SharedStream, Turn, reseed
from runner.api.window import Flow, Pass, Share, closing
from runner.data.loader import to_device
from runner.errors import RunnerError, wrong

_log = logging.getLogger("runner")

_Rounds = Iterator[tuple[Any, Share]]


@dataclass(frozen=True)
class Sharing:
    """How a loader is shared out; the words are those of Engine's options."""

    rank: int
    world: int
    device: torch.device | None
    split: bool = False
    dispatch: bool | None = None
    seed: int | None = None


class Reader(NamedTuple):
    """What one pass reads through; passes that are under way at the same time have one each."""

    inner: DataLoader[Any]
    shard: Shard | None
    turn: Turn


class Loader(DataLoader[Any]):
    """A user's loader with everything it has: sampler, batch sampler, collate function, generator, workers, pinning.

    Made by `Engine.prepare`; `len()` is the number of batches that this process will see.
    """

    def __init__(
        self,
        source: DataLoader[Any],
        sharing: Sharing,
        flow: Flow,
        even: Callable[[], bool],
        training: Callable[[], bool],
    ) -> None:
        # A copy of what the user's loader is, instead of an equal one made anew: nothing can get lost on the way.
        self.__dict__.update(source.__dict__)
        self._source, self._sharing, self._flow = source, sharing, flow
        self._even, self._training = even, training
        self._skip = 0
        self._streams = isinstance(source.dataset, IterableDataset)
        dispatch = self._streams if sharing.dispatch is None else sharing.dispatch
        self._agreed = False
        self._dispatches = dispatch and sharing.world > 1 and not self._shards_itself()
        self._epoch = Epoch(self._base())
        #: What workers' seeds are drawn from, where they follow from the seed: torch's own generator is left alone.
        self._workers = torch.Generator() if sharing.seed is not None and source.generator is None else None
        first = self._reader()
        self._inner, self._shard = first.inner, first.shard
        self._idle = [first]
        _show(self, self._inner)

    # --- what it is made of ------------------------------------------------------------------------------------------

    def _shards_itself(self) -> bool:
        """Whether the user's loader already gives each process its own: it is then left alone."""
        sampler = getattr(self._source.batch_sampler, "sampler", self._source.sampler)
        if isinstance(sampler, DistributedSampler):
            return bool(sampler.num_replicas == self._sharing.world)
        return self._streams and _shards(self._source.dataset) >= self._sharing.world > 1

    def _sampler(self) -> Any:
        """The sampler that gives the samples' order, where it is one that draws and the processes have to agree."""
        held: Any = self._source.batch_sampler
        sampler = getattr(held, "sampler", None) if held is not None else self._source.sampler
        drawn = hasattr(sampler, "generator") and not isinstance(sampler, DistributedSampler)
        return sampler if drawn and not self._streams else None

    def _base(self) -> int | None:
        """What the order follows beside the epoch, the same on all processes; None: what one process draws."""
        sampler, sharing = self._sampler(), self._sharing
        if sampler is None:
            return None
        if sampler.generator is not None:
            # The user's own order; its state must be the same everywhere.
            sampler.generator.set_state(distributed.broadcast(sampler.generator.get_state()))
            return None
        if sharing.seed is not None or sharing.world == 1 or self._dispatches:
            return sharing.seed
        return int(distributed.broadcast(int(torch.empty((), dtype=torch.int64).random_())))

    def _reader(self) -> Reader:
        """All that one pass changes while it goes on, made anew."""
        turn = Turn()
        if not self._streams:
            inner, shard = self._share_out(self._ordered(turn))
        else:
            known = self.__dict__.get("_inner")
            inner, shard = copy(self._stream(copy(self._source)) if known is None else known), None
        inner.__dict__["_iterator"] = None
        if self._workers is not None:
            inner.generator = self._workers
        return Reader(inner, shard, turn)

    def _ordered(self, turn: Turn) -> DataLoader[Any]:
        """The user's loader with an order that all processes agree on, and that can be had again."""
        source, sampler = self._source, self._sampler()
        if sampler is None or sampler.generator is not None:
            return source
        plain = isinstance(sampler, RandomSampler) and not sampler.replacement
        if plain and sampler.num_samples == len(source.dataset):  # type: ignore[arg-type]
            return _with_sampler(source, OrderedSampler(sampler.num_samples, turn))
        turn.sampler = copy(sampler)
        return _with_sampler(source, turn.sampler)

    def _share_out(self, source: DataLoader[Any]) -> tuple[DataLoader[Any], Shard | None]:
        """The loader that this process iterates."""
        sharing = self._sharing
        inner = copy(source)
        if self._shards_itself() or self._dispatches:
            return inner, None
        batches: Any = source.batch_sampler if source.batch_sampler is not None else source.sampler
        split = sharing.split and sharing.world > 1
        if split:
            _check_split(batches, sharing.world)
        drop_last = bool(getattr(batches, "drop_last", False))
        shard = Shard(batches, sharing.rank, sharing.world, split=split, even=self._even, drop_last=drop_last)
        inner.__dict__["batch_sampler" if source.batch_sampler is not None else "sampler"] = shard
        return inner, shard

    def _stream(self, inner: DataLoader[Any]) -> DataLoader[Any]:
        sharing = self._sharing
        if sharing.world == 1 or self._dispatches:
            return inner
        self._agreed = True
        if self._shards_itself():
            from datasets.distributed import split_dataset_by_node

            dataset: Any = split_dataset_by_node(inner.dataset, sharing.rank, sharing.world)  # type: ignore[type-var]
            inner.__dict__["dataset"] = dataset
            return inner
        size = inner.batch_size or 1
        if sharing.split:
            _check_split(inner.batch_sampler, sharing.world)
            size //= sharing.world
            sampler = copy(inner.batch_sampler)
            sampler.batch_size = size  # type: ignore[union-attr]
            inner.__dict__["batch_sampler"] = sampler
        inner.__dict__["dataset"] = SharedStream(
            cast(Any, inner.dataset), sharing.rank, sharing.world, size, even=self._even(), drop_last=inner.drop_last
        )
        inner.__dict__["collate_fn"] = Marked(inner.collate_fn, inner.batch_size is not None)
        return inner

    # --- what a loop sees --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return max(0, self._whole_length() - self._skip)

    def _whole_length(self) -> int:
        if not self._dispatches:
            return len(self._inner if self._shard is None else self._shard)
        batches = len(self._inner)
        if self._sharing.split:
            return batches - (not self._even() and self._samples_of_the_last(batches) <= self._sharing.rank)
        rounds, rest = divmod(batches, self._sharing.world)
        if self._inner.drop_last:
            return rounds
        return rounds + ((rest > 0) if self._even() else (self._sharing.rank < rest))

    def _samples_of_the_last(self, batches: int) -> int:
        """How many samples the last of all batches holds; a full batch's where that is not known."""
        held: Any = self._inner.batch_sampler
        samples = self._inner.dataset if self._streams else getattr(held, "sampler", None)
        size = getattr(held, "batch_size", None) or self._sharing.world
        if self._inner.drop_last or not batches or not isinstance(samples, Sized):
            return size
        return len(samples) - (batches - 1) * size

    @property
    def total_batch_size(self) -> int:
        """Samples of one round over all processes."""
        size = getattr(self._source.batch_sampler, "batch_size", None) or self._source.batch_size or 1
        return int(size) * (1 if self._sharing.split else self._sharing.world)

    @property
    def total_dataset_length(self) -> int:
        """Samples of the data set over all processes."""
        return len(self._source.dataset)  # type: ignore[arg-type]

    @property
    def epoch(self) -> int:
        """The number of the present or the next pass, from 0: what the order of a seeded loader follows."""
        return self._epoch.number

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of `epoch`; a sampler or data set of the user's own that can be told, is told too."""
        self._epoch.set(epoch)
        held = self._source.batch_sampler
        for item in (held, getattr(held, "sampler", None), self._source.sampler, self._inner.dataset):
            if callable(tell := getattr(item, "set_epoch", None)):
                tell(epoch)

    def skipping(self, batches: int) -> Loader:
        """This loader without its first `batches` batches, in its first pass only; both count epochs together."""
        other = copy(self)
        other.__dict__["_skip"] = self._skip + batches
        return other

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the epoch, the batches of it that this process has seen, and what orders follow."""
        epoch = self._epoch
        stands = {"epoch": epoch.number, "batches": 0, "base": epoch.base, "drawn": epoch.drawn}
        if epoch.underway is None or epoch.underway[0].closed:
            return stands
        one, turn = epoch.underway
        if one.count and not one.remaining():
            return {**stands, "epoch": epoch.number + 1, "drawn": None}  # at its last batch: the next pass follows
        return {**stands, "batches": turn.skipped + one.count, "drawn": turn.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the epoch; the batches of it that were seen are left out by `Engine.skip_first_batches`."""
        self.set_epoch(state["epoch"])
        epoch = self._epoch
        epoch.drawn, epoch.goes_on = state.get("drawn"), state["batches"] > 0
        if self._sharing.seed is None and state.get("base") is not None:
            epoch.base = state["base"]
        sampler = self._sampler()
        unknown = sampler is not None and (sampler.generator is not None or epoch.base is None)
        if epoch.goes_on and unknown and epoch.drawn is None and self._sharing.rank == 0:
            _log.warning(
                "load_state: the order of a loader that was in the middle of an epoch cannot be had again, and samples "
                "may come twice or never: give Engine(seed=...), and no generator of your own, before you save"
            )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        reader = self._idle.pop() if self._idle else self._reader()
        one = Pass(self._flow)
        goes_on = self._epoch.next(one, reader.turn)
        skip, self._skip = self._skip, 0
        reader.turn.skipped = skip
        return self._passing(one, reader, skip, goes_on)

    def _passing(self, one: Pass, reader: Reader, skip: int, goes_on: bool) -> Iterator[Any]:
        try:
            with closing(one):
                if self._workers is not None and self._sharing.seed is not None:
                    reseed(self._workers, self._sharing.seed, "workers", self._sharing.rank, reader.turn.epoch)
                if self._dispatches:
                    yield from self._dispatched(one, reader, skip, goes_on)
                else:
                    yield from self._given(one, reader, skip, goes_on)
        finally:
            self._epoch.ended(one)
            self._idle.append(reader)

    def _place(self, batch: Any) -> Any:
        return batch if self._sharing.device is None else to_device(batch, self._sharing.device)

    # --- where batches come from -------------------------------------------------------------------------------------

    def _given(self, one: Pass, reader: Reader, skip: int, goes_on: bool) -> Iterator[Any]:
        """Batches that this process reads itself, with a look ahead where nobody knows how many there are."""
        company = self._sharing.world > 1 and not self._even() and self._training()
        rounds, length = self._read(reader, skip, company, goes_on), self._length(skip, company)
        waiting: deque[tuple[Any, Share]] = deque()
        over = False
        while True:
            ahead = 0 if length is not None else max(1, self._flow.lookahead)
            while not over and len(waiting) <= ahead:
                item = next(rounds, None)
                if item is None:
                    over = True
                else:
                    waiting.append(item)
            if not waiting:
                return
            batch, share = waiting.popleft()
            one.coming = [later for _, later in waiting]
            one.left = None if length is None else max(0, length - one.count - 1)
            one.give(share)
            yield self._place(batch)

    def _length(self, skip: int, company: bool) -> int | None:
        """The batches to come where that is certain without looking."""
        if self._streams or company or not isinstance(self._inner._index_sampler, Sized):
            return None
        try:
            return max(0, self._whole_length() - skip)
        except TypeError:
            return None  # a sampler of the user's whose own parts have no length

    def _read(self, reader: Reader, skip: int, company: bool, goes_on: bool) -> _Rounds:
        if reader.shard is not None:
            reader.shard.skip, reader.shard.company = skip, company
            for batch in _begun(reader.inner, goes_on):
                yield batch, reader.shard.next_share()
            return
        own = self._own(reader, skip, goes_on)
        yield from self._in_company(own) if self._agreed and (self._even() or company) else own

    def _own(self, reader: Reader, skip: int, goes_on: bool) -> _Rounds:
        marked = isinstance(reader.inner.collate_fn, Marked)
        for batch in islice(_begun(reader.inner, goes_on), skip, None):
            if marked:
                batch, size, real = batch
                yield batch, Share(size, real)
            else:
                yield batch, Share(_rows(batch), _rows(batch))

    def _in_company(self, own: _Rounds) -> _Rounds:
        """As many rounds as the process with the most has: one that has no more repeats what weighs nothing."""
        mine: Any = None
        while True:
            item = next(own, None)
            known = distributed.gather((item is not None, mine is not None))
            active = sum(has for has, _ in known)
            if active == 0:
                return
            if not all(has or had for has, had in known):
                source = next(rank for rank, (has, _) in enumerate(known) if has)
                lent = collectives.broadcast(item[0] if item is not None else None, source)
                mine = lent if mine is None else mine
            if item is None:
                yield mine, Share(_rows(mine), 0, self._counted(active), idle=not self._even())
            else:
                mine = item[0]
                yield mine, item[1]._replace(active=self._counted(active))

    def _dispatched(self, one: Pass, reader: Reader, skip: int, goes_on: bool) -> Iterator[Any]:
        """Batches that process 0 reads and sends."""
        company = not self._even() and self._training()
        sent = self._sent(_begun(reader.inner, goes_on), skip, company) if self._sharing.rank == 0 else None
        while True:
            message = collectives.scatter_object(next(sent) if sent is not None else None)
            if isinstance(message, str):
                next(sent, None) if sent is not None else None  # raises it where it happened
                raise RunnerError(f"process 0 could not read the data: {message}")
            batch, share, coming, last = message
            if share is not None:
                one.coming, one.left = coming, None
                one.give(share)
                yield self._place(batch)
            if last:
                return

    def _sent(self, read: Iterator[Any], skip: int, company: bool) -> Iterator[list[Any]]:
        """A message for every process, round by round: (batch, its share, the shares to come, whether it is the last).

        An error travels as the message, so that nobody waits for what will not come.
        """
        world = self._sharing.world
        try:
            rounds = islice(self._rounds(read, company), skip, None)
            waiting = list(islice(rounds, 1 + max(1, self._flow.lookahead)))
            if not waiting:
                yield [(None, None, [], True)] * world
            while waiting:
                batches, *later = waiting
                coming = [[share for _, share in group] for group in later]
                yield [
                    (*batches[rank], [group[rank] for group in coming if group[rank] is not None], not later)
                    for rank in range(world)
                ]
                missing = 1 + max(1, self._flow.lookahead) - len(later)
                waiting = [*later, *islice(rounds, max(0, missing))]
        except Exception as error:
            yield [f"{type(error).__name__}: {error}"] * world
            raise

    def _rounds(self, batches: Iterator[Any], company: bool) -> Iterator[list[tuple[Any, Share | None]]]:
        """(batch, share) for each process."""
        world = self._sharing.world
        if self._sharing.split:
            yield from (self._cut(batch, company) for batch in batches)
            return
        first: list[Any] = []
        while group := list(islice(batches, world)):
            if len(group) < world and self._inner.drop_last:
                return
            first = first or group
            dealt: list[tuple[Any, Share | None]] = [
                (batch, Share(_rows(batch), _rows(batch), self._counted(len(group)))) for batch in group
            ]
            for rank in range(world - len(group)):
                stand_in = first[rank % len(first)]
                dealt.append(self._stand_in(stand_in, len(group), company))
            yield dealt

    def _cut(self, batch: Any, company: bool) -> list[tuple[Any, Share | None]]:
        world, rows = self._sharing.world, _rows(batch)
        if rows is None:
            raise wrong("split_batches", "a batch holds no tensor to be cut", "dispatch_batches alone sends whole ones")
        dealt: list[tuple[Any, Share | None]] = []
        start = 0
        for rank in range(world):
            size = rows // world + (rank < rows % world)
            piece = collectives.cut(batch, rows, start, start + size)
            whole = (piece, Share(size, size, self._counted(min(rows, world))))
            first = collectives.cut(batch, rows, 0, 1)
            dealt.append(whole if size else self._stand_in(first, min(rows, world), company))
            start += size
        return dealt

    def _stand_in(self, batch: Any, active: int, company: bool) -> tuple[Any, Share | None]:
        """For a process without a batch of its own: one that counts for nothing, or none."""
        if self._even() or company:
            return batch, Share(_rows(batch), 0, self._counted(active), idle=not self._even())
        return None, None

    def _counted(self, active: int) -> int | None:
        """Processes whose batch counts: with `even` also those that repeat samples."""
        return None if self._even() else active


def _begun(inner: DataLoader[Any], goes_on: bool) -> Iterator[Any]:
    """The loader's batches. A pass that goes on with another has drawn from torch's generator already, in that one."""
    if goes_on:
        with torch.random.fork_rng(devices=[]):
            iterator = iter(inner)
    else:
        iterator = iter(inner)
    yield from iterator


def _show(loader: Loader, inner: DataLoader[Any]) -> None:
    """Lets the loader's attributes be those of what it iterates."""
    loader.__dict__["batch_sampler"] = inner.batch_sampler
    loader.__dict__["sampler"] = inner.sampler


def _with_sampler(source: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    other = copy(source)
    other.__dict__["sampler"] = sampler
    if source.batch_sampler is not None:
        batches: Any = copy(source.batch_sampler)
        batches.sampler = sampler
        other.__dict__["batch_sampler"] = batches
    return other


def _shards(dataset: Any) -> int:
    """The number of pieces in which a Hugging Face stream can be read apart; 0 for any other data set."""
    if not type(dataset).__module__.startswith("datasets."):
        return 0
    found: Any = getattr(dataset, "num_shards", None) or getattr(dataset, "n_shards", 0)
    return int(found)


def _check_split(batches: Any, world: int) -> None:
    size = getattr(batches, "batch_size", None)
    if size is None:
        why = "needs a loader whose batch size is known"
        raise wrong("split_batches", why, "give DataLoader a batch_size, or split_batches=False", value=True)
    if size % world:
        why = f"cuts every batch into {world} equal parts, and {size} % {world} = {size % world}"
        raise wrong("split_batches", why, f"a batch size that {world} divides", value=True)


def _rows(batch: Any) -> int | None:
    """Samples in a batch: the length of its first tensor."""
    for tensor in collectives.tensors_in(batch):
        if tensor.dim():
            return int(tensor.shape[0])
    return len(batch) if isinstance(batch, list) else None


def plain_without(loader: DataLoader[Any], batches: int) -> DataLoader[Any]:
    """A loader that was not prepared, without its first batches in its first pass."""
    if isinstance(loader.dataset, IterableDataset):
        raise wrong("skip_first_batches", "cannot skip in a stream that was not prepared", "prepare the loader first")
    other = copy(loader)
    held: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    shard = Shard(held, 0, 1, split=False, even=lambda: False, drop_last=False)
    shard.skip = batches
    other.__dict__[
        "batch_sampler" if isinstance(held, BatchSampler) or loader.batch_sampler is not None else "sampler"
    ] = shard
    other.__dict__["_iterator"] = None
    return other
