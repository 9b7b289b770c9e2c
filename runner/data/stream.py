"""Streams: data sets that are iterated and have no index. The same samples make the same step, whoever reads."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from runner import distributed
from runner.data.collate import Collate, collate
from runner.data.draws import Draws
from runner.data.loader import (
    Sealed,
    StepBatches,
    as_it_is,
    opened,
    received,
    refuse_none,
    sealed,
    shares,
    to_device,
)
from runner.data.worker import in_worker
from runner.errors import Follows, InputError, wrong

_log = logging.getLogger("runner")


def is_stream(dataset: Any) -> bool:
    """Whether a data set is iterated: it is an IterableDataset, or has no index."""
    if isinstance(dataset, IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


def length_of(dataset: Any) -> int | None:
    """How many samples a data set says it has; None where it does not say."""
    try:
        return len(dataset)
    except TypeError:
        return None


class StreamOrder:
    """How many samples the steps of a stream have. What is not known before the stream ends is learnt then.

    Step s of an epoch owns the elements [s * G, (s + 1) * G) of the stream, G = `global_size`; the step in which the
    stream ends is short, or left out where `drop_last`. A stream that has no length has no steps per epoch to speak
    of: `steps_per_epoch` and `samples_per_epoch` are then larger than any number.
    """

    def __init__(self, global_size: int, length: int | None = None, *, drop_last: bool = False, seed: int = 0) -> None:
        self.global_size = global_size
        self.length = length
        self.seed = seed
        self.drop_last = drop_last
        self.steps_per_epoch: int = sys.maxsize
        self.samples_per_epoch: float = float("inf")
        if length is not None:
            self.steps_per_epoch = length // global_size if drop_last else -(-length // global_size)
            self.samples_per_epoch = min(length, self.steps_per_epoch * global_size)
        #: For each epoch that has ended: the run's step after its last, and what that lacked to be whole.
        self.ends: list[tuple[int, int]] = []

    def samples(self, step: int) -> int:
        """How many samples the first `step` steps of the run have seen; without a length, of steps that were read."""
        if self.length is not None:
            epochs, rest = divmod(step, self.steps_per_epoch)
            known = int(self.samples_per_epoch)
            return epochs * known + min(rest * self.global_size, known)
        return step * self.global_size - sum(lacking for end, lacking in self.ends if end <= step)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, samples of that epoch which are seen) before step `step`."""
        if self.length is not None:
            epochs, rest = divmod(step, self.steps_per_epoch)
            return epochs, rest * self.global_size
        ended = [end for end, _ in self.ends if end <= step]
        return len(ended), (step - (ended[-1] if ended else 0)) * self.global_size

    def learn(self, step: int, told: Told) -> None:
        """Takes what reading the step has shown: whether an epoch ended before it, or with it."""
        if told.fresh and not any(end == step for end, _ in self.ends):
            self.ends.append((step, 0))
        if 0 < told.samples < self.global_size:
            self.ends.append((step + 1, self.global_size - told.samples))


class Stand(NamedTuple):
    """How a data set with a state of its own stands: the epoch of the stream, how many of its samples are read, and
    the state. An epoch that is known to be over counts as the next one with nothing read.
    """

    epoch: int
    seen: int
    state: Any


class Told(NamedTuple):
    """What reading a step has shown: its samples (0: the stream has ended for good), whether it opens a new epoch of
    the stream, and how the data set stands after it (None where it has no state of its own).
    """

    samples: int
    fresh: bool
    stand: Stand | None


#: Samples of a micro-batch, with the first one's place in the stream.
Slice = tuple[int, list[Any]]


