"""THE place where configuration becomes objects: checks first, then everything a run is made of."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runner import build
from runner.checkpoint import Checkpointer, RandomState
from runner.data.loader import Loader
from runner.data.order import Order
from runner.engine.backend import Backend
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.optimizer import fused_by_default, parameter_groups, without_compiler
from runner.engine.precision import LossScaling, Precision
from runner.engine.single import Single
from runner.errors import InputError, Problem, wrong
from runner.folder import RunFolder
from runner.hooks.early_stop import EarlyStop
from runner.hooks.evaluation import Evaluation
from runner.trackers import Trackers
from runner.train import hook
from runner.train.evaluate import evaluate
from runner.train.progress import Plan, Progress
from runner.train.run import Run, SaveEvery, Settings
from runner.train.schedules import Schedule
from runner.train.task import Task

Config = Mapping[str, Any]

_BACKENDS: dict[str, type[Backend]] = {"single": Single, "auto": Single}

#: Words for the scheduler's arguments that are known only when the data are.
_LATE = {"_total_steps_": "steps", "_steps_per_epoch_": "steps_per_epoch"}

#: State that may be missing in a checkpoint or left over in it: hooks come and go.
OPTIONAL = ("hooks.*",)

_log = logging.getLogger("runner")


@dataclass
class Parts:
    """What can be built, and found wrong, before a model exists."""

    backend: Backend
    task: Task
    train: Any
    eval: Any
    collate: Callable[[list[Any]], Any] | None
    plan: Plan
    hooks: dict[str, Any]
    trackers: Trackers


# --- checks ---------------------------------------------------------------------------------------------------------


def check(config: Config) -> Parts:
    """Builds all that needs no model (backend, task, data, hooks, trackers) and checks what can be checked before one.

    Raises InputError with all problems found.
    """
    problems: list[Problem] = []
    backend = _gathered(problems, _backend, config)
    problems += _signatures(config)
    problems += backend.check() if backend is not None else []
    if problems or backend is None:
        raise InputError(*problems)
    task = _gathered(problems, _constructed, config["task"], "task")
    hooks = _hooks(config, problems)
    train, evaluation, collate = _gathered(problems, _data, config["data"]) or (None, None, None)
    sets = {name: found for name, found in (("data.train", train), ("data.eval", evaluation)) if found is not None}
    for name, found in sets.items():
        problems += _data_problems(config, name, found) or (task.check(found, name) if isinstance(task, Task) else [])
    if task is not None and not isinstance(task, Task):
        problems += _not_a_task(task, config)
    plan = Plan(1, 1)
    if train is not None and hasattr(train, "__len__") and len(train) and not _leaves_nothing(config, train):
        plan = _plan(config, _order(config, len(train)))
    problems += _unreported(config) if evaluation is None else []
    problems += _optimizer_problems(config, plan)
    if problems:
        raise InputError(*problems)
    return Parts(backend, task, train, evaluation, collate, plan, hooks, _trackers(config))


def _gathered(problems: list[Problem], call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call gives; None where it raises InputError, whose problems join the list."""
    try:
        return call(*arguments)
    except InputError as error:
        problems += error.problems
        return None


def _signatures(config: Config) -> list[Problem]:
    """Every `_target_` of the configuration: can be imported, takes these arguments."""
    optimizer = {k: v for k, v in config["optimizer"].items() if k != "no_decay"}
    scheduler = {k: _stand_in(v) for k, v in (config["scheduler"] or {}).items() if k != "monitor"}
    data = config["data"]
    problems = [
        *build.check(config["model"], "model"),
        *build.check(config["task"], "task"),
        *build.check(optimizer, "optimizer", given=1),
        *build.check(scheduler, "scheduler", given=1, also=("total_steps", "steps_per_epoch")),
        *build.check(_for_target(data) if build.is_spec(data) else {}, "data"),
    ]
    for name in ("train", "eval", "collate"):
        if build.is_spec(data[name]):
            problems += build.check(data[name], f"data.{name}")
    for group in ("hooks", "trackers"):
        for name, spec in config[group].items():
            if spec is None:
                continue
            found = build.check(spec, f"{group}.{name}")
            problems += found or (_hook_events(name, spec) if group == "hooks" else [])
    return problems


def _hook_events(name: str, spec: Config) -> list[Problem]:
    return hook.check(name, build.find(spec["_target_"]))


def _stand_in(value: Any) -> Any:
    return 1 if _is_late(value) else value


