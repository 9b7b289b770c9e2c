"""THE place where configuration becomes objects: checks first, then everything a run is made of."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from runner import build
from runner.checkpoint import Checkpointer, RandomState
from runner.data.main import Remote
from runner.data.reading import AnyLoader, AnyOrder, Reading, training_order
from runner.data.reading import problems as data_problems
from runner.data.stream import StreamOrder
from runner.distributed import ALONE, Ranks
from runner.engine.backend import Backend
from runner.engine.backends import backend_class
from runner.engine.canonical import Canonical, CanonicalEngine
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.optimizer import fused_by_default, parameter_groups, without_compiler
from runner.engine.precision import LossScaling, Precision
from runner.errors import InputError, Problem, wrong
from runner.folder import RunFolder
from runner.hooks.early_stop import EarlyStop
from runner.hooks.evaluation import Evaluation
from runner.keyed import seed_all
from runner.recipe.canonical import shards
from runner.trackers import Trackers
from runner.train import hook
from runner.train.evaluate import evaluate
from runner.train.progress import Plan, Progress
from runner.train.run import Built, Run, SaveEvery, Settings
from runner.train.schedules import Schedule
from runner.train.task import Task
from runner.train.trial import trial

Config = Mapping[str, Any]

#: Words for the scheduler's arguments that are known only when the data are.
_LATE = {"_total_steps_": "steps", "_steps_per_epoch_": "steps_per_epoch"}

#: State that may be missing in a checkpoint or left over in it: hooks and trackers come and go.
OPTIONAL = ("hooks.*", "trackers.*", "buckets")

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
    #: Of the data sets, once somebody has asked for them.
    fingerprints: dict[str, Any] | None = None


# --- checks ---------------------------------------------------------------------------------------------------------


def needs_group(config: Config, ranks: Ranks) -> bool:
    """Whether the processes must know of each other, even if there is only one."""
    return ranks.world_size > 1 or backend_class(config["backend"]["name"], 1).grouped


def check(
    config: Config,
    ranks: Ranks = ALONE,
    remote: tuple[Remote, Remote | None] | None = None,
) -> Parts:
    """Builds all that needs no model (backend, task, data, hooks, trackers) and checks what can be checked before one.

    `remote` stands for (training, held-out) data that only the first process reads. Raises InputError with all
    problems found.
    """
    problems: list[Problem] = []
    backend = _gathered(problems, _backend, config, ranks)
    problems += _signatures(config)
    problems += backend.check() if backend is not None else []
    if config["compile"] and backend is not None:
        from runner.engine import compiling

        problems += compiling.check(config["compile"], backend.device, config["activation_checkpointing"])
    if problems or backend is None:
        raise InputError(*problems)
    task = _gathered(problems, _constructed, config["task"], "task")
    hooks = _hooks(config, problems)
    train: Any = None
    evaluation: Any = None
    collate: Any = None
    if remote is not None:
        train, evaluation = remote
    else:
        train, evaluation, collate = _gathered(problems, _data, config["data"]) or (None, None, None)
    sets = {"data.train": train, "data.eval": evaluation} if remote is None else {}
    for name, found in sets.items():
        if found is not None:
            wrong_data = _data_problems(config, name, found)
            problems += wrong_data or (task.check(found, name) if isinstance(task, Task) else [])
    if task is not None and not isinstance(task, Task):
        problems += _not_a_task(task, config)
    plan = Plan(1, 1)
    if train is not None and not problems:
        plan = _plan(config, _order(config, train))
    problems += _unreported(config) if evaluation is None else []
    problems += _optimizer_problems(config, plan)
    if problems:
        raise InputError(*problems)
    trackers = _trackers(config) if ranks.main else Trackers({})
    return Parts(backend, task, train, evaluation, collate, plan, hooks, trackers)


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
    with trial(run.engine.model, run.eval_data):
        found = evaluate(run, steps=1)
    reported = [name for name in found or () if name != "samples"]
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


def _device(config: Config, ranks: Ranks) -> torch.device:
    name = config["device"]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(word for word in ("cuda", "mps", "cpu") if there[word])
    if not there[name]:
        works = ", ".join(["auto", *(word for word, yes in there.items() if yes)])
        raise wrong("device", "there is no such device here", f"use one of {works}", value=name)
    if name != "cuda":
        return torch.device(name)
    # Under srun a process may see a GPU of its own only; too many processes were refused before any started.
    return torch.device(name, ranks.local_rank % torch.cuda.device_count())


def _precision(config: Config) -> Precision:
    values = dict(config["precision"])
    scaling = values.pop("loss_scaling")
    dtypes = {name: getattr(torch, values.pop(name)) for name in ("param_dtype", "compute_dtype", "reduce_dtype")}
    return Precision(**values, **dtypes, loss_scaling=None if scaling is None else LossScaling(**scaling))


def _backend(config: Config, ranks: Ranks) -> Backend:
    options = {key: value for key, value in config["backend"].items() if key != "name"}
    mesh = Mesh(ranks.rank, ranks.world_size, options.pop("replicas", 1))
    kind: Any = backend_class(config["backend"]["name"], ranks.world_size)
    if config["determinism"] == "canonical":
        options |= {"shards": shards(config["batch"]["global_size"]), "kind": kind.name}
        kind = Canonical
    if build.accepts(kind, "recipe"):
        options["recipe"] = {
            **config["batch"],
            "optimizer": config["optimizer"],
            "activation_checkpointing": config["activation_checkpointing"],
            "accumulation": config["accumulation"]["steps"],
            "grad_clip": config["grad_clip"],
            "nan": config["nan"],
        }
    return kind(_device(config, ranks), _precision(config), mesh, **options)


_DATA_KEYS = ("collate", "num_workers", "reader", "drop_last", "group_by_length")


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


def _data_problems(config: Config, key: str, dataset: Any) -> list[Problem]:
    every = (config["checkpoint"] or {}).get("every") or {}
    return data_problems(
        key,
        dataset,
        global_size=config["batch"]["global_size"],
        drop_last=config["data"]["drop_last"],
        group_by_length=config["data"]["group_by_length"],
        epochs=not config["train"]["steps"] or bool(every.get("epochs")),
    )


# --- the run --------------------------------------------------------------------------------------------------------


def assemble(
    config: Config, parts: Parts, folder: RunFolder, *, resume: Path | None, terminal: str | None = None
) -> Run:
    """Builds everything else and goes to where the checkpoint `resume` stands.

    Raises InputError where model, optimizer or scheduler turn out not to fit what the configuration says.
    """
    _global_switches(config, parts.backend)
    engine = (CanonicalEngine if isinstance(parts.backend, Canonical) else Engine)(parts.backend)
    torch.manual_seed(config["seed"])
    # Python's and numpy's generators as well: what a hook draws follows from the seed, also after a resume.
    importlib.import_module("numpy.random")  # otherwise whoever uses it first would find it unseeded
    seed_all(config["seed"])
    begin = None if resume is not None or config["init_from"] is None else _first_weights(config["init_from"])
    model = _ModelFactory(config)
    engine.prepare(model, _optimizer_factory(config, engine.device, engine.backend.fused))
    if begin is not None:
        begin(engine.state()["model"], model.tied)
    progress = Progress()
    train_data, eval_data = _loaders(config, parts, engine, progress)
    plan = parts.plan
    schedule = _schedule(config, engine.optimizer, plan)
    hooks = parts.hooks
    for item in hooks.values():
        if hasattr(item, "placed"):
            item.placed(engine)
    stateful = {name: item for name, item in hooks.items() if hasattr(item, "state_dict")}
    state = {
        **engine.state(),
        **engine.backend.extras(),
        "scheduler": schedule,
        "progress": progress,
        **({"data": train_data} if isinstance(train_data.order, StreamOrder) else {}),
        **{f"hooks.{name}": item for name, item in stateful.items()},
        **{f"trackers.{name}": item for name, item in parts.trackers.stateful.items()},
        "random": RandomState(),
    }
    checkpointer = _checkpointer(config, folder, state, resume)
    if resume is not None:
        loader = checkpointer or Checkpointer(folder.path / "checkpoints", state, optional=OPTIONAL)
        loader.load(resume, convert=True)
        if engine.mesh.data_size > 1 and (why := engine.backend.forgets()) is not None:
            _log.warning("the last digits will not be those of a run that was not interrupted: %s", why)
        schedule.catch_up(progress.step - progress.skipped)
    return Run(
        name=config["name"],
        config=config,
        folder=folder,
        engine=engine,
        model=model.built,
        task=parts.task,
        schedule=schedule,
        train_data=train_data,
        eval_data=eval_data,
        plan=plan,
        progress=progress,
        settings=_settings(config),
        hooks=hooks,
        events=hook.events(hooks.values()),
        trackers=parts.trackers,
        checkpointer=checkpointer,
        save_every=_save_every(config, plan),
        fits=config["batch"]["micro_size"] == "auto",
        counts_tokens=getattr(type(parts.task), "tokens", Task.tokens) is not Task.tokens,
        terminal=terminal,
    )


def _settings(config: Config) -> Settings:
    saving = config["checkpoint"] or {"async": False, "on_error": "stop"}
    return Settings(
        config["seed"],
        config["log"]["every"],
        config["grad_clip"],
        config["nan"],
        saves_async=saving["async"],
        on_error=saving["on_error"],
    )


def _first_weights(asked: Any) -> Callable[[Any, Mapping[str, str]], None]:
    """Finds somebody's weights before there is a model; puts them into its state, and says what became of them."""
    from runner.checkpoint import weights

    wanted = weights.Asked.of(asked)
    source = weights.find_together(wanted, Path.cwd())

    def begin(state: Any, tied: Mapping[str, str]) -> None:
        done, left = weights.begin_with(wanted, source, state, tied)
        _log.info("init_from: %s", done)
        for words in left:
            _log.warning("init_from: %s", words)

    return begin


