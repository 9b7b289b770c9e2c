"""Prepared loaders: still a DataLoader, whose batches are this process's own, on its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sized
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from runner import collectives, distributed
from runner.api.sampling import Epoch, Marked, SeededSampler, Shard, SharedStream, reseed
from runner.api.window import Flow, Pass, Share, closing
from runner.data.loader import to_device
from runner.errors import RunnerError, wrong

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
        self._epoch = Epoch()
        self._skip = 0
        self._underway: Pass | None = None
        self._streams = isinstance(source.dataset, IterableDataset)
        dispatch = self._streams if sharing.dispatch is None else sharing.dispatch
        self._agreed = False
        self._dispatches = dispatch and sharing.world > 1 and not self._shards_itself()
        self._generator: torch.Generator | None = None
        self._shard: Shard | None = None
        self._inner = self._share_out(self._ordered(source))
        #: What workers' seeds are drawn from, where they follow from the seed: torch's own generator is left alone.
        self._workers: torch.Generator | None = None
        if sharing.seed is not None and self._inner.generator is None:
            self._inner.generator = self._workers = torch.Generator()
        _show(self, self._inner)

    # --- what it is made of ------------------------------------------------------------------------------------------

    def _shards_itself(self) -> bool:
        """Whether the user's loader already gives each process its own: it is then left alone."""
        sampler = getattr(self._source.batch_sampler, "sampler", self._source.sampler)
        if isinstance(sampler, DistributedSampler):
            return bool(sampler.num_replicas == self._sharing.world)
        return self._streams and _shards(self._source.dataset) >= self._sharing.world > 1

    def _ordered(self, source: DataLoader[Any]) -> DataLoader[Any]:
        """The loader with an order that all processes agree on, and that follows from the seed where there is one."""
        sharing = self._sharing
        if self._streams or (sharing.seed is None and (sharing.world == 1 or self._dispatches)):
            return source
        held = source.batch_sampler
        sampler: Any = getattr(held, "sampler", None) if held is not None else source.sampler
        if sampler is None or not hasattr(sampler, "generator") or isinstance(sampler, DistributedSampler):
            return source
        if sampler.generator is not None:
            # The user's own order; its state must be the same everywhere.
            sampler.generator.set_state(distributed.broadcast(sampler.generator.get_state()))
            return source
        plain = isinstance(sampler, RandomSampler) and not sampler.replacement
        if sharing.seed is not None and plain and sampler.num_samples == len(source.dataset):  # type: ignore[arg-type]
            sampler = SeededSampler(sampler.num_samples, sharing.seed, self._epoch)
        else:
            sampler = copy(sampler)
            sampler.generator = self._generator = torch.Generator()
            number = int(torch.empty((), dtype=torch.int64).random_())
            self._generator.manual_seed(distributed.broadcast(number))
        return _with_sampler(source, sampler)

    def _share_out(self, source: DataLoader[Any]) -> DataLoader[Any]:
        """The loader that this process iterates."""
        sharing = self._sharing
        inner = copy(source)
        inner.__dict__["_iterator"] = None
        if self._streams:
            return self._stream(inner)
        if self._shards_itself() or self._dispatches:
            return inner
        batches: Any = source.batch_sampler if source.batch_sampler is not None else source.sampler
        if sharing.split and sharing.world > 1:
            _check_split(batches, sharing.world)
        drop_last = bool(getattr(batches, "drop_last", False))
        split = sharing.split and sharing.world > 1
        self._shard = Shard(batches, sharing.rank, sharing.world, split=split, even=self._even, drop_last=drop_last)
        inner.__dict__["batch_sampler" if source.batch_sampler is not None else "sampler"] = self._shard
        return inner

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
            if self._shard is not None:
                self._shard.company = False
                return len(self._shard)
            return len(self._inner)
        batches = len(self._inner)
        if self._sharing.split:
            return batches
        rounds, rest = divmod(batches, self._sharing.world)
        if self._inner.drop_last:
            return rounds
        return rounds + ((rest > 0) if self._even() else (self._sharing.rank < rest))

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
        self._epoch.number = epoch
        self._underway = None
        held = self._source.batch_sampler
        for item in (held, getattr(held, "sampler", None), self._source.sampler, self._inner.dataset):
            if callable(tell := getattr(item, "set_epoch", None)):
                tell(epoch)

    def skipping(self, batches: int) -> Loader:
        """This loader without its first `batches` batches, in its first pass only; both count epochs together."""
        other = copy(self)
        other.__dict__["_skip"] = self._skip + batches
        inner = copy(self._inner)
        inner.__dict__["_iterator"] = None
        if self._shard is not None:
            shard = copy(self._shard)
            other.__dict__["_shard"] = shard
            inner.__dict__["batch_sampler" if inner.batch_sampler is not None else "sampler"] = shard
        other.__dict__["_inner"] = inner
        _show(other, inner)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the epoch, and the batches of it that this process has seen."""
        under = self._underway
        return {"epoch": self._epoch.number, "batches": 0 if under is None or under.closed else under.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the epoch; the batches of it that were seen are left out by `Engine.skip_first_batches`."""
        self.set_epoch(state["epoch"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._underway is not None and not self._underway.closed:
            self._epoch.number += 1  # the pass before was left without being closed
        self._underway = one = Pass(self._flow)
        return self._passing(one)

    def _passing(self, one: Pass) -> Iterator[Any]:
        try:
            with closing(one):
                if self._generator is not None and self._sharing.seed is not None:
                    reseed(self._generator, self._epoch, self._sharing.seed, "order")
                if self._workers is not None and self._sharing.seed is not None:
                    reseed(self._workers, self._epoch, self._sharing.seed, "workers", self._sharing.rank)
                skip, self._skip = self._skip, 0
                if self._dispatches:
                    yield from self._dispatched(one, skip)
                else:
                    yield from self._given(one, skip)
        finally:
            if self._underway is one:
                self._epoch.number += 1
                self._underway = None

    def _place(self, batch: Any) -> Any:
        return batch if self._sharing.device is None else to_device(batch, self._sharing.device)

    # --- where batches come from -------------------------------------------------------------------------------------

    def _given(self, one: Pass, skip: int) -> Iterator[Any]:
        """Batches that this process reads itself, with a look ahead where nobody knows how many there are."""
        company = self._sharing.world > 1 and not self._even() and self._training()
        rounds, length = self._read(skip, company), self._length(skip, company)
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

    def _read(self, skip: int, company: bool) -> _Rounds:
        if self._shard is not None:
            self._shard.skip, self._shard.company = skip, company
            for batch in self._inner:
                yield batch, self._shard.next_share()
            return
        own = self._own(skip)
        yield from self._in_company(own) if self._agreed and (self._even() or company) else own

    def _own(self, skip: int) -> _Rounds:
        marked = isinstance(self._inner.collate_fn, Marked)
        for batch in islice(self._inner, skip, None):
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

    def _dispatched(self, one: Pass, skip: int) -> Iterator[Any]:
        """Batches that process 0 reads and sends."""
        company = not self._even() and self._training()
        sent = self._sent(skip, company) if self._sharing.rank == 0 else None
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

    def _sent(self, skip: int, company: bool) -> Iterator[list[Any]]:
        """A message for every process, round by round: (batch, its share, the shares to come, whether it is the last).

        An error travels as the message, so that nobody waits for what will not come.
        """
        world = self._sharing.world
        try:
            rounds = islice(self._rounds(company), skip, None)
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

    def _rounds(self, company: bool) -> Iterator[list[tuple[Any, Share | None]]]:
        """(batch, share) for each process."""
        world = self._sharing.world
        if self._sharing.split:
            yield from (self._cut(batch, company) for batch in self._inner)
            return
        first: list[Any] = []
        batches = iter(self._inner)
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
