"""The parts of the run that changes its number of processes: a model, its data, its task, and the interruption."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from runner.metrics import Accuracy, MeanAbsoluteError
from runner.train.hook import Hook
from runner.train.run import Run
from runner.train.task import Task

FEATURES, CLASSES, LENGTH = 6, 4, 5


class Net(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, 24), nn.LayerNorm(24)
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


class Sequences:
    """Tokens with a label each, of which some do not count; every sample has a weight. Noise is drawn anew."""

    def __init__(self, samples: int, seed: int = 0, noise: float = 0.0) -> None:
        made = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, LENGTH, FEATURES, generator=made)
        self.y = self.x[..., :CLASSES].argmax(-1)
        lengths = torch.randint(1, LENGTH + 1, (samples, 1), generator=made)
        self.y[torch.arange(LENGTH) >= lengths] = -100
        self.weights = torch.rand(samples, generator=made) + 0.1
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        x = self.x[index]
        if self.noise:
            x = x + self.noise * torch.randn(LENGTH, FEATURES)
        return x, self.y[index], self.weights[index], index


class Tokens(Task):
    """The mean over tokens, weighted by sample: a denominator that is no whole number."""

    def __init__(self) -> None:
        self.meters = {"accuracy": Accuracy(ignore_index=-100), "error": MeanAbsoluteError()}
        #: Of the step that is being made.
        self.samples: list[int] = []

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.samples += batch[3].tolist()
        each = cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="none", ignore_index=-100)
        return (each.view(batch[1].shape) * batch[2][:, None]).sum()

    def weight(self, batch: Any) -> Tensor:
        return ((batch[1] != -100) * batch[2][:, None]).sum()

    def predictions(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs.argmax(-1), batch[1]


class Interrupt(Hook):
    """Sends a signal to the process of one rank, so many seconds after the end of a step, or of the first one after it.

    Writes which samples each step had into the file `samples`, and the step of the signal into `interrupted`.
    """

    def __init__(self, step: int = 0, number: int = 0, rank: int = 0, seconds: float = 0.0, start: int = 0) -> None:
        self.step, self.number, self.rank, self.seconds, self.start = step, number, rank, seconds, start
        self.sent = not number

    def on_step_end(self, run: Run) -> None:
        step, rank = run.progress.step, run.engine.mesh.data_rank
        line = {"start": self.start, "step": step, "rank": rank, "samples": run.task.samples}
        _append("samples", line)
        run.task.samples = []
        if self.sent or step < self.step or rank != self.rank:
            return
        self.sent = True
        _append("interrupted", {"start": self.start, "step": step})
        if not self.seconds:
            os.kill(os.getpid(), self.number)
            return
        timer = threading.Timer(self.seconds, os.kill, (os.getpid(), self.number))
        timer.daemon = True
        timer.start()


def _append(name: str, line: dict[str, Any]) -> None:
    with open(name, "ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")
