"""Data that one process reads for all: each of the others gets its micro-batches sent."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from runner import distributed
from runner.data.loader import Loader, StepBatches, to_device
from runner.data.order import Order
from runner.data.stream import StreamLoader, StreamOrder, Told, is_stream, length_of
from runner.errors import Follows
from runner.signals import Interrupted


@dataclass(frozen=True)
class Remote:
    """What the other processes know of a data set that the first one reads: plain values, to be sent to them."""

    length: int | None
    stream: bool

    @classmethod
    def of(cls, dataset: Any) -> Remote:
        return cls(length_of(dataset), is_stream(dataset))


@dataclass(frozen=True)
class _Failed:
    """Sent instead of batches where the first process could not read them, or a signal ended its wait for them."""

    signal: int | None = None


class NotRead(Follows):
    """Raised in the other processes where the first one could not read the data, and raises why."""


class MainLoader:
    """A loader of all readers' micro-batches in the first process, of none elsewhere; each gets its own.

    A step's slices are dealt as Loader deals them: micro-batch j of reader r is slice j * readers + r.

    Args:
        source: in the first process a Loader or StreamLoader for one reader, on the CPU; None elsewhere.
        order: how many samples a step has; the source's own in the first process.
        device: where batches go.
        reader, readers: this process's place among the data readers.
    """

    def __init__(
        self,
        source: Loader | StreamLoader | None,
        order: Order | StreamOrder,
        *,
        device: torch.device | str = "cpu",
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        self.source = source
        self._order = order
        self._device = torch.device(device)
        self._reader, self._readers = reader, readers

    @property
    def dataset(self) -> Any:
        return None if self.source is None else self.source.dataset

    # Whoever copies a loader to try other sizes must not change what the copy was made of.

    @property
    def order(self) -> Order | StreamOrder:
        return self._order

    @order.setter
    def order(self, order: Any) -> None:
        self._order = order
        if self.source is not None:
            self.source = copy(self.source)
            self.source.order = order

    @property
    def micro_size(self) -> int | None:
        """Samples per micro-batch, where they are made."""
        return None if self.source is None else self.source.micro_size

    @micro_size.setter
    def micro_size(self, size: int) -> None:
        if self.source is not None:
            self.source = copy(self.source)
            self.source.micro_size = size

    def steps(self, first: int, stop: int) -> Iterator[StepBatches]:
        """The micro-batches of this process for the steps first, first + 1, … stop - 1 of the run, step by step."""
        if self.source is None and isinstance(self.order, StreamOrder):
            self.order.ends = [end for end in self.order.ends if end[0] <= first] if first else []
        steps = None if self.source is None else self.source.steps(first, stop)
        for step in range(first, stop):
            sent = None
            if steps is not None:
                try:
                    sent = self._dealt(step, next(steps, None))
                except (Exception, Interrupted) as error:
                    # Told to the others before it is raised: they wait for this step.
                    scatter([_Failed(error.number if isinstance(error, Interrupted) else None)] * self._readers)
                    raise
            found = scatter(sent)
            if isinstance(found, _Failed):
                if found.signal is not None:
                    raise Interrupted(found.signal)
                raise NotRead("the first process could not read the data")
            if found is None:
                return
            told, part = found
            if steps is None and isinstance(self.order, StreamOrder):
                self.order.learn(step, told)
            yield part if self._device.type == "cpu" else StepBatches(to_device(part.batches, self._device), part.real)

    def _dealt(self, step: int, whole: StepBatches | None) -> Sequence[Any]:
        """What each reader is sent: its batches with padding, and what the others cannot know of a stream."""
        if whole is None:
            return [None] * self._readers
        slices = whole.batches
        each = -(-len(slices) // self._readers)
        told = self._told(step)
        parts = []
        for reader in range(self._readers):
            own = slices[reader :: self._readers]
            parts.append((told, StepBatches(own if len(own) == each else [*own, slices[0]], len(own))))
        return parts

    def _told(self, step: int) -> Told | None:
        if not isinstance(self.order, StreamOrder):
            return None
        opened, lacking = dict(self.order.ends), dict(self.order.ends).get(step + 1, 0)
        return Told(self.order.global_size - lacking, step in opened, None)

    # A stream's position is what a checkpoint holds; an indexed set needs none.

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.source, StreamLoader):
            return self.source.state_dict()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if isinstance(self.source, StreamLoader):
            self.source.load_state_dict(state)
        elif isinstance(self.order, StreamOrder):
            self.order.ends = [(end, lacking) for end, lacking in state["ends"]]


def scatter(parts: Sequence[Any] | None) -> Any:
    """The first process's part for each, in rank order; pickled between the job's own processes."""
    if distributed.world_size() == 1:
        assert parts is not None
        return parts[0]
    box: list[Any] = [None]
    sys.modules["torch.distributed"].scatter_object_list(box, None if parts is None else list(parts), 0)
    return box[0]
