"""G19: what differs between a checkpoint and the run that goes on from it is shown, and stops where it is dangerous.

A case changes one thing: a key of the configuration, or something beside it (a version, the threads, the contents of a
data set). It names the class that the change belongs to. Of a change that stops, the message must name key, both
values and how to allow it; allowed by its key and by its group it must go on, and must bite: the losses that follow are
not those of the run that changed nothing, but those of a loop in plain torch that goes on from the checkpoint's tensors
with the new value.

What is beside the configuration is changed around the program, and both sides of a message are what it found itself:
when it saved, and when it goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy
import torch
from safetensors.torch import load_file
from small import CLASSES, FEATURES, config, data, mlp, run_job, spec

from runner import environment
from runner.assemble import check
from runner.checkpoint import find
from runner.data.order import Order
from runner.data.synthetic import random_classification
from runner.drift import compare
from runner.engine.mesh import Mesh
from runner.errors import InputError
from runner.launch.worker import WorkPlan
from runner.places import make_importable

DONE = 4
CODE = "from small import mlp\n\n\ndef net():\n    return mlp(dropout={})\n"


@dataclass(frozen=True)
class Case:
    """One change. `key`: under what it is told; `like`: a piece of the text; `base`: of the run to begin with."""

    name: str
    kind: str
    key: str
    changes: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    outside: str = ""
    bites: bool = True

    def __str__(self) -> str:
        return self.name


def adamw(**changes: Any) -> dict[str, Any]:
    return {**spec("torch.optim.AdamW", lr=1e-2, weight_decay=0.01, no_decay=["bias"]), **changes}


def sgd(**changes: Any) -> dict[str, Any]:
    return {**spec("torch.optim.SGD", lr=1e-2, momentum=0.9, nesterov=False), **changes}


def cosine(**changes: Any) -> dict[str, Any]:
    return {**spec("runner.train.schedules.cosine", warmup=0.0, final=0.0), **changes}


def _stops() -> Iterator[Case]:
    def one(name: str, key: str, changes: dict[str, Any], **more: Any) -> Case:
        return Case(name, "stops", key, changes, **more)

    yield one("seed", "seed", {"seed": 1}, like="was 0 in")
    yield one("model dropout", "model.dropout", {"model": spec("small.mlp", dropout=0.5)})
    yield one("model target", "model._target_", {"model": spec("guarantees.cases_g19.other")}, like="was small.mlp in")
    yield one("task classes", "task.num_classes", {"task__num_classes": 4}, like="was 3 in", bites=False)
    yield one("task target", "task._target_", {"task": spec("guarantees.cases_g19.Doubled", num_classes=CLASSES)})
    yield one("lr", "optimizer.lr", {"optimizer": adamw(lr=0.05)}, like="was 0.01 in")
    yield one("weight decay", "optimizer.weight_decay", {"optimizer": adamw(weight_decay=5.0)}, like="was 0.01 in")
    yield one(
        "betas",
        "optimizer.betas.0",
        {"optimizer": adamw(betas=[0.5, 0.9])},
        base={"optimizer": adamw(betas=[0.8, 0.9])},
    )
    yield one("eps", "optimizer.eps", {"optimizer": adamw(eps=0.1)})
    yield one("no decay", "optimizer.no_decay.0", {"optimizer": adamw(no_decay=["0.weight"], weight_decay=5.0)},
              base={"optimizer": adamw(weight_decay=5.0)})  # fmt: skip
    yield one("momentum", "optimizer.momentum", {"optimizer": sgd(momentum=0.2)}, base={"optimizer": sgd()})
    yield one("nesterov", "optimizer.nesterov", {"optimizer": sgd(nesterov=True)}, base={"optimizer": sgd()})
    yield one("warm-up", "scheduler.warmup", {"scheduler": cosine(warmup=12)})
    yield one("final rate", "scheduler.final", {"scheduler": cosine(final=0.9)})
    yield one(
        "schedule", "scheduler._target_", {"scheduler": spec("runner.train.schedules.linear", warmup=0.0, final=0.0)}
    )
    yield one("no schedule", "scheduler", {"scheduler": None}, like="was runner.train.schedules.cosine in")
    yield one("a schedule", "scheduler", {"scheduler": cosine()}, like="was null in", base={"scheduler": None})
    yield one("samples", "data.train.samples", {"data__train": data(60)}, like="was 50 in")
    yield one("data seed", "data.train.seed", {"data__train": data(50, seed=9)})
    yield one("held-out data", "data.eval.seed", {"data__eval": data(21, seed=7)}, bites=False)
    yield one("drop last", "data.drop_last", {"data__drop_last": True}, like="was false in")
    yield one("global size", "batch.global_size", {"batch__global_size": 4}, like="was 8 in")
    yield one(
        "contents", "data.train", {}, like="has other contents", outside="contents", base={"data__train": filed()}
    )
    yield one(
        "length", "data.train", {}, like="had 50 samples and has 49", outside="length", base={"data__train": filed()}
    )


def _warned() -> Iterator[Case]:
    def one(name: str, like: str, changes: dict[str, Any] | None = None, **more: Any) -> Case:
        return Case(name, "warned", "", changes or {}, like, **more)

    yield one(
        "clipping", "grad_clip was null and is 0.1: the steps from here on are made otherwise", {"grad_clip": 0.1}
    )
    yield one("nan", "nan was stop and is skip: the steps from here on are made otherwise", {"nan": "skip"})
    yield one("kernels", "determinism was default and is kernels", {"determinism": "kernels"})
    yield one("checkpointing", "activation_checkpointing was none and is full", {"activation_checkpointing": "full"})
    yield one("precision", "precision was fp32 and is bf16", {"precision": "bf16"})
    yield one("shorter", "was to take 14 steps and is to take 7", {"train__epochs": 1})
    yield one("threads", "threads was 1 and is 7: results may differ in the last digits", outside="threads")
    yield one("python", f"python was {platform.python_version()} and is 3.99.1", outside="python")
    yield one("torch", f"torch was {torch.__version__} and is 99.0", outside="torch")
    yield one("numpy", f"numpy was {numpy.__version__} and is 99.0", outside="numpy")
    yield one("the program", "runner was 1.0 and is 99.0", outside="runner")
    yield one("a library gone", "nosuchlib was 0.1 and is not installed", outside="gone")
    yield one("device", "device was cpu and is xpu", outside="device")
    here, now = platform.machine(), torch.backends.cpu.get_cpu_capability()
    yield one("hardware", f"hardware was {here} {now} and is {here} NONE", outside="hardware")
    yield one("commit", "git commit was {} and is {}", outside="commit")
    yield one("own code", "g19_code.py is changed", outside="code", base={"model": spec("g19_code.net")})


def _free() -> Iterator[Case]:
    def one(name: str, like: str, changes: dict[str, Any], **more: Any) -> Case:
        return Case(name, "free", "", changes, like, **more)

    yield one("name", "name small -> other", {"name": "other"})
    yield one("longer", "train.epochs 2 -> 3", {"train__epochs": 3})
    yield one("steps", "train.steps null -> 20", {"train": {"epochs": None, "steps": 20}})
    yield one(
        "micro-batch",
        "batch.micro_size 8 -> 4",
        {"batch": {"global_size": 8, "micro_size": 4}, "accumulation__steps": 2},
    )
    yield one("evaluation", "eval.every epoch -> 3", {"eval__every": 3})
    yield one("evaluated together", "eval.micro_size null -> 5", {"eval__micro_size": 5})
    yield one("records", "log.every 1 -> 5", {"log__every": 5})
    yield one("workers", "data.num_workers 0 -> 1", {"data__num_workers": 1})
    yield one("reader", "data.reader all -> main", {"data__reader": "main"})
    yield one("kept", "checkpoint.keep 2 -> 5", {"checkpoint__keep": 5})
    yield one("saves", "checkpoint.every", {"checkpoint__every": {"steps": 2, "epochs": None, "seconds": None}})
    yield one(
        "a hook", "hooks.more", {"hooks": {**config()["hooks"], "more": spec("runner.hooks.throughput.Throughput")}}
    )
    yield one("a tracker", "trackers.jsonl", {"trackers": {}})
    yield one("restarts", "launch.max_restarts 0 -> 3", {"launch__max_restarts": 3})
    yield one("backend", "backend single -> ddp", {"backend": {"name": "ddp"}})
    yield one("world", "world 1 -> 4", {}, outside="world")
    yield one("threads of another world", "threads 1 -> 7", {}, outside="threads of a world")
    yield one("trust", "trust [] -> ['mine.Net']", {"trust": ["mine.Net"]})
    yield one("weights to begin with", "init_from is not used", {"init_from": "elsewhere.safetensors"})


def cases(count: int, seed: int) -> list[Case]:
    """All of them in any case, in an order of the seed's; a larger count takes some again."""
    known, draw = every(), random.Random(seed)
    found = draw.sample(known, len(known))
    while len(found) < count:
        found += draw.sample(known, min(len(known), count - len(found)))
    return found