def _is_late(value: Any) -> bool:
    return isinstance(value, str) and value in _LATE


def _not_a_task(task: Any, config: Config) -> list[Problem]:
    needed = [name for name in ("inputs", "loss", "weight", "metrics", "check") if not hasattr(task, name)]
    if not needed:
        return []
    return [
        Problem(
            "task._target_",
            f"built a {type(task).__name__}, which has no {', '.join(needed)}",
            "derive it from runner.train.task.Task",
            value=config["task"]["_target_"],
        )
    ]


def _unreported(config: Config) -> list[Problem]:
    """What waits for a metric where nothing is ever evaluated."""
    why = "waits for evaluations, and there are no held-out data"
    return [Problem(key, why, "give data.eval, or leave it out") for key, _ in wanted_metrics(config)]


def wanted_metrics(config: Config) -> list[tuple[str, str]]:
    """(key, metric) for everything in the configuration that waits for a metric of an evaluation."""
    wanted = []
    best = (config["checkpoint"] or {}).get("best")
    if best is not None:
        wanted.append(("checkpoint.best.metric", best["metric"]))
    for name, spec in config["hooks"].items():
        if spec is not None and build.find(spec["_target_"]) is EarlyStop:
            wanted.append((f"hooks.{name}.metric", spec.get("metric", "loss")))
    spec = config["scheduler"]
    if spec and build.find(spec["_target_"]) is torch.optim.lr_scheduler.ReduceLROnPlateau:
        wanted.append(("scheduler.monitor", spec.get("monitor", "loss")))
    return wanted


def check_metrics(run: Run) -> None:
    """Raises InputError for metrics that are waited for and that no evaluation reports: looks at one step of one."""
    wanted = wanted_metrics(run.config)
    if not wanted or run.eval_data is None:
        return
    reported = [name for name in evaluate(run, steps=1) or () if name != "samples"]
    problems = [
        Problem(key, "no evaluation reports it", f"choose of {', '.join(reported)}", value=name)
        for key, name in wanted
        if name not in reported
    ]
    if problems:
        raise InputError(*problems)


def _optimizer_problems(config: Config, plan: Plan) -> list[Problem]:
    """What optimizer and scheduler refuse, tried on one small parameter instead of a model's."""
    problems: list[Problem] = []
    without_compiler()
    small = torch.nn.Linear(2, 2)
    optimizer = _gathered(problems, _optimizer_factory(config, torch.device("cpu")), small)
    _gathered(problems, _schedule, config, optimizer or torch.optim.SGD(small.parameters(), lr=0.1), plan)
    return problems


def _device(config: Config) -> torch.device:
    name = config["device"]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(word for word in ("cuda", "mps", "cpu") if there[word])
    if not there[name]:
        works = ", ".join(["auto", *(word for word, yes in there.items() if yes)])
        raise wrong("device", "there is no such device here", f"use one of {works}", value=name)
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _precision(config: Config) -> Precision:
    values = dict(config["precision"])
    scaling = values.pop("loss_scaling")
    dtypes = {name: getattr(torch, values.pop(name)) for name in ("param_dtype", "compute_dtype", "reduce_dtype")}
    return Precision(**values, **dtypes, loss_scaling=None if scaling is None else LossScaling(**scaling))


def _backend(config: Config) -> Backend:
    return _BACKENDS[config["backend"]["name"]](_device(config), _precision(config), Mesh())


_DATA_KEYS = ("collate", "num_workers", "drop_last", "group_by_length")


def _for_target(data: Config) -> dict[str, Any]:
    """The part of `data` that a target of its own is called with."""
    return {key: value for key, value in data.items() if key not in _DATA_KEYS and not _unset(key, value)}


def _unset(key: str, value: Any) -> bool:
    return key in ("train", "eval") and value is None


def _data(data: Config) -> tuple[Any, Any, Any]:
    """(train, eval, collate): each built from its own key, or all by the target of `data` itself."""
    collate = build.build(data["collate"])
    if not build.is_spec(data):
        return _built(data["train"], "data.train"), _built(data["eval"], "data.eval"), collate
    both = _built(_for_target(data), "data")
    return both.train, getattr(both, "eval", None), collate or getattr(both, "collate", None)


