"""Micro-batches of optimizer steps: fetched whole where the data set allows, collated, put on the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from signal import strsignal
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from runner.data.collate import Collate, collate
from runner.data.draws import Draws, Seeding
from runner.data.order import Order
from runner.data.worker import in_worker
from runner.errors import InputError, Problem, wrong
from runner.signals import awaited, starting_workers


class StepBatches(NamedTuple):
    """The micro-batches of one process for one optimizer step: as many as every other process has, at least one.

    The first `real` of them are its own. The rest is padding, made of samples that another process counts: it goes
    through the model, so that all processes make the same collectives, and weighs nothing.
    """

    batches: list[Any]
    real: int


class Loader:
    """Gives each process its micro-batches of every optimizer step.

    The samples of a step are cut into slices of `micro_size`; micro-batch j of data reader r (of `readers`) is
    slice j * readers + r. Only the last step of an epoch has fewer or smaller micro-batches; a reader that then has
    one less than others gets the step's first slice as padding.

    Args:
        dataset: map-style; `__getitems__(list of indices)` is used where it exists, and a TensorDataset is indexed
            by tensors.
        order: which samples make which step.
        micro_size: samples per micro-batch.
        collate: makes a batch of a list of samples; None for runner.data.collate's.
        num_workers: processes that fetch ahead; 0 fetches here, when the batch is asked for.
        device: where batches go.
        reader, readers: this process's place among the data readers.
    """

    def __init__(
        self,
        dataset: Any,
        order: Order,
        micro_size: int,
        *,
        collate: Collate | None = None,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.micro_size = micro_size
        self._workers = num_workers
        self._device = torch.device(device)
        self._reader, self._readers = reader, readers
        self._fetch = Fetch(dataset, collate, order.seed)

    def steps(self, first: int, stop: int) -> Iterator[StepBatches]:
        """The micro-batches of this process for the steps first, first + 1, … stop - 1 of the run, step by step."""
        if not self._workers:
            for step in range(first, stop):
                slices, real = self._micro(step)
                epoch = step // self.order.steps_per_epoch
                yield StepBatches([self._place(self._fetch(samples, epoch)) for samples in slices], real)
            return
        batches = self._ahead(first, stop)
        for step in range(first, stop):
            each, real = shares(self.order.count(step), self.micro_size, self._reader, self._readers)
            yield StepBatches([self._place(batch) for batch in islice(batches, each)], real)

    def _micro(self, step: int) -> tuple[Sequence[Tensor], int]:
        """The indices of this process's micro-batches, and how many of them are its own."""
        indices = self.order.indices(step)
        if self._readers == 1:
            slices = (indices,) if len(indices) <= self.micro_size else indices.split(self.micro_size)
            return slices, len(slices)
        slices = indices.split(self.micro_size)
        own = slices[self._reader :: self._readers]
        each = -(-len(slices) // self._readers)
        return (*own, slices[0]) if len(own) < each else own, len(own)

    def _ahead(self, first: int, stop: int) -> Iterator[Any]:
        # Lists: tensors would go to the workers by shared memory, one at a time.
        an_epoch = self.order.steps_per_epoch
        slices = (
            (step // an_epoch, indices.tolist()) for step in range(first, stop) for indices in self._micro(step)[0]
        )
        # A generator of its own: torch's loader otherwise draws from the global one, which belongs to the training.
        batches = DataLoader(
            self._fetch,
            sampler=slices,  # type: ignore[arg-type]  # any iterable does
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator().manual_seed(self.order.seed),
            worker_init_fn=in_worker,
        )
        for batch in received(batches, ends=self._readers == 1 or self._device.type != "cuda"):
            yield opened(batch)

    def _place(self, batch: Any) -> Any:
        return batch if self._device.type == "cpu" else to_device(batch, self._device)


def shares(samples: int, micro_size: int, reader: int, readers: int) -> tuple[int, int]:
    """(micro-batches of every reader, those of them that are `reader`'s own) of a step of `samples`."""
    slices = -(-samples // micro_size)
    return -(-slices // readers), len(range(reader, slices, readers))


class Fetch(Dataset[Any]):
    """Sample indices to a batch, the quickest way that a data set has; called, or asked as a data set by a worker.

    What data set and collate draw from the process-wide generators is keyed by (seed, epoch, sample); with
    `__getitems__`, and in the collate, by the batch's first sample.
    """

    def __init__(self, dataset: Any, make: Collate | None, seed: int = 0) -> None:
        self._dataset = dataset
        self._make = make or collate
        self._tensors = dataset.tensors if make is None and type(dataset) is TensorDataset else None
        self._many = getattr(dataset, "__getitems__", None)
        self._draws = Draws(seed)

    def __call__(self, indices: Tensor, epoch: int = 0) -> Any:
        if self._tensors is not None:
            return [tensor[indices] for tensor in self._tensors]
        numbers = indices.tolist()
        return self._draws.fetched(lambda seeding: self._made(numbers, seeding), epoch)

    def _made(self, numbers: list[int], seeding: Seeding) -> Any:
        samples: Any = self._samples(numbers, seeding)
        if seeding.acts:
            seeding.batch(numbers[0])
        try:
            return self._make(samples)
        except Exception as error:
            refuse_none(samples, numbers, error)
            raise

    def _samples(self, numbers: list[int], seeding: Seeding) -> Sequence[Any]:
        dataset = self._dataset
        if self._many is not None:
            if seeding.acts:
                seeding.sample(numbers[0])
            return self._many(numbers)
        if not seeding.acts:
            return [dataset[i] for i in numbers]
        samples = []
        for i in numbers:
            seeding.sample(i)
            samples.append(dataset[i])
        return samples

    def __getitem__(self, place: tuple[int, list[int]]) -> Any:
        epoch, numbers = place
        return sealed(self, torch.tensor(numbers), epoch)


def refuse_none(samples: Sequence[Any], numbers: Sequence[int], cause: Exception) -> None:
    """Raises InputError where a batch could not be made because a sample is None."""
    none = [number for sample, number in zip(samples, numbers, strict=False) if sample is None]
    if none:
        fix = "give a sample for each index, or a data.collate that knows what to do without"
        raise wrong("data", f"sample {none[0]} of the data set is None", fix) from cause


class Sealed:
    """An error in the user's input that a worker met, on its way to the training process."""

    def __init__(self, error: InputError) -> None:
        # Plain values: they travel by pickle.
        self._parts = [(p.key, p.why, p.fix, {"value": p.value} if p.has_value else {}) for p in error.problems]

    def error(self) -> InputError:
        return InputError(*(Problem(key, why, fix, **value) for key, why, fix, value in self._parts))


def sealed(make: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives, or its InputError as a value: torch would send an exception home as its text alone."""
    try:
        return make(*arguments)
    except InputError as error:
        return Sealed(error)


def opened(value: Any) -> Any:
    """What `sealed` gave in a worker; raises its error here."""
    if isinstance(value, Sealed):
        raise value.error()
    return value


def received(batches: Iterable[Any], *, ends: bool) -> Iterator[Any]:
    """What workers send. With `ends` a signal ends the wait for them: not where all must make one more step first."""
    end = object()
    with starting_workers():
        found = iter(batches)
    dataset = getattr(getattr(batches, "dataset", None), "_dataset", None)
    _readers[id(dataset)] = {worker.pid for worker in found._workers}  # type: ignore[attr-defined]
    try:
        while (batch := awaited(next, found, end) if ends else next(found, end)) is not end:
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Torch, or a connection, may only find that a worker has gone, and not why.
        if (how := _how_ended(error, found)) is not None:
            raise RuntimeError(how) from None
        raise


#: The last workers of each data set, which is known by its id. The system tells of a worker's end wherever the process
#: just is, and then their loader may be closed before anybody asks.
_readers: dict[int, set[int]] = {}


def read_by(pid: int) -> int | None:
    """The id of the data set that a data worker reads or has read; None where that is not known."""
    return next((dataset for dataset, pids in _readers.items() if pid in pids), None)


def _how_ended(error: Exception, found: Any) -> str | None:
    """How a worker has ended, in torch's words, where it was not told: torch, or a connection, only found it gone."""
    text = str(error)
    if isinstance(error, RuntimeError) and not re.fullmatch(r"DataLoader worker .* exited unexpectedly", text):
        return None
    if text.startswith("Caught "):  # it lives, and has met a broken connection of its own
        return None
    for worker, expected in zip(found._workers, found._workers_status, strict=True):
        if worker.exitcode is not None and (expected or re.search(rf"\b{worker.pid}\b", text)):
            code = worker.exitcode
            if code < 0:
                return f"DataLoader worker (pid {worker.pid}) is killed by signal: {strsignal(-code)}."
            return f"DataLoader worker (pid {worker.pid}) exited unexpectedly with exit code {code}"
    return None


def as_it_is(batch: Any) -> Any:
    """A worker's batches are made already."""
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The same nested structure with its tensors, and what else has a `to`, on `device`; the rest stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, MutableMapping):
        moved = copy(batch)
        for key, value in batch.items():
            moved[key] = to_device(value, device)
        return moved
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch) if f.init})
    return batch