class _Walk(IterableDataset[Any]):
    """Reads the whole stream and keeps the slices of one reader; as a data set, for workers.

    Every worker reads the whole stream as well, and makes each its share of the batches in turn.
    """

    def __init__(
        self,
        dataset: Any,
        order: StreamOrder,
        step: int,
        stand: Stand | None,
        make: Collate,
        sizes: tuple[int, int, int],
        repeat: bool,
    ) -> None:
        self._dataset, self._make, self._repeat = dataset, make, repeat
        self._micro_size, self._reader, self._readers = sizes
        self._size, self._length, self._drop_last = order.global_size, order.length, order.drop_last
        self._stateful = has_exact_state(dataset)
        # Its state says more truly than the step's number where it stands: another `global_size` may have been there.
        self._stand = stand if self._stateful else None
        self._epoch, self._seen = order.place(step) if self._stand is None else self._stand[:2]
        #: Whether what was opened may be no more than the end of the epoch before.
        self._may_be_over = False
        self._draws = Draws(order.seed)
        #: Elements that are read after one seeding: what no number of processes changes.
        self._unit = self._size if repeat else self._micro_size

    def __iter__(self) -> Iterator[tuple[Told | None, Any]]:
        """The batches of a worker, the first of each step with what reading the step has shown."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            _hide_worker()
            _unshare(self._dataset)
        turn = 0
        try:
            for told, slices in self.walk():
                for place, samples in enumerate(slices or [None]):
                    if turn % workers == number:
                        yield (told if place == 0 else None), sealed(self._batch, *samples) if samples else None
                    turn += 1
        except InputError as error:
            # All workers meet it; the one whose turn it is tells.
            if turn % workers == number:
                yield Told(0, False, None), Sealed(error)

    def walk(self) -> Iterator[tuple[Told, list[Slice]]]:
        """Step by step what reading it has shown, and this reader's samples: its own slices, then padding."""
        samples, fresh = self._open(), False
        while True:
            count, slices = self._take(samples)
            over, self._may_be_over = self._may_be_over and not count, False
            if over:
                samples = self._open()
                continue
            self._check_length(ended=count < self._size)
            if 0 < count < self._size and self._drop_last:
                count = 0
            if count:
                yield Told(count, fresh, self._left_at(count)), slices
                fresh = False
            if count == self._size:
                continue
            if not self._repeat:
                yield Told(0, True, None), []
                return
            if self._seen < (self._size if self._drop_last else 1):
                raise self._empty()
            self._epoch, self._seen, fresh = self._epoch + 1, 0, True
            samples = self._open()

    def _batch(self, start: int, samples: list[Any]) -> Any:
        try:
            if self._make is collate:
                return self._make(samples)
            with self._draws.apart() as seed:
                seed("batch", self._epoch, start)
                return self._make(samples)
        except Exception as error:
            refuse_none(samples, range(start, start + len(samples)), error)
            raise

    def _open(self) -> Iterator[Any]:
        """The stream from where this epoch stands."""
        stand, self._stand = self._stand, None
        begins, skip = self._seen == 0, self._seen
        # Between two epochs first the state, then the epoch: so it is for who reads on from the one into the other.
        if stand is not None and begins:
            self._dataset.load_state_dict(deepcopy(stand.state))
            self._may_be_over = True
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(self._epoch)
        if stand is not None and not begins:
            self._dataset.load_state_dict(deepcopy(stand.state))
            skip = 0
        with self._draws.apart() as seed:
            seed("stream", self._epoch, 0)
            samples = iter(self._dataset)
        for _ in self._read(samples, 0, skip):
            pass
        return samples

    def _read(self, samples: Iterator[Any], start: int, count: int) -> Iterator[Any]:
        """The next elements, at most `count`, from the place `start` on; what is drawn follows from their places."""
        with self._draws.apart() as seed:
            for place in range(start, start + count, self._unit):
                seed("sample", self._epoch, place)
                yield from islice(samples, min(self._unit, start + count - place))

    def _take(self, samples: Iterator[Any]) -> tuple[int, list[Slice]]:
        """Reads a step; gives its size, and the slices of this reader with padding where it has one less."""
        first: list[Any] = []
        own: list[Slice] = []
        count = 0
        for sample in self._read(samples, self._seen, self._size):
            number = count // self._micro_size
            if number % self._readers == self._reader:
                if count % self._micro_size == 0:
                    own.append((self._seen + count, []))
                own[-1][1].append(sample)
            if number == 0:
                first.append(sample)
            count += 1
        start, self._seen = self._seen, self._seen + count
        each, real = shares(count, self._micro_size, self._reader, self._readers)
        return count, own if real == each else [*own, (start, first)]

    def _left_at(self, count: int) -> Stand | None:
        """How the data set stands after a step of so many samples; nobody asks where it is not repeated."""
        if not (self._stateful and self._repeat):
            return None
        over = count < self._size or self._seen == self._length
        place = (self._epoch + 1, 0) if over else (self._epoch, self._seen)
        return _standing(*place, _own_state(self._dataset))

    def _check_length(self, ended: bool) -> None:
        length = self._length
        if length is None or self._seen == length or (self._seen < length and not ended):
            return
        what = f"goes on after {length} samples" if self._seen > length else f"ended after {self._seen} samples"
        raise wrong("data", f"the stream {what}, and its length says {length}", "mend __len__, or leave it out")

    def _empty(self) -> InputError:
        if self._seen:
            why = f"leaves nothing: the stream ended after {self._seen} samples, batch.global_size is {self._size}"
            return wrong("data.drop_last", why, "set it to false, or batch.global_size lower", value=True)
        again = f" the {self._epoch + 1}. time it was read" if self._epoch else ""
        return wrong(
            "data",
            f"the stream gave no sample{again}",
            "check what it reads; an iterator that ends for good must be made anew by __iter__" if again else "",
        )


