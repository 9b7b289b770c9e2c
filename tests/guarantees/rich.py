"""What the runs that are killed train: a module of a user's own, copied into the folder where they are started."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from runner.train.hook import Hook
from runner.train.run import Run


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A perceptron of residual blocks with dropout, and a buffer that training moves."""

    def __init__(self, features: int = 32, width: int = 128, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Points(Dataset[tuple[Tensor, int]]):
    """Labelled points; reading one takes `seconds`."""

    def __init__(self, samples: int, seed: int = 0, features: int = 32, classes: int = 5, seconds: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.points = torch.randn(samples, features, generator=generator)
        self.labels = torch.randint(classes, (samples,), generator=generator).tolist()
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.seconds:
            time.sleep(self.seconds)
        return self.points[index], self.labels[index]


class Slow(Hook):
    """Makes a step long enough to be hit."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_gradients_ready(self, run: Run) -> None:
        time.sleep(self.seconds)