def every() -> list[Case]:
    return [*_stops(), *_warned(), *_free()]


def run(case: Case, folder: Path) -> str | None:
    """None where the change was shown as it should be; else what was wrong."""
    before = list(sys.path)
    try:
        make_importable(folder)
        _begin(case, folder)
        with _changed(case, folder):
            return _judged(case, folder)
    finally:
        sys.path[:] = before
        sys.modules.pop("g19_code", None)


def _judged(case: Case, folder: Path) -> str | None:
    found = _compared(folder, case.base | case.changes, case.outside)
    if case.outside == "commit":
        case = replace(case, like=case.like.format(*_commits(folder)))
    if case.kind != "stops":
        if isinstance(found, InputError):
            return f"it stopped: {found}"
        lines, others = (found.warnings, found.free) if case.kind == "warned" else (found.free, found.warnings)
        if not any(case.like in line for line in lines):
            return f"not told among {lines}"
        expected = ("hooks.more small.Interrupt", *(["train.epochs 2 -> 1"] if case.name == "shorter" else []))
        others = [line for line in others if not line.startswith(expected)]
        return f"told as well: {others}" if others else None
    if not isinstance(found, InputError):
        return f"it did not stop, and told {found}"
    told = [problem for problem in found.problems if problem.key == case.key]
    if not told or case.like not in told[0].why:
        return f"{case.key} ({case.like}) is not told in: {found}"
    if f"resume_allow=[{case.key}]" not in told[0].fix:
        return f"how to allow it is not told: {told[0].fix}"
    keys = [str(problem.key) for problem in found.problems]
    group = case.key if case.key.startswith("batch") else case.key.partition(".")[0]
    for allowed in (keys, [group]):
        again = _compared(folder, {**case.base, **case.changes, "resume_allow": allowed})
        if isinstance(again, InputError):
            return f"it stopped though {allowed} were allowed: {again}"
        if not any("allowed, and applies" in line for line in again.warnings):
            return f"what was allowed was not told: {again}"
    return _bitten(case, folder, group) if case.bites else None


