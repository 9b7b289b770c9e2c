"""Micro-batches of optimizer steps: fetched whole where the data set allows, collated, put on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from runner.data.order import Order

Collate = Callable[[list[Any]], Any]


class Loader:
    """Gives each process its micro-batches of every optimizer step.

    The samples of a step are cut into slices of `micro_size`; micro-batch j of data reader r (of `readers`) is
    slice j * readers + r. Only the last step of an epoch has fewer or smaller micro-batches.

    Args:
        dataset: map-style; `__getitems__(list of indices)` is used where it exists, and a TensorDataset is indexed
            by tensors.
        order: which samples make which step.
        micro_size: samples per micro-batch.
        collate: makes a batch of a list of samples; None for torch's default.
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
        self._collate = collate
        self._workers = num_workers
        self._device = torch.device(device)
        self._reader, self._readers = reader, readers
        self._fetch = _fetcher(dataset, collate)

    def steps(self, first: int, stop: int) -> Iterator[list[Any]]:
        """The micro-batches of this process for the steps first, first + 1, … stop - 1 of the run, step by step."""
        if not self._workers:
            for step in range(first, stop):
                yield [self._place(self._fetch(samples)) for samples in self._micro(step)]
            return
        batches = self._ahead(first, stop)
        for step in range(first, stop):
            slices = -(-self.order.count(step) // self.micro_size)
            yield [self._place(batch) for batch in islice(batches, len(range(self._reader, slices, self._readers)))]

    def _micro(self, step: int) -> Sequence[Tensor]:
        indices = self.order.indices(step)
        if self._readers == 1:
            return (indices,) if len(indices) <= self.micro_size else indices.split(self.micro_size)
        return indices.split(self.micro_size)[self._reader :: self._readers]

    def _ahead(self, first: int, stop: int) -> Iterator[Any]:
        samples = (indices.tolist() for step in range(first, stop) for indices in self._micro(step))
        # A generator of its own: torch's loader otherwise draws from the global one, which belongs to the training.
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=samples,  # type: ignore[arg-type]  # any iterable does
                collate_fn=self._collate,
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                generator=torch.Generator().manual_seed(self.order.seed),
            )
        )

    def _place(self, batch: Any) -> Any:
        return batch if self._device.type == "cpu" else to_device(batch, self._device)


def _fetcher(dataset: Any, collate: Collate | None) -> Callable[[Tensor], Any]:
    """The quickest way from sample indices to a batch that this data set has."""
    if collate is None and type(dataset) is TensorDataset:
        tensors = dataset.tensors
        return lambda indices: [tensor[indices] for tensor in tensors]
    make = collate or default_collate
    if hasattr(dataset, "__getitems__"):
        return lambda indices: make(dataset.__getitems__(indices.tolist()))
    return lambda indices: make([dataset[i] for i in indices.tolist()])


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
