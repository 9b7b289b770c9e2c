"""A training by configuration in this process's place of a group, and the same by hand in one process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from small import config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from runner import distributed
from runner.assemble import assemble, check
from runner.data.order import Order
from runner.data.synthetic import random_classification
from runner.distributed import Ranks
from runner.folder import Bystander, RunFolder
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.run import Run

SAMPLES, EVAL, GLOBAL, STEPS = 100, 21, 24, 20

#: Options of each backend as a configuration has them, beside the name.
OPTIONS: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp": {"blocks": None, "min_parameters": None, "reshard_after_forward": True, "cpu_offload": False},
    "deepspeed": {"stage": 2, "offload_optimizer": False, "offload_parameters": False, "config_file": None},
}


class Blocks(nn.Module):
    """A few equal blocks, as a transformer has them, without dropout."""

    def __init__(self, features: int = 8, width: int = 16, classes: int = 3, blocks: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.outer = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(x)
        return self.outer(x)


class Curves(Hook):
    """Loss, gradient norm and learning rate of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_step_end(self, run: Run) -> None:
        assert run.loss is not None
        assert run.grad_norm is not None
        self.losses.append(run.loss.item())
        self.norms.append(run.grad_norm.item())
        self.rates.append(run.lr)


def settings(backend: str, world: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """The configuration of a training of 20 steps of 24 samples, the last step of each epoch short."""
    name, _, stage = backend.partition("-z")
    options = dict(OPTIONS[name])
    if stage:
        options["stage"] = int(stage)
    if name == "fsdp":
        options["replicas"] = changes.pop("replicas", 1)
    size = changes.get("batch__global_size", GLOBAL)
    return config(
        backend={"name": name, **options, **changes.pop("options", {})},
        train={"epochs": None, "steps": changes.pop("steps", STEPS)},
        batch={"global_size": size, "micro_size": size // (world * accumulation)},
        accumulation={"steps": accumulation},
        data={**config()["data"], "train": data(SAMPLES), "eval": data(EVAL, 1)},
        **{
            "model": {"_target_": "contract.training.Blocks"},
            "eval__every": 7,
            "grad_clip": 0.5,
            "checkpoint": None,
            "hooks": {
                "gradient_norm": {"_target_": "runner.hooks.gradient_norm.GradientNorm"},
                "curves": {"_target_": "contract.training.Curves"},
            },
            **changes,
        },
    )


def data(samples: int, seed: int = 0) -> dict[str, Any]:
    target = "runner.data.synthetic.random_classification"
    return {"_target_": target, "samples": samples, "features": 8, "classes": 3, "seed": seed}


def trained(backend: str, accumulation: int = 1, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains in this process's place and tells what came out."""
    rank, world = distributed.rank(), distributed.world_size()
    plain = settings(backend, world, accumulation, **(changes or {}))
    ranks = Ranks(rank, world, rank, world)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path)) if rank == 0 else Bystander(Path(path))
        run = assemble(plain, check(plain, ranks), folder, resume=None)
        train(run)
        curves = run.hooks["curves"]
        return {
            "losses": curves.losses,
            "norms": curves.norms,
            "rates": curves.rates,
            "metrics": run.metrics,
            "skipped": run.progress.skipped,
            "samples": run.progress.samples,
        }


def each_trained(cases: list[tuple[str, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Several trainings one after the other, in one start of the processes."""
    return [trained(*case) for case in cases]


def by_hand(steps: int = STEPS, clip: float = 0.5) -> dict[str, Any]:
    """The same training as a loop that anybody would write: one process, whole batches, plain torch."""
    torch.manual_seed(0)
    model = Blocks()
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    free = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": free, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    inputs, targets = random_classification(SAMPLES, 8, 3).tensors
    order = Order(SAMPLES, GLOBAL, 0)
    found: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    for step in range(steps):
        chosen = order.indices(step)
        loss = cross_entropy(model(inputs[chosen]), targets[chosen])
        loss.backward()
        found["losses"].append(loss.item())
        found["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        found["rates"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out, labels = random_classification(EVAL, 8, 3, seed=1).tensors
        outputs = model.eval()(held_out)
        found["loss"] = cross_entropy(outputs, labels).item()
        found["accuracy"] = (outputs.argmax(-1) == labels).double().mean().item()
    return found