def _bitten(case: Case, folder: Path, group: str) -> str | None:
    """Whether the training that goes on with the change allowed is that of the new value, and not that of the old."""
    settings = config(**{**case.base, **case.changes, "resume_allow": [group]})
    expected = by_hand(folder, settings)
    went = run_job(folder, settings)
    if went.code != 0:
        return f"the run that went on ended with {went.code}"
    losses = {record["step"]: record["loss"] for record in went.train if record["step"] > DONE}
    if expected is not None and (losses.keys() != expected.keys() or not _close(losses, expected)):
        return f"the losses are {losses}, and with the new value they are {expected}"
    same = _unchanged(json.dumps(case.base, sort_keys=True))
    return "what was allowed changed nothing" if _close(losses, same) else None


def _close(losses: dict[int, float], expected: dict[int, float]) -> bool:
    """Where both have a step."""
    steps = losses.keys() & expected.keys()
    return all(math.isclose(losses[step], expected[step], rel_tol=1e-4, abs_tol=1e-5) for step in steps)


def by_hand(folder: Path, settings: dict[str, Any]) -> dict[int, float] | None:
    """The losses from the checkpoint on in plain torch, with these settings; None where dropout is drawn."""
    if settings["model"] != spec("small.mlp"):
        return None
    (file,) = (folder / "run" / "checkpoints" / f"step_{DONE:08d}").glob("*.safetensors")
    saved = load_file(file)
    model = mlp()
    model.load_state_dict({name: saved[f"model/{name}"] for name, _ in model.named_parameters()})
    optimizer = _optimizer(model, settings["optimizer"])
    for name, p in model.named_parameters():
        before = f"optimizer/state/{name}/"
        optimizer.state[p] = {key.removeprefix(before): value for key, value in saved.items() if key.startswith(before)}
    inputs, labels = _samples(folder, settings["data"]["train"])
    order = Order(
        len(labels), settings["batch"]["global_size"], settings["seed"], drop_last=settings["data"]["drop_last"]
    )
    total = settings["train"]["epochs"] * order.steps_per_epoch
    times = 2 if settings["task"]["_target_"].endswith("Doubled") else 1
    losses = {}
    for step in range(DONE, total):
        for group in optimizer.param_groups:
            group["lr"] = settings["optimizer"]["lr"] * _factor(step, total, settings["scheduler"])
        rows = order.indices(step)
        loss = times * torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        losses[step + 1] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def _optimizer(model: torch.nn.Module, values: dict[str, Any]) -> torch.optim.Optimizer:
    """With the values of the configuration, and nothing else; parameters of `no_decay` without decay."""
    kind = {"torch.optim.AdamW": torch.optim.AdamW, "torch.optim.SGD": torch.optim.SGD}[values["_target_"]]
    given = {name: value for name, value in values.items() if name not in ("_target_", "no_decay")}
    free, decayed = [], []
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        (free if {name, last} & set(values.get("no_decay", ())) else decayed).append(p)
    groups = [{"params": decayed}, *([{"params": free, "weight_decay": 0.0}] if free else [])]
    made: torch.optim.Optimizer = kind(groups, **given)
    return made