def _hide_worker() -> None:
    """Lets a data set that shares itself out among workers give all of it: here each of them reads the whole."""
    from torch.utils.data._utils import worker

    worker._worker_info = None
    assert get_worker_info() is None


def _unshare(dataset: Any) -> None:
    """Gives a worker numbers of its own: Hugging Face's streams keep the epoch where all workers write to it."""
    for name, value in vars(dataset).items() if hasattr(dataset, "__dict__") else ():
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_shared():
            setattr(dataset, name, value.clone())


def has_exact_state(dataset: Any) -> bool:
    """Whether a data set's own state brings back all that is to come.

    That of a Hugging Face stream that is shuffled leaves out what its buffer holds.
    """
    if not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
        return False
    inside = [getattr(dataset, "_ex_iterable", None)]
    while inside:
        part = inside.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return False
        inside += [getattr(part, "ex_iterable", None)] if hasattr(part, "ex_iterable") else []
        inside += getattr(part, "ex_iterables", [])
    return True


def state_before(dataset: Any) -> Any:
    """A data set's own state before it is read; None where it has none, or can tell it only while it is read."""
    if has_exact_state(dataset):
        with suppress(Exception):
            return _own_state(dataset)
    return None


def _own_state(dataset: Any) -> Any:
    """As it is now: what the data set gives may be the very object that it changes as it is read."""
    return deepcopy(dataset.state_dict())


def _standing(epoch: int, seen: int, state: Any) -> Stand | None:
    return None if state is None else Stand(epoch, seen, state)


