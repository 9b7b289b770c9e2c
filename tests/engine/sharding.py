"""Models, loops and measurements for tests of sharded training, called in every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from runner import distributed
from runner.engine.ddp import DDP
from runner.engine.engine import Engine
from runner.engine.fsdp import FSDP
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.engine.single import Single

CPU = torch.device("cpu")
WORDS, WIDTH, CLASSES, LENGTH = 50, 16, 3, 5
GLOBAL = 48


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """A small transformer-like model: repeated layers, tied weights, few rows, a number, unused and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.words = nn.Linear(WIDTH, WORDS, bias=False)
        self.words.weight = self.embed.weight
        self.head = nn.Linear(WIDTH, CLASSES)
        self.one = nn.Parameter(torch.randn(1, WIDTH))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.register_buffer("table", torch.rand(LENGTH, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.table + self.one
        for layer in self.layers:
            h = layer(h)
        h = self.frozen(h)
        return self.head(h.mean(1)) * self.scale + self.words(h).mean(1)[:, :CLASSES]


def flat() -> nn.Module:
    """Weights in the root only."""
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Flatten(), nn.Linear(LENGTH * WIDTH, CLASSES))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).mean(1)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    return torch.randint(WORDS, (GLOBAL, LENGTH), generator=made), torch.randint(CLASSES, (GLOBAL,), generator=made)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def by_hand(
    build: Callable[[], nn.Module] = Net, steps: int = 20, clip: float | None = 0.5
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a plain loop in one process."""
    torch.manual_seed(0)
    model = build()
    optimizer = adamw(model)
    found = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def engine(name: str, precision: str = "fp32", replicas: int = 1, **options: Any) -> Engine:
    kind = {"single": Single, "ddp": DDP, "fsdp": FSDP}[name]
    mesh = Mesh(distributed.rank(), distributed.world_size(), replicas)
    backend = kind(CPU, PRECISIONS[precision], mesh, **options)
    assert backend.check() == []
    return Engine(backend)


def prepared(name: str, build: Callable[[], nn.Module] = Net, optimizer: Any = adamw, **options: Any) -> Engine:
    made = engine(name, **options)
    torch.manual_seed(0)
    made.prepare(build, optimizer)
    return made


def step_of(made: Engine, step: int, accumulation: int = 1, clip: float | None = 0.5) -> tuple[float, float, bool]:
    """One step over this rank's part of the global batch: mean loss, gradient norm, whether it was skipped."""
    x, y = (part.chunk(made.mesh.data_size)[made.mesh.data_rank] for part in batch(step))
    factor = made.factor(GLOBAL)
    shares = []
    for i, (a, b) in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation), strict=True)):
        with made.accumulate(i == accumulation - 1):
            loss = cross_entropy(made.forward(a).float(), b, reduction="sum")
            shares.append(made.backward(loss, factor))
    known = made.exchange(torch.stack(shares).sum())
    update = made.step(clip, skip=known.skip, measure=True)
    assert update.grad_norm is not None
    return known.loss.item(), update.grad_norm.item(), bool(update.skipped)


def curve(made: Engine, steps: int = 20, accumulation: int = 1, clip: float | None = 0.5) -> list[tuple[float, float]]:
    return [step_of(made, step, accumulation, clip)[:2] for step in range(steps)]


def worst(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The worst relative difference of losses and norms."""
    return max(
        abs(a - b) / abs(b)
        for pair, other in zip(found, expected, strict=True)
        for a, b in zip(pair, other, strict=True)
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All values of a model, put together."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def whole_of(value: Tensor) -> Tensor:
    """One tensor, put together, in memory of its own."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
