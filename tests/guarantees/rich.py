"""What the runs that are killed train: a module of a user's own, copied into the folder where they are started."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from runner import distributed
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


class Halt(Hook):
    """Halts a process at the place that the file `halt` names, until that file is gone: whoever kills has time.

    The file has `moment`; `step`, before which nothing halts; `skip`, how many of the small things that belong to the
    moment are done before; and `rank`, None for all. A process that halts says in the file `halted` at what: the name
    of the folder that it is just filling or removing; a second line says that it has gone on. Without `halt` nothing
    differs from a run that has no such hook.
    """

    def __init__(self) -> None:
        self.order: dict[str, Any] | None = None
        self.run: Run | None = None

    def on_run_start(self, run: Run) -> None:
        if not Path("halt").exists():
            return
        order = json.loads(Path("halt").read_text())
        if order["rank"] in (None, distributed.rank()):
            self.order, self.run = order, run
            if order["moment"] == "evaluation":
                run.engine.model.register_forward_pre_hook(self._forward)
            elif order["moment"] in ("save", "prune"):
                sys.addaudithook(self._hear)  # slow storage: it acts in whatever thread writes or removes
            self._pass("start")

    def on_step_start(self, run: Run) -> None:
        self._pass("step", run.progress.step + 1)

    def on_gradients_ready(self, run: Run) -> None:
        self._pass("step", run.progress.step + 1)

    def on_step_end(self, run: Run) -> None:
        self._pass("step", run.progress.step)

    def _forward(self, module: nn.Module, _inputs: Any) -> None:
        if not module.training and self.run is not None:
            self._pass("evaluation", self.run.progress.step)

    def _hear(self, event: str, arguments: Any) -> None:
        """Before a file or folder is opened, renamed or removed."""
        if self.order is None or event not in _ON_DISK:
            return
        path = str(arguments[0])
        if event == "os.remove" and isinstance(arguments[-1], int) and arguments[-1] >= 0:
            path = f"{os.readlink(f'/proc/self/fd/{arguments[-1]}')}/{path}"
        start = {"save": ".tmp-step_", "prune": ".trash-step_"}[self.order["moment"]]
        name = next((part for part in Path(path).parts if part.startswith(start)), None)
        if name is not None and self.run is not None:
            step = int(name[len(start) :].split("-")[0]) if start == ".tmp-step_" else self.run.progress.step
            # The last thing of a save and of a prune: at the latest here.
            self._pass(self.order["moment"], step, name, last=event in ("os.rename", "runner.exchange", "os.rmdir"))

    def _pass(self, moment: str, step: int = 0, at: str = "", *, last: bool = False) -> None:
        order = self.order
        if order is None or moment != order["moment"] or step < order["step"]:
            return
        if order["skip"] and not last:
            order["skip"] -= 1
            return
        self.order = None
        Path("halted").write_text(f"{at}\n")
        while Path("halt").exists():
            time.sleep(0.001)
        with Path("halted").open("a") as file:
            file.write("gone on\n")


_ON_DISK = {"open", "os.rename", "runner.exchange", "os.remove", "os.rmdir", "shutil.rmtree"}