class StreamLoader:
    """Gives each process its micro-batches of every optimizer step of a stream, as Loader does of an indexed set.

    Every process iterates the whole stream and keeps its part, so that any data set does which gives all of them the
    same. At each step the processes compare how much they have read, and stop together where that differs.

    A data set that has a state of its own is put where it belongs whenever `steps` begins: as it stood after the step
    before, at the end of an epoch too, and for step 0 as it was at first.

    Args:
        dataset: anything with `__iter__`; `set_epoch(epoch)` is called before each pass where it exists, and
            `state_dict`/`load_state_dict` serve to go on. Without them (or where they are known not to be exact, as
            for Hugging Face's shuffle buffer) the stream is read again up to its place.
        order: how many samples a step has, and what is known of the length.
        micro_size: samples per micro-batch.
        collate: makes a batch of a list of samples; None for runner.data.collate's.
        num_workers: processes that read ahead. Each reads the whole stream and makes its share of the batches.
        device: where batches go.
        reader, readers: this process's place among the data readers.
        repeat: start anew when the stream ends; otherwise `steps` ends with it.
        trained: how many steps of the run are finished: what a checkpoint's position means. None for all fetched.
    """

    def __init__(
        self,
        dataset: Any,
        order: StreamOrder,
        micro_size: int,
        *,
        collate: Collate | None = None,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        reader: int = 0,
        readers: int = 1,
        repeat: bool = True,
        trained: Callable[[], int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.micro_size = micro_size
        self._make = collate
        self._workers = num_workers
        self._device = torch.device(device)
        self._reader, self._readers = reader, readers
        self._repeat = repeat
        self._trained = trained
        self._fetched = 0
        #: How the data set stands after so many steps, of those that a checkpoint may be about.
        self._stands: dict[int, Stand] = {}
        self._at_first = _standing(0, 0, state_before(dataset))
        #: Whether somebody has read: until then the data set is as it was at first.
        self._begun = False

    def steps(self, first: int, stop: int) -> Iterator[StepBatches]:
        """The micro-batches of this process for the steps first, first + 1, … stop - 1 of the run, step by step."""
        if not self._repeat:
            self.order.ends.clear()
        self._fetched = first
        stand = self._stand(first) if self._begun or first in self._stands else None
        self._begun = True
        self._say_skipping(first, stand)
        walk = self._walk(first, stand)
        each, real = 0, 0
        for step in range(first, stop):
            told, batches = self._together(walk)
            self.order.learn(step, told)
            if not told.samples:
                return
            each, real = shares(told.samples, self.micro_size, self._reader, self._readers)
            if told.stand is not None:
                self._stands[step + 1] = told.stand
            self._fetched = step + 1
            self._forget()
            placed = [batches.pop(0)] if batches else []
            placed += [opened(batch) for _, batch in islice(walk, each - len(placed))]
            yield StepBatches([self._place(batch) for batch in placed], real)

    def _together(self, walk: Iterator[tuple[Told | None, Any]]) -> tuple[Told, list[Any]]:
        """The next step's first item, once all processes have one alike."""
        try:
            told, batch = next(walk)
            assert told is not None
            batch = opened(batch)
        except Exception:
            # Told to the others before it is raised: they wait for this step.
            if self._readers > 1:
                agree(None)
            raise
        if self._readers > 1:
            agree(told.samples)
        return told, [batch]

    def _stand(self, step: int) -> Stand | None:
        """How the data set stood before a step, as far as it has told."""
        return self._stands.get(step, self._at_first if step == 0 else None)

    def _walk(self, first: int, stand: Stand | None) -> Iterator[tuple[Told | None, Any]]:
        sizes = (self.micro_size, self._reader, self._readers)
        make = self._make or collate
        walk = _Walk(self.dataset, self.order, first, stand, make, sizes, self._repeat)
        if not self._workers:
            return iter(walk)
        batches = DataLoader(
            walk,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=in_worker,
        )
        return received(batches, ends=self._readers == 1)

    def _say_skipping(self, first: int, stand: Stand | None) -> None:
        _, seen = self.order.place(first)
        if seen and stand is None and self._reader == 0:
            _log.info("the stream cannot tell where it stood: reading past its first %d samples", seen)

    def _forget(self) -> None:
        done = self._fetched if self._trained is None else self._trained()
        for step in [step for step in self._stands if step < done]:
            del self._stands[step]

    def _place(self, batch: Any) -> Any:
        return batch if self._device.type == "cpu" else to_device(batch, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Where the training stands in the stream: plain values, and the data set's own state."""
        step = self._fetched if self._trained is None else self._trained()
        ends = [[end, lacking] for end, lacking in self.order.ends if end <= step]
        stand = self._stand(step)
        if stand is None:
            return {"step": step, "ends": ends, "dataset": None}
        return {"step": step, "ends": ends, "dataset": stand.state, "place": [stand.epoch, stand.seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order.ends = [(end, lacking) for end, lacking in state["ends"]]
        step, own, place = state["step"], state["dataset"], state.get("place")
        if place is None:  # as in checkpoints of older versions
            place = self.order.place(step)
            if self.order.drop_last and place[1] == 0:
                own = None  # what is left out of the epoch before would come first
        stand = _standing(place[0], place[1], own)
        self._stands = {} if stand is None else {step: stand}
        self._fetched = step


def agree(samples: int | None) -> None:
    """Raises on all processes where one of them could not read (None), or they have read different numbers."""
    seen = torch.tensor([int(samples is None), samples or 0, (samples or 0) ** 2])
    failed, total, squares = distributed.total(seen).tolist()
    if samples is None:
        return
    if failed:
        raise Follows("another process could not read its data")
    if distributed.world_size() * squares != total * total:
        raise wrong(
            "data",
            f"the processes read different streams: {samples} samples of this step here, other numbers elsewhere",
            "give all of them the whole stream, or data.reader=main",
        )