def _constructed(spec: Config, key: str, *given: Any, **also: Any) -> Any:
    """Builds what takes nothing but configured values: what it refuses is the user's input."""
    try:
        return build.build(spec, *given, **also)
    except InputError as error:
        # Hooks speak of the name they have by default.
        raise InputError(*(replace(p, key=_renamed(p.key, key)) for p in error.problems)) from error
    except Exception as error:
        named = next((name for name in spec if re.search(rf"\b{re.escape(name)}\b", str(error))), None)
        where, value = (key, {}) if named is None else (f"{key}.{named}", {"value": spec[named]})
        why = f"{spec['_target_']} refused: {type(error).__name__}: {error}"
        raise wrong(where, why, "mend the value; HYDRA_FULL_ERROR=1 shows where it was raised", **value) from error


def _renamed(said: str | None, key: str) -> str:
    parts = (said or "").split(".")
    return ".".join([key, *parts[2:]]) if parts[0] == "hooks" and key.startswith("hooks.") else said or key


def _built(spec: Any, key: str) -> Any:
    try:
        return build.build(spec)
    except InputError:
        raise
    except OSError as error:
        why = str(error.strerror or error)
        raise wrong(key, why, "give the path of a file that can be read", value=error.filename) from error
    except Exception as error:
        why = f"building it failed: {type(error).__name__}: {error}"
        raise wrong(key, why, "mend what it names; HYDRA_FULL_ERROR=1 shows where it was raised") from error


def _leaves_nothing(config: Config, train: Any) -> bool:
    return config["data"]["drop_last"] and len(train) < config["batch"]["global_size"]


def _data_problems(config: Config, key: str, dataset: Any) -> list[Problem]:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return [
            Problem(key, f"built a {type(dataset).__name__}, which has no length and index", "use a map-style data set")
        ]
    size = config["batch"]["global_size"]
    if len(dataset) == 0:
        return [Problem(key, "is empty: it has no sample", "check the file or the filter that made it")]
    if key == "data.train" and _leaves_nothing(config, dataset):
        why = f"leaves nothing: {len(dataset)} samples are fewer than batch.global_size={size}"
        return [
            Problem(
                "data.drop_last", why, f"set it to false, or batch.global_size to at most {len(dataset)}", value=True
            )
        ]
    if config["data"]["group_by_length"] and not hasattr(dataset, "lengths"):
        why = f"needs a data set that tells the lengths of its samples, and {type(dataset).__name__} has no `lengths`"
        return [Problem("data.group_by_length", why, "set it to false, or give the data set a `lengths`", value=True)]
    return []


# --- the run --------------------------------------------------------------------------------------------------------


def assemble(
    config: Config, parts: Parts, folder: RunFolder, *, resume: Path | None, terminal: str | None = None
) -> Run:
    """Builds everything else and goes to where the checkpoint `resume` stands.

    Raises InputError where model, optimizer or scheduler turn out not to fit what the configuration says.
    """
    _global_switches(config, parts.backend)
    engine = Engine(parts.backend)
    torch.manual_seed(config["seed"])
    engine.prepare(_model_factory(config), _optimizer_factory(config, engine.device))
    train_data, eval_data = _loaders(config, parts, engine)
    plan = parts.plan
    schedule = _schedule(config, engine.optimizer, plan)
    progress = Progress()
    hooks = parts.hooks
    stateful = {name: item for name, item in hooks.items() if hasattr(item, "state_dict")}
    state = {
        **engine.state(),
        "scheduler": schedule,
        "progress": progress,
        **{f"hooks.{name}": item for name, item in stateful.items()},
        "random": RandomState(),
    }
    checkpointer = _checkpointer(config, folder, state)
    if resume is not None:
        loader = checkpointer or Checkpointer(folder.path / "checkpoints", state, optional=OPTIONAL)
        loader.load(resume, convert=True)
    return Run(
        name=config["name"],
        config=config,
        folder=folder,
        engine=engine,
        task=parts.task,
        schedule=schedule,
        train_data=train_data,
        eval_data=eval_data,
        plan=plan,
        progress=progress,
        settings=Settings(config["seed"], config["log"]["every"], config["grad_clip"], config["nan"]),
        hooks=hooks,
        events=hook.events(hooks.values()),
        trackers=parts.trackers,
        checkpointer=checkpointer,
        save_every=_save_every(config, plan),
        counts_tokens=getattr(type(parts.task), "tokens", Task.tokens) is not Task.tokens,
        terminal=terminal,
    )


def _global_switches(config: Config, backend: Backend) -> None:
    threads = config["launch"]["threads"]
    if threads is not None:
        torch.set_num_threads(threads)
    deterministic = config["determinism"] == "kernels"
    # Asked only where it changes something: the call imports the compiler's configuration, half a second.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if backend.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if backend.precision.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = backend.precision.tf32


