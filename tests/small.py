"""A training small enough for a test: its configuration, the job that runs it, and what came out."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from runner.checkpoint import Checkpointer
from runner.data.loader import Loader
from runner.data.order import Order
from runner.data.synthetic import random_classification
from runner.engine.backend import Backend, Update
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS, Precision
from runner.engine.single import Single
from runner.folder import RunFolder
from runner.launch.worker import WorkPlan
from runner.tasks.classification import Classification
from runner.trackers import Trackers
from runner.train.hook import Hook, events
from runner.train.progress import Plan, Progress
from runner.train.run import Run, SaveEvery, Settings
from runner.train.schedules import Schedule

CPU = torch.device("cpu")
FEATURES, CLASSES = 8, 3


def spec(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES))


def data(samples: int, seed: int = 0) -> dict[str, Any]:
    target = "runner.data.synthetic.random_classification"
    return spec(target, samples=samples, features=FEATURES, classes=CLASSES, seed=seed)


def config(**changes: Any) -> dict[str, Any]:
    """A complete configuration; `train__steps=3` changes one key of a section, `model=…` a whole one."""
    precision = changes.pop("precision", "fp32")
    found: dict[str, Any] = {
        "name": "small",
        "seed": 0,
        "determinism": "default",
        "device": "cpu",
        "train": {"epochs": 2, "steps": None},
        "batch": {"global_size": 8, "micro_size": 8},
        "accumulation": {"steps": 1},
        "eval": {"every": "epoch", "micro_size": None},
        "log": {"every": 1},
        "model": spec("small.mlp"),
        "task": spec("runner.tasks.classification.Classification", num_classes=CLASSES),
        "optimizer": spec("torch.optim.AdamW", lr=1e-2, weight_decay=0.01, no_decay=["bias"]),
        "scheduler": spec("runner.train.schedules.cosine", warmup=0.0, final=0.0),
        "data": {
            "train": data(50),
            "eval": data(21, seed=1),
            "collate": None,
            "num_workers": 0,
            "reader": "all",
            "drop_last": False,
            "group_by_length": False,
        },
        "precision": precision_config(precision),
        "backend": {"name": "auto"},
        "launch": {"nproc_per_node": None, "nnodes": 1, "timeout": 60.0, "threads": None, "max_restarts": 0},
        "activation_checkpointing": "none",
        "compile": False,
        "debug": False,
        "grad_clip": None,
        "checkpoint": {
            "every": None,
            "keep": 2,
            "best": None,
            "milestones": None,
            "async": False,
            "on_error": "stop",
        },
        "resume": "auto",
        "resume_allow": [],
        "init_from": None,
        "nan": "stop",
        "hooks": {
            "learning_rate": spec("runner.hooks.learning_rate.LearningRate"),
            "gradient_norm": spec("runner.hooks.gradient_norm.GradientNorm"),
            "metrics_log": spec("runner.hooks.metrics_log.MetricsLog"),
            "watch": spec("small.Watch"),
        },
        "trackers": {"jsonl": spec("runner.trackers.jsonl.Jsonl")},
        "run_dir": None,
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            found[section] = {**found[section], key: value}
        else:
            found[section] = value
    if not any(name in changes for name in ("batch", "batch__micro_size")):
        found["batch"]["micro_size"] = found["batch"]["global_size"] // found["accumulation"]["steps"]
    return found


def precision_config(name: str) -> dict[str, Any]:
    precision, scaling = PRECISIONS[name], PRECISIONS[name].loss_scaling
    dtypes = {
        key: str(getattr(precision, key)).removeprefix("torch.")
        for key in ("param_dtype", "compute_dtype", "reduce_dtype")
    }
    return {
        "name": name,
        **dtypes,
        "tf32": precision.tf32,
        "float8": precision.float8,
        "emulate": precision.emulate,
        "loss_scaling": None if scaling is None else dict(vars(scaling)),
    }


class Stream(IterableDataset[Any]):
    """50 samples in a row, without a place that could be saved."""

    def __init__(self) -> None:
        self.data = random_classification(50, 8, 3)

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(50))


class Stateful(Stream):
    """The same, and it knows where it stands."""

    place = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.place = self.place, 0
        for i in range(start, 50):
            self.place = i + 1
            yield self.data[i]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Watch(Hook):
    """Keeps what a test wants to look at, of the newest run: losses and rates by step, the weights at the end."""

    last: Watch

    def __init__(self) -> None:
        Watch.last = self
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.weights: dict[str, Tensor] = {}
        self.error: BaseException | None = None

    def on_step_end(self, run: Run) -> None:
        assert run.loss is not None
        self.losses.append(run.loss.item())
        self.rates.append(run.lr)

    def on_run_end(self, run: Run) -> None:
        self.weights = {name: value.clone() for name, value in run.engine.model.state_dict().items()}

    def on_exception(self, run: Run, error: BaseException) -> None:
        self.error = error
        self.on_run_end(run)


class Interrupt(Hook):
    """A signal in the middle of a step."""

    def __init__(self, step: int, number: int = 15) -> None:
        self.step, self.number = step, number

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            run.signal = self.number


class Crash(Hook):
    """An error at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            raise RuntimeError("crash on purpose")


