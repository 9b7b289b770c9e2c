"""A user's own module, beside their recipes: what is right, what is wrong in one process only, and what is slow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from runner import distributed
from runner.data.synthetic import separable_classification
from runner.tasks.classification import Classification
from runner.train.hook import Hook
from runner.train.run import Run
from runner.train.task import Task as Base
from runner.train.task import checked_meters


def fail(here: str, where: str | None) -> None:
    if here == where and distributed.rank() == 1:
        raise ValueError(f"no {where}")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.rest = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.rest(x)


class Words(nn.Module):
    """A transformer of three blocks."""

    def __init__(self, vocabulary: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Of 4 to 11 words; 0 fills up."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.ids = torch.randint(1, 32, (count, 12), generator=torch.Generator().manual_seed(seed))
        for number in range(count):
            self.ids[number, 4 + number % 8 :] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": self.ids[index]}


class Next(Base):
    """The next word; each word counts alike."""

    def __init__(self, meters: dict[str, Any] | None = None) -> None:
        self.meters = checked_meters(meters)

    def inputs(self, batch: Any) -> Any:
        return batch["ids"]

    def predictions(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs[:, :-1].argmax(-1), batch["ids"][:, 1:]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        scores, targets = outputs[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten()
        return nn.functional.cross_entropy(scores, targets, ignore_index=0, reduction="sum")

    def weight(self, batch: Any) -> Tensor:
        return (batch["ids"][:, 1:] != 0).sum()


class Stream(torch.utils.data.IterableDataset[tuple[Tensor, int]]):
    def __init__(self, count: int = 64) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        assert distributed.rank() == 0, "the first process reads for all"
        generator = torch.Generator().manual_seed(0)
        for number in range(self.count):
            yield torch.randn(16, generator=generator), number % 4


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(16, 4)
        self.spare = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Model(nn.Linear):
    """Fails in the fourth step."""

    def __init__(self, where: str | None = None) -> None:
        super().__init__(16, 4)
        self.where, self.calls = where, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 3:
            fail("forward", self.where)
        return super().forward(x)


class Task(Classification):
    def __init__(self, num_classes: int, where: str | None = None) -> None:
        super().__init__(num_classes)
        self.where = where
        fail("building", where)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        fail("loss", self.where)
        return super().loss(outputs, batch)


class Data(torch.utils.data.Dataset[Any]):
    def __init__(self, where: str | None = None) -> None:
        self.of, self.where = separable_classification(64, 16, 4, seed=0), where

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> Any:
        fail("item", self.where)
        return self.of[index]


class End(Hook):
    """Ends the second process, at once or after the third step."""

    def __init__(self, how: str, now: bool = False) -> None:
        self.how = how
        if now and distributed.rank() == 1:
            self.end()

    def on_step_end(self, run: Run) -> None:
        if distributed.rank() == 1 and run.progress.step == 3:
            self.end()

    def end(self) -> None:
        if self.how == "leave":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(Hook):
    def on_step_end(self, run: Run) -> None:
        time.sleep(0.1)
