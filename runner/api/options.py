"""What `Engine(...)` was asked for, checked: both spellings, close matches, one precision, device and backend."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

import torch

from runner.distributed import Ranks
from runner.engine.backend import Backend
from runner.engine.backends import NAMES, backend_class
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS, LossScaling, Precision
from runner.errors import InputError, Problem, wrong

#: Accelerate's words for precisions.
_MIXED = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "fp8"}

#: Accelerate's keywords that have no counterpart of the same name, and what says the same here.
_INSTEAD = {
    "dataloader_config": "split_batches=, dispatch_batches=, even_batches= are the engine's own keywords",
    "kwargs_handlers": 'grad_scaler={"init_scale": ...}, or options of the backend: {"name": "ddp", ...}',
    "fsdp_plugin": 'backend={"name": "fsdp", "blocks": [...]}',
    "deepspeed_plugin": 'backend={"name": "deepspeed", "stage": 2}',
    "deepspeed_plugins": 'backend={"name": "deepspeed", "stage": 2}',
    "gradient_accumulation_plugin": "accumulation_steps=",
    "project_config": "project_dir=",
    "dynamo_backend": "torch.compile(model) before prepare",
    "dynamo_plugin": "torch.compile(model) before prepare",
    "rng_types": "seed=: the order of shuffled loaders is then the same on all processes",
    "use_seedable_sampler": "seed=",
}


@dataclass
class Options:
    """The engine's options after both spellings became one."""

    backend: str = "auto"
    backend_options: dict[str, Any] = field(default_factory=dict)
    precision: Precision = field(default_factory=lambda: PRECISIONS["fp32"])
    accumulation_steps: int = 1
    seed: int | None = None
    device_placement: bool = True
    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    step_scheduler_with_optimizer: bool = True
    step_scheduler_per_process: bool = False
    timeout: float = 1800.0
    project_dir: str | None = None
    trackers: Any = None
    debug: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for values that cannot be meant."""
        for item in fields(self):
            value = getattr(self, item.name)
            allowed = (True, False, None) if item.name == "dispatch_batches" else (True, False)
            if item.type.startswith("bool") and not any(value is one for one in allowed):
                raise wrong(item.name, "is neither True nor False", "give one of them", value=value)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise wrong("seed", "is not a whole number from 0 on", "seed=7, or leave it out", value=self.seed)
        number = isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool)
        if not number or not 0 < self.timeout < float("inf"):
            raise wrong("timeout", "is no number of seconds above 0", "timeout=1800", value=self.timeout)


def refuse_unknown(unknown: Mapping[str, Any], known: list[str]) -> None:
    """Raises InputError for keywords that the engine does not have, all at once."""
    problems = []
    for name in unknown:
        close = get_close_matches(name, known, 1)
        fix = _INSTEAD.get(name) or (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}")
        problems.append(Problem(name, "is no option of Engine", fix, value=unknown[name]))
    if problems:
        raise InputError(*problems)


def one_of_two(first: str, a: Any, second: str, b: Any, default: Any) -> Any:
    """The value of an option that has two names. Raises InputError where they contradict."""
    if a is not None and b is not None and a != b:
        raise wrong(second, f"contradicts {first}={a}", f"give one of {first} and {second}", value=b)
    return default if a is None and b is None else b if a is None else a


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, "is not a whole number from 1 on", "1 steps the optimizer with every batch", value=value)
    return value


def precision_of(precision: str | None, mixed: str | None, scaling: Mapping[str, Any] | None) -> Precision:
    """The precision by its own or Accelerate's name, with the options of its loss scaling."""
    if mixed is not None and str(mixed) not in _MIXED:
        raise wrong("mixed_precision", "is not known", f"one of {', '.join(_MIXED)}", value=mixed)
    name = one_of_two("precision", precision, "mixed_precision", None if mixed is None else _MIXED[str(mixed)], "fp32")
    if name not in PRECISIONS:
        raise wrong("precision", "is not known here", f"one of {', '.join(PRECISIONS)}", value=name)
    found = PRECISIONS[name]
    if scaling is None:
        return found
    if found.loss_scaling is None:
        raise wrong("grad_scaler", f"{name} scales no loss", 'precision="fp16", or leave it out', value=dict(scaling))
    known = [item.name for item in fields(LossScaling)]
    for word in scaling:
        if word not in known:
            raise wrong(f"grad_scaler.{word}", "is no option of loss scaling", f"known are {', '.join(known)}")
    return replace(found, loss_scaling=replace(found.loss_scaling, **scaling))


def backend_of(backend: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A backend's name and its options."""
    if not isinstance(backend, (str, Mapping)):
        fix = f'one of {", ".join(NAMES)}, or a mapping: {{"name": "fsdp", "blocks": ["Block"]}}'
        raise wrong("backend", f"a {type(backend).__name__} is no backend", fix, value=backend)
    values = {"name": backend} if isinstance(backend, str) else dict(backend)
    name = values.pop("name", None)
    if name not in NAMES:
        raise wrong("backend", "is not known", f"one of {', '.join(NAMES)}", value=name)
    return str(name), values


def device_of(device: str | torch.device, cpu: bool, ranks: Ranks) -> torch.device:
    """The device of this process. Raises InputError where it is not there."""
    asked = torch.device(device) if str(device) != "auto" else None
    if cpu and asked is not None and asked.type != "cpu":
        raise wrong("cpu", f"contradicts device={device}", "give one of the two", value=cpu)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = "cpu" if cpu else next(name for name, yes in there.items() if yes) if asked is None else asked.type
    if not there.get(kind):
        works = ", ".join(["auto", *(name for name, yes in there.items() if yes)])
        raise wrong("device", "there is no such device here", f"one of {works}", value=str(device))
    if kind != "cuda":
        return torch.device(kind)
    index = ranks.local_rank if asked is None or asked.index is None else asked.index
    if index >= torch.cuda.device_count():
        why = f"process {ranks.local_rank} of this machine would need GPU {index}, and there are "
        raise wrong("device", f"{why}{torch.cuda.device_count()}", "start fewer processes, or device=cpu", value=kind)
    return torch.device("cuda", index)


def build_backend(options: Options, device: torch.device, ranks: Ranks) -> Backend:
    """The adapter that was asked for, or InputError with everything that it cannot do here."""
    kind = backend_class(options.backend, ranks.world_size)
    values = dict(options.backend_options)
    replicas = values.pop("replicas", 1)
    known = [name for name in inspect.signature(kind).parameters if name not in ("device", "precision", "mesh")]
    for name, value in values.items():
        if name not in known:
            close = get_close_matches(name, known, 1)
            fix = f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none'}"
            raise wrong(f"backend.{name}", f"is no option of {kind.name}", fix, value=value)
    backend = kind(device, options.precision, Mesh(ranks.rank, ranks.world_size, replicas), **values)
    problems = backend.check()
    if problems:
        raise InputError(*problems)
    return backend