def _global_switches(config: Config, backend: Backend) -> None:
    canonical = config["determinism"] == "canonical"
    threads = 1 if canonical else config["launch"]["threads"]
    if threads is not None:
        torch.set_num_threads(threads)
    # On a CPU one thread is enough for the same bits.
    deterministic = config["determinism"] == "kernels" or (canonical and backend.device.type != "cpu")
    # Asked only where it changes something: the call imports the compiler's configuration, half a second.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    if backend.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if backend.precision.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = backend.precision.tf32


class _ModelFactory:
    """Builds the model of the configuration, and knows afterwards what was built, however a backend wraps it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.built = Built()
        #: Further names of tied weights -> the first.
        self.tied: dict[str, str] = {}

    def __call__(self) -> torch.nn.Module:
        model = build.build(self._config["model"])
        if not isinstance(model, torch.nn.Module):
            target = self._config["model"]["_target_"]
            raise wrong(
                "model", f"built a {type(model).__name__}", "name something that gives a torch.nn.Module", value=target
            )
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        if not any(is_trained for _, is_trained in sizes):
            raise wrong("model", "has no parameter that can be trained", "unfreeze some")
        self.built = Built(type(model).__name__, sum(size for size, _ in sizes), trained)
        self.tied = _tied_names(model)
        return self._transformed(model)

    def _transformed(self, model: torch.nn.Module) -> torch.nn.Module:
        """In this order: float8 replaces modules; the compiler must see the checkpointing; the backend wraps all."""
        config = self._config
        if config["precision"]["float8"]:
            from runner.engine import fp8

            fp8.convert(model, config["precision"]["emulate"])
        if config["activation_checkpointing"] != "none":
            from runner.engine.checkpointing import checkpoint_activations

            checkpoint_activations(model, config["activation_checkpointing"])
        if config["compile"]:
            from runner.engine.compiling import compile_model

            compile_model(model, config["compile"])
        return model


def _tied_names(model: torch.nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: known for name, value in named if (known := first.setdefault(id(value), name)) != name}


def _optimizer_factory(
    config: Config, device: torch.device, able: Collection[str] | None = None
) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    spec = {key: value for key, value in config["optimizer"].items() if key != "_partial_"}
    no_decay = spec.pop("no_decay", None) or ()
    spec |= fused_by_default(build.find(spec["_target_"]), list(spec), device, able)
    return lambda model: _constructed(spec, "optimizer", parameter_groups(model, no_decay))


def _loaders(config: Config, parts: Parts, engine: Engine, progress: Progress) -> tuple[AnyLoader, AnyLoader | None]:
    data, batch, mesh = config["data"], config["batch"], engine.mesh
    # A size that is to be found begins with all that a process gets.
    searched = batch["micro_size"] == "auto"
    micro = batch["global_size"] // mesh.data_size if searched else batch["micro_size"]
    reading = Reading(
        parts.collate,
        data["num_workers"],
        engine.device,
        mesh.data_rank,
        mesh.data_size,
        data["reader"] == "main",
        data["group_by_length"],
    )
    train = reading.training(
        parts.train,
        batch["global_size"],
        micro,
        config["seed"],
        drop_last=data["drop_last"],
        trained=lambda: progress.step,
    )
    if parts.eval is None:
        return train, None
    return train, reading.evaluation(
        parts.eval, config["eval"]["micro_size"] or (min(32, micro) if searched else micro)
    )


def _order(config: Config, train: Any) -> AnyOrder:
    """The order of the training samples, as far as it is known without reading them."""
    drop_last = config["data"]["drop_last"]
    return training_order(train, config["batch"]["global_size"], config["seed"], drop_last=drop_last)


def _plan(config: Config, order: AnyOrder) -> Plan:
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
    return Schedule(_constructed(spec, "scheduler", optimizer, **also), metric, plan.steps)


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
    trackers, absent = {}, []
    for name, spec in config["trackers"].items():
        try:
            if spec is not None:
                trackers[name] = build.build(spec)
        except Exception as error:
            _log.warning("tracker %s is left out; the run goes on: %s: %s", name, type(error).__name__, error)
            absent.append(name)
    return Trackers(trackers, absent)


def _checkpointer(
    config: Config, folder: RunFolder, state: Mapping[str, Any], resume: Path | None
) -> Checkpointer | None:
    options = config["checkpoint"]
    if options is None:
        return None
    best = options["best"]
    named = None if best is None else (best["metric"], best["mode"])
    # What `resume` names stays; what auto found may go when there are newer ones.
    source = [] if resume is None or config["resume"] == "auto" else [resume, Path(config["resume"])]
    return Checkpointer(
        folder.path / "checkpoints",
        state,
        options["keep"],
        named,
        optional=OPTIONAL,
        protected=source,
        milestones=options["milestones"],
    )


def _save_every(config: Config, plan: Plan) -> SaveEvery:
    every = (config["checkpoint"] or {}).get("every") or {}
    if every.get("epochs"):
        return SaveEvery(steps=every["epochs"] * plan.steps_per_epoch)
    return SaveEvery(every.get("steps"), every.get("seconds"))
