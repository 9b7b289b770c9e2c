"""G19: what differs between a checkpoint and the run that goes on from it is shown, and stops where it is dangerous.

A case changes one thing: a key of the configuration, or something beside it (a version, the threads, the contents of a
data set). It names the class that the change belongs to. Of a change that stops, the message must name key, both
values and how to allow it; allowed by its key and by its group it must go on, and must bite: the losses that follow are
not those of the run that changed nothing.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small import CLASSES, FEATURES, config, data, mlp, run_job, spec

from runner import drift
from runner.assemble import check
from runner.checkpoint import find
from runner.drift import compare
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
    yield one("python", "python was ", outside="python")
    yield one("torch", "torch was ", outside="torch")
    yield one("numpy", "numpy was ", outside="numpy")
    yield one("the program", "runner was ", outside="runner")
    yield one("a library gone", "nosuchlib was 0.1 and is not installed", outside="gone")
    yield one("device", "device was cuda and is cpu", outside="device")
    yield one("commit", "git commit was 1111111 and is 2222222", outside="commit")
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
    yield one("threads of another world", "threads 1 -> 7", {}, outside="threads of a world")
    yield one("trust", "trust [] -> ['mine.Net']", {"trust": ["mine.Net"]})
    yield one("weights to begin with", "init_from is not used", {"init_from": "elsewhere.safetensors"})


def cases(count: int, seed: int) -> list[Case]:
    """All of them, in an order of the seed's; a larger count takes them again."""
    known = [*_stops(), *_warned(), *_free()]
    draw = random.Random(seed)
    found: list[Case] = []
    while len(found) < count:
        found += draw.sample(known, len(known))
    return found[:count]


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
    found = _compared(folder, case.base | case.changes)
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
    """Whether the training that goes on with the change allowed is another one than without it."""
    went = run_job(folder, config(**{**case.base, **case.changes, "resume_allow": [group]}))
    if went.code != 0:
        return f"the run that went on ended with {went.code}"
    losses = [record["loss"] for record in went.train if record["step"] > DONE]
    same = _unchanged(json.dumps(case.base, sort_keys=True))
    return "what was allowed changed nothing" if losses[: len(same)] == same[: len(losses)] else None


def _compared(folder: Path, changes: dict[str, Any]) -> Any:
    settings = config(**changes)
    plan = WorkPlan(settings, settings, ["+recipe=small"], str(folder), time.time(), run_dir="run")
    try:
        return compare(plan, check(settings), find(folder / "run"))
    except InputError as error:
        return error


# --- the run that goes on ---------------------------------------------------------------------------------------------


def _begin(case: Case, folder: Path) -> None:
    shutil.copytree(_trained(json.dumps(case.base, sort_keys=True)), folder, dirs_exist_ok=True)
    if case.outside == "code":
        importlib.invalidate_caches()
        sys.modules.pop("g19_code", None)


@cache
def _keeper() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # gone with this process


@cache
def _trained(base: str) -> Path:
    """A folder with a run in it that was stopped after four steps."""
    folder = Path(tempfile.mkdtemp(dir=_keeper().name))
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
    ):
        hooks = {**config()["hooks"], "more": spec("small.Interrupt", step=DONE)}
        try:
            make_importable(folder)
            assert run_job(folder, config(**{**changes, "hooks": hooks})).code == 75
        finally:
            sys.path[:] = before
    return folder


@cache
def _unchanged(base: str) -> list[float]:
    """The losses after the fourth step where nothing is changed."""
    with tempfile.TemporaryDirectory() as path:
        shutil.copytree(_trained(base), path, dirs_exist_ok=True)
        with mock.patch.object(Filed, "folder", Path(path)):
            went = run_job(Path(path), config(**json.loads(base)))
        return [record["loss"] for record in went.train if record["step"] > DONE]


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
    patches: list[Any] = [mock.patch.object(Filed, "folder", folder)]
    # Else somebody who edits the program while this runs would be found.
    patches.append(mock.patch("runner.environment._own_version", return_value="1.0"))
    threads = 7 if case.outside.startswith("threads") else 1
    patches.append(mock.patch("torch.get_num_threads", return_value=threads))
    found = drift.setting
    patches.append(mock.patch.object(drift, "setting", lambda *given: _altered(case.outside, found, given)))
    extra = drift.extra_of
    patches.append(mock.patch.object(drift, "extra_of", lambda path: _aged(case.outside, extra(path))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _altered(outside: str, setting: Callable[..., dict[str, Any]], given: Any) -> dict[str, Any]:
    """What the run that goes on finds around it."""
    made = setting(*given)
    if outside == "python":
        made["python"] = "3.99.1"
    elif outside in ("torch", "numpy", "runner"):
        made["versions"] = {**made["versions"], outside: "99.0"}
    elif outside == "commit":
        made["commit"] = "2222222"
    return made


def _aged(outside: str, extra: dict[str, Any]) -> dict[str, Any]:
    """What another computer would have saved."""
    setting = extra["setting"]
    if outside == "device":
        setting["device"] = "cuda"
    elif outside == "threads of a world":
        setting["world"] = 4
    elif outside == "gone":
        setting["versions"]["nosuchlib"] = "0.1"
    elif outside == "commit":
        setting["commit"] = "1111111"
    elif outside == "numpy":
        setting["versions"]["numpy"] = "1.0"
    return extra