def _model_factory(config: Config) -> Callable[[], torch.nn.Module]:
    def build_model() -> torch.nn.Module:
        model = build.build(config["model"])
        if not isinstance(model, torch.nn.Module):
            target = config["model"]["_target_"]
            raise wrong(
                "model", f"built a {type(model).__name__}", "name something that gives a torch.nn.Module", value=target
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise wrong("model", "has no parameter that can be trained", "unfreeze some")
        return model

    return build_model


def _optimizer_factory(config: Config, device: torch.device) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    spec = {key: value for key, value in config["optimizer"].items() if key != "_partial_"}
    no_decay = spec.pop("no_decay", None) or ()
    spec |= fused_by_default(build.find(spec["_target_"]), list(spec), device)
    return lambda model: _constructed(spec, "optimizer", parameter_groups(model, no_decay))


def _loaders(config: Config, parts: Parts, engine: Engine) -> tuple[Loader, Loader | None]:
    data, micro, mesh = config["data"], config["batch"]["micro_size"], engine.mesh

    def lengths(dataset: Any) -> Any:
        return dataset.lengths if data["group_by_length"] else None

    def loader(dataset: Any, order: Order, size: int) -> Loader:
        return Loader(
            dataset,
            order,
            size,
            collate=parts.collate,
            num_workers=data["num_workers"],
            device=engine.device,
            reader=mesh.data_rank,
            readers=mesh.data_size,
        )

    train = loader(parts.train, _order(config, len(parts.train), lengths(parts.train)), micro)
    if parts.eval is None:
        return train, None
    size = config["eval"]["micro_size"] or micro
    order = Order(len(parts.eval), size * mesh.data_size, lengths=lengths(parts.eval), shuffle=False)
    return train, loader(parts.eval, order, size)


def _order(config: Config, samples: int, lengths: Any = None) -> Order:
    """The order of the training samples."""
    drop_last = config["data"]["drop_last"]
    return Order(samples, config["batch"]["global_size"], config["seed"], drop_last=drop_last, lengths=lengths)


def _plan(config: Config, order: Order) -> Plan:
    steps = config["train"]["steps"] or config["train"]["epochs"] * order.steps_per_epoch
    return Plan(steps, order.steps_per_epoch)


def _schedule(config: Config, optimizer: torch.optim.Optimizer, plan: Plan) -> Schedule:
    spec = {key: value for key, value in (config["scheduler"] or {}).items() if key != "_partial_"}
    if not spec:
        return Schedule(None)
    metric = spec.pop("monitor", "loss")
    spec = {key: getattr(plan, _LATE[value]) if _is_late(value) else value for key, value in spec.items()}
    target = build.find(spec["_target_"])
    late = {"total_steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch}
    also = {name: value for name, value in late.items() if name not in spec and build.accepts(target, name)}
    return Schedule(_constructed(spec, "scheduler", optimizer, **also), metric)


def _hooks(config: Config, problems: list[Problem]) -> dict[str, Any]:
    every = config["eval"]["every"]
    hooks: dict[str, Any] = {}
    if every != "never":
        hooks["evaluation"] = Evaluation(every if isinstance(every, int) else None)
    for name, spec in config["hooks"].items():
        if spec is not None:
            hooks[name] = _gathered(problems, _constructed, spec, f"hooks.{name}")
    return hooks


def _trackers(config: Config) -> Trackers:
    """The trackers that can be built; one that cannot says so and does not lose the run."""
    trackers = {}
    for name, spec in config["trackers"].items():
        try:
            if spec is not None:
                trackers[name] = build.build(spec)
        except Exception as error:
            _log.warning("tracker %s is left out; the run goes on: %s: %s", name, type(error).__name__, error)
    return Trackers(trackers)


def _checkpointer(config: Config, folder: RunFolder, state: Mapping[str, Any]) -> Checkpointer | None:
    options = config["checkpoint"]
    if options is None:
        return None
    best = options["best"]
    named = None if best is None else (best["metric"], best["mode"])
    return Checkpointer(folder.path / "checkpoints", state, options["keep"], named, optional=OPTIONAL)


def _save_every(config: Config, plan: Plan) -> SaveEvery:
    every = (config["checkpoint"] or {}).get("every") or {}
    if every.get("epochs"):
        return SaveEvery(steps=every["epochs"] * plan.steps_per_epoch)
    return SaveEvery(every.get("steps"), every.get("seconds"))