def _factor(step: int, total: int, values: dict[str, Any] | None) -> float:
    """Of the learning rate, by the formulas that the schedules are documented with."""
    if values is None:
        return 1.0
    warm = values["warmup"] if values["warmup"] >= 1 else round(values["warmup"] * total)
    if step < warm:
        return float((step + 1) / (warm + 1))
    done, final = (step - warm) / (total - warm), values["final"]
    falls = 1 - done if values["_target_"].endswith("linear") else (1 + math.cos(math.pi * done)) / 2
    return float(final + (1 - final) * falls)


def _samples(folder: Path, values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if values == filed():
        inputs, labels = torch.load(folder / "items.pt", weights_only=True)
    else:
        inputs, labels = random_classification(**{k: v for k, v in values.items() if k != "_target_"}).tensors
    return inputs, labels


def _compared(folder: Path, changes: dict[str, Any], outside: str = "") -> Any:
    settings = config(**changes)
    plan = WorkPlan(settings, settings, ["+recipe=small"], str(folder), time.time(), run_dir="run")
    parts = check(settings)
    if outside in ("world", "threads of a world"):
        parts.backend.mesh = Mesh(0, 4)
    if outside == "device":
        parts.backend.device = torch.device("xpu")
    try:
        return compare(plan, parts, find(folder / "run"))
    except InputError as error:
        return error


# --- the run that goes on ---------------------------------------------------------------------------------------------


def _begin(case: Case, folder: Path) -> None:
    around = case.outside if case.outside in ("commit", "gone") else ""
    shutil.copytree(_trained(json.dumps(case.base, sort_keys=True), around), folder, dirs_exist_ok=True)
    if case.outside == "code":
        importlib.invalidate_caches()
        sys.modules.pop("g19_code", None)


@cache
def _keeper() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # gone with this process


@cache
def _trained(base: str, around: str = "") -> Path:
    """A folder with a run in it that was stopped after four steps; `around`: what of the case was there already."""
    folder = Path(tempfile.mkdtemp(dir=_keeper().name))
    if around == "commit":
        _git(folder, "init", "-q")
        _commit(folder)
    if around == "gone":
        library = sys.modules["nosuchlib"] = ModuleType("nosuchlib")
        library.__version__ = "0.1"  # type: ignore[attr-defined]
    (folder / "g19_code.py").write_text(CODE.format(0.0))
    torch.save(_items(50), folder / "items.pt")
    changes = json.loads(base)
    before = list(sys.path)
    sys.modules.pop("g19_code", None)
    importlib.invalidate_caches()
    with (
        mock.patch.object(Filed, "folder", folder),
        mock.patch("torch.get_num_threads", return_value=1),
        mock.patch("runner.environment._own_version", return_value="1.0"),
        mock.patch("runner.environment._COUNTING", (*environment._COUNTING, "nosuchlib")),
    ):
        hooks = {**config()["hooks"], "more": spec("small.Interrupt", step=DONE)}
        try:
            make_importable(folder)
            assert run_job(folder, config(**{**changes, "hooks": hooks})).code == 75
        finally:
            sys.path[:] = before
            sys.modules.pop("nosuchlib", None)
    return folder


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def _commit(folder: Path) -> None:
    _git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a")


def _commits(folder: Path) -> list[str]:
    return _git(folder, "log", "--reverse", "--format=%h", "--abbrev=12").split()


@cache
def _unchanged(base: str) -> dict[int, float]:
    """The losses after the fourth step where nothing is changed."""
    with tempfile.TemporaryDirectory() as path:
        shutil.copytree(_trained(base), path, dirs_exist_ok=True)
        with mock.patch.object(Filed, "folder", Path(path)):
            went = run_job(Path(path), config(**json.loads(base)))
        return {record["step"]: record["loss"] for record in went.train if record["step"] > DONE}


# --- what a change is made of -----------------------------------------------------------------------------------------


def other() -> torch.nn.Module:
    return mlp(dropout=0.3)


class Doubled(importlib.import_module("runner.tasks.classification").Classification):  # type: ignore[misc]
    def loss(self, outputs: Any, batch: Any) -> Any:
        return 2 * super().loss(outputs, batch)


class Filed(torch.utils.data.Dataset[Any]):
    """Samples in a file of the working directory."""

    folder = Path()

    def __init__(self) -> None:
        self.inputs, self.labels = torch.load(self.folder / "items.pt", weights_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index], self.labels[index]


def filed() -> dict[str, Any]:
    return spec("guarantees.cases_g19.Filed")


def _items(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, FEATURES, generator=made), torch.randint(CLASSES, (count,), generator=made)


@contextmanager
def _changed(case: Case, folder: Path) -> Iterator[None]:
    """The world as it is when the run goes on."""
    if case.outside == "contents":
        torch.save(_items(50, seed=5), folder / "items.pt")
    elif case.outside == "length":
        torch.save(tuple(part[:49] for part in _items(50)), folder / "items.pt")
    elif case.outside == "code":
        (folder / "g19_code.py").write_text(CODE.format(0.5))
    elif case.outside == "commit":
        _commit(folder)
    threads = 7 if case.outside.startswith("threads") else 1
    # Else somebody who edits the program while this runs would be found.
    program = "99.0" if case.outside == "runner" else "1.0"
    patches: list[Any] = [
        mock.patch.object(Filed, "folder", folder),
        mock.patch("runner.environment._own_version", return_value=program),
        mock.patch("torch.get_num_threads", return_value=threads),
    ]
    if case.outside in ("torch", "numpy"):
        patches.append(mock.patch(f"{case.outside}.__version__", "99.0"))
    elif case.outside == "python":
        patches.append(mock.patch("platform.python_version", return_value="3.99.1"))
    elif case.outside == "hardware":
        patches.append(mock.patch("torch.backends.cpu.get_cpu_capability", return_value="NONE"))
    with ExitStack() as patched:
        for patch in patches:
            patched.enter_context(patch)
        yield