@dataclass
class Result:
    """What a job left behind."""

    code: int
    path: Path
    watch: Watch

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def train(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["split"] == "train"]

    @property
    def eval(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["split"] == "eval"]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.train]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())


def run_job(directory: Path, settings: Mapping[str, Any], run_dir: str = "run") -> Result:
    """Runs a configuration in this process, in `directory`/`run_dir`; goes on there if a run has stopped there."""
    from runner.job import work

    plain = dict(settings)
    plan = WorkPlan(plain, plain, ["+recipe=small"], str(directory), time.time(), run_dir=run_dir)
    before, Watch.last = list(sys.path), Watch()
    try:
        code = work(plan)
    finally:
        sys.path[:] = before
    return Result(code, directory / run_dir, Watch.last)


def engine(
    build_model: Callable[[], nn.Module] = mlp,
    build_optimizer: Callable[[nn.Module], Any] | None = None,
    precision: str | Precision = "fp32",
    seed: int = 0,
    mesh: Mesh = Mesh(),  # noqa: B008  # frozen
) -> Engine:
    """An engine on one process with model and optimizer; SGD of rate 0.1 where none is given."""
    made = Engine(Single(CPU, PRECISIONS[precision] if isinstance(precision, str) else precision, mesh))
    torch.manual_seed(seed)
    made.prepare(build_model, build_optimizer or (lambda model: torch.optim.SGD(model.parameters(), lr=0.1)))
    return made


def step(
    engine: Engine,
    max_norm: float | None = None,
    *,
    loss: Tensor | None = None,
    guard: bool = True,
    measure: bool = False,
) -> Update:
    """The exchange and the step of a loop. Without a loss, one that is finite."""
    known = engine.exchange(torch.zeros(()) if loss is None else loss, guard=guard)
    return engine.step(max_norm, skip=known.skip, measure=measure)


@dataclass
class Records:
    """A tracker that keeps its records."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None:
        self.found.append(dict(record))

    def close(self) -> None: ...


def run(folder: Path, **parts: Any) -> Run:
    """A Run without configuration: 24 samples, 8 a step, SGD, no checkpoints; `parts` replace any of it.

    Beside fields of Run: `steps`, `samples`, `global_size`, `micro_size`, `settings` as keywords of Settings,
    `optimizer` and `model` as factories, `precision`, `scheduler` as a factory of the optimizer.
    """
    size = parts.pop("global_size", 8)
    micro = parts.pop("micro_size", size)
    train_set = parts.pop("train_set", None) or random_classification(parts.pop("samples", 24), FEATURES, CLASSES)
    eval_set = parts.pop("eval_set", random_classification(10, FEATURES, CLASSES, seed=1))
    made = parts.pop("engine", None) or engine(
        parts.pop("model", mlp), parts.pop("optimizer", None), parts.pop("precision", "fp32")
    )
    hooks = parts.pop("hooks", {})
    settings = Settings(**{"log_every": 1, **parts.pop("settings", {})})
    order = Order(len(train_set), size, settings.seed)
    scheduler, metric = parts.pop("scheduler", None), parts.pop("metric", "loss")
    progress, schedule = Progress(), Schedule(scheduler(made.optimizer) if scheduler else None, metric)
    checkpointer = None
    if parts.pop("save", False):
        state = {**made.state(), "scheduler": schedule, "progress": progress}
        checkpointer = Checkpointer(folder / "checkpoints", state)
    evaluation = None if eval_set is None else Loader(eval_set, Order(len(eval_set), micro, shuffle=False), micro)
    values: dict[str, Any] = {
        "name": "small",
        "config": {},
        "folder": RunFolder(folder),
        "engine": made,
        "task": Classification(),
        "schedule": schedule,
        "train_data": Loader(train_set, order, micro),
        "eval_data": evaluation,
        "plan": Plan(parts.pop("steps", 6), order.steps_per_epoch),
        "progress": progress,
        "settings": settings,
        "hooks": hooks,
        "events": events(hooks.values()),
        "trackers": Trackers({"records": Records()}),
        "checkpointer": checkpointer,
        "save_every": SaveEvery(),
    }
    return Run(**{**values, **parts})


class Raise(Interrupt):
    """A true signal to this process in the middle of a step."""

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            signal.raise_signal(self.number)


class Late(Engine):
    """Its flags are those of the exchange before, as on a GPU."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.flags_late, self._last = True, [0.0] * 5

    def _on_host(self, flags: Tensor) -> list[float]:
        before, self._last = self._last, flags.tolist()
        return before
