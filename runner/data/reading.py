"""A data set becomes a loader: indexed or iterated, read by every process or by the first alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from runner.data.collate import Collate
from runner.data.loader import Loader
from runner.data.main import MainLoader, Remote
from runner.data.order import Order
from runner.data.stream import StreamLoader, StreamOrder, is_stream, length_of
from runner.errors import Problem

AnyLoader = Loader | StreamLoader | MainLoader
AnyOrder = Order | StreamOrder


@dataclass(frozen=True)
class Reading:
    """How data sets are read, the same for training and evaluation.

    Args:
        collate: makes a batch of a list of samples; None for runner.data.collate's.
        num_workers: processes that read ahead.
        device: where batches go.
        reader, readers: this process's place among the data readers.
        main: only the first process reads; the others have a Remote for a data set.
        group_by_length: batch samples of similar length, by the data set's `lengths`.
    """

    collate: Collate | None = None
    num_workers: int = 0
    device: torch.device | str = "cpu"
    reader: int = 0
    readers: int = 1
    main: bool = False
    group_by_length: bool = False

    def training(
        self,
        dataset: Any,
        global_size: int,
        micro_size: int,
        seed: int,
        *,
        drop_last: bool = False,
        trained: Callable[[], int] | None = None,
    ) -> AnyLoader:
        """The loader of the training data; `trained` says how many steps are finished (for a stream's checkpoint)."""
        lengths = self._lengths(dataset)
        order = training_order(dataset, global_size, seed, drop_last=drop_last, lengths=lengths)
        return self._loader(dataset, order, micro_size, repeat=True, trained=trained)

    def evaluation(self, dataset: Any, micro_size: int) -> AnyLoader:
        """The loader of held-out data: each step gives every process one micro-batch."""
        size = micro_size * self.readers
        order: AnyOrder
        if _iterated(dataset):
            order = StreamOrder(size, length_of_any(dataset))
        else:
            order = Order(length_of_any(dataset) or 0, size, lengths=self._lengths(dataset), shuffle=False)
        return self._loader(dataset, order, micro_size, repeat=False, trained=None)

    def _lengths(self, dataset: Any) -> Any:
        # Only who reads needs the order itself; the others need to know how many samples a step has.
        return dataset.lengths if self.group_by_length and not isinstance(dataset, Remote) else None

    def _loader(
        self, dataset: Any, order: AnyOrder, micro_size: int, *, repeat: bool, trained: Callable[[], int] | None
    ) -> AnyLoader:
        if not self.main or self.readers == 1:
            return self._source(dataset, order, micro_size, self.device, self.reader, self.readers, repeat, trained)
        source = None
        if not isinstance(dataset, Remote):
            source = self._source(dataset, order, micro_size, "cpu", 0, 1, repeat, trained)
        return MainLoader(source, order, device=self.device, reader=self.reader, readers=self.readers)

    def _source(
        self,
        dataset: Any,
        order: AnyOrder,
        micro_size: int,
        device: torch.device | str,
        reader: int,
        readers: int,
        repeat: bool,
        trained: Callable[[], int] | None,
    ) -> Loader | StreamLoader:
        how: dict[str, Any] = {
            "collate": self.collate,
            "num_workers": self.num_workers,
            "device": device,
            "reader": reader,
            "readers": readers,
        }
        if isinstance(order, StreamOrder):
            return StreamLoader(dataset, order, micro_size, repeat=repeat, trained=trained, **how)
        return Loader(dataset, order, micro_size, **how)


def training_order(
    dataset: Any, global_size: int, seed: int, *, drop_last: bool = False, lengths: Any = None
) -> AnyOrder:
    """Which samples make which step of a data set or of what is known of it (Remote)."""
    length = length_of_any(dataset)
    if _iterated(dataset):
        return StreamOrder(global_size, length, drop_last=drop_last, seed=seed)
    return Order(length or 0, global_size, seed, drop_last=drop_last, lengths=lengths)


def length_of_any(dataset: Any) -> int | None:
    return dataset.length if isinstance(dataset, Remote) else length_of(dataset)


def _iterated(dataset: Any) -> bool:
    return dataset.stream if isinstance(dataset, Remote) else is_stream(dataset)


def problems(
    key: str,
    dataset: Any,
    *,
    global_size: int,
    drop_last: bool = False,
    group_by_length: bool = False,
    epochs: bool = False,
) -> list[Problem]:
    """What is wrong with a data set, as far as it shows before it is read.

    Args:
        key: its key in the configuration; the three that follow matter to `data.train` only.
        epochs: whether the length of the training is given in epochs, or something counts by them.
    """
    stream = is_stream(dataset)
    if not stream and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        why = f"built a {type(dataset).__name__}, which has neither a length and an index nor an iterator"
        return [Problem(key, why, "give a data set with __len__ and __getitem__, or with __iter__")]
    length = length_of(dataset)
    if length == 0:
        return [Problem(key, "is empty: it has no sample", "check the file or the filter that made it")]
    found = _stream_problems(key, dataset, length, group_by_length, epochs) if stream else []
    if key == "data.train" and drop_last and length is not None and length < global_size:
        why = f"leaves nothing: {length} samples are fewer than batch.global_size={global_size}"
        fix = f"set it to false, or batch.global_size to at most {length}"
        found.append(Problem("data.drop_last", why, fix, value=True))
    if group_by_length and not stream and not hasattr(dataset, "lengths"):
        why = f"needs a data set that tells the lengths of its samples, and {type(dataset).__name__} has no `lengths`"
        fix = "set it to false, or give the data set a `lengths`"
        found.append(Problem("data.group_by_length", why, fix, value=True))
    return found


def _stream_problems(key: str, dataset: Any, length: int | None, group_by_length: bool, epochs: bool) -> list[Problem]:
    found = []
    kind = type(dataset).__name__
    if key == "data.train" and epochs and length is None:
        why = f"{kind} is a stream and has no length, so nobody knows how long an epoch is"
        found.append(Problem("train.epochs", why, "give train.steps, or the stream a __len__"))
    if group_by_length:
        why = f"{kind} is a stream: which samples have similar lengths is not known before they are read"
        found.append(Problem("data.group_by_length", why, "set it to false", value=True))
    if getattr(dataset, "_distributed", None) is not None:
        why = f"this {kind} is shared out among processes already, and the runner does that itself"
        found.append(Problem(key, why, "leave out split_dataset_by_node"))
    return found
