"""Every configuration key with its type, default and one-line description."""

# ruff: noqa: RUF009 (the calls below make dataclass fields)
from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def key(default: Any, help: str, **limits: Any) -> Any:
    """A configuration key. Limits: `least` and `most` (inclusive bounds), `above` (exclusive lower bound).

    `name` is the key where it is no name that Python takes."""
    metadata = {"help": help, **limits}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(type_: type, help: str) -> Any:
    """A section of the configuration with keys of its own."""
    return field(default_factory=type_, metadata={"help": help})


class Spec(dict[str, Any]):
    """What to build: `_target_` and its arguments, checked against the target's signature and not here."""


class Specs(dict[str, Any]):
    """Names and what to build for each; null removes a name."""


@dataclass
class Train:
    epochs: int | None = key(None, "passes over the training data; give this or train.steps", least=1)
    steps: int | None = key(None, "optimizer steps; give this or train.epochs", least=1)


@dataclass
class Batch:
    global_size: int | None = key(None, "samples per optimizer step over the whole job", least=1)
    micro_size: int | Literal["auto"] | None = key(
        None, "samples per forward pass per process; derived when not given; auto: the most that memory takes", least=1
    )


@dataclass
class Accumulation:
    steps: int | None = key(None, "micro-batches per optimizer step and process; derived when not given", least=1)


@dataclass
class Eval:
    every: Literal["epoch", "never"] | int = key(
        "epoch", "epoch, a number of steps, or never; also at the end", least=1
    )
    micro_size: int | None = key(None, "samples per forward pass of an evaluation; default: as in training", least=1)


@dataclass
class Log:
    every: int = key(10, "optimizer steps between training records", least=1)


@dataclass
class Data:
    train: Any = key(None, "the training data set: what to build")
    eval: Any = key(None, "the held-out data set: what to build; null for none")
    collate: Any = key(
        None, "makes a batch of a list of samples: what to build; default: torch's own, and dataclasses and None"
    )
    num_workers: int = key(0, "processes that load data ahead; 0 loads in the training process", least=0, most=1024)
    reader: Literal["all", "main"] = key("all", "main: only the first process reads, and sends the others their part")
    drop_last: bool = key(False, "leave out the last step of an epoch where it is short")
    group_by_length: bool = key(False, "batch samples of similar length, inside a window of the global order")


@dataclass
class LossScaling:
    init_scale: float = key(65536.0, "the first loss scale", above=0)
    growth_factor: float = key(2.0, "factor after growth_interval steps without an overflow", above=1)
    backoff_factor: float = key(0.5, "factor after an overflow", above=0)
    growth_interval: int = key(2000, "steps without an overflow before the scale grows", least=1)
    floor: float = key(1.0, "the scale never goes below this", above=0)


@dataclass
class Precision:
    name: str = key("fp32", "the word for it")
    param_dtype: Literal["float32", "bfloat16"] = key("float32", "type of the weights")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "type of the arithmetic under autocast")
    reduce_dtype: Literal["float32", "bfloat16"] = key("float32", "type in which gradients are summed")
    tf32: bool = key(False, "TF32 in float32 matrix products")
    float8: bool = key(False, "float8 matrix products in linear layers (torchao)")
    emulate: bool = key(False, "float8 by emulation, on devices without it: slow, for tests")
    loss_scaling: LossScaling | None = key(None, "dynamic loss scaling, or null for none")


@dataclass
class Backend:
    name: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = key("auto", "auto: single for one process, else ddp")


@dataclass
class DDP(Backend):
    bucket_mb: float = key(25.0, "MiB of gradients that travel together", above=0)
    gradient_as_bucket_view: bool = key(True, "gradients are views into the buckets: no copy of them")
    static_graph: bool = key(False, "every step uses the same parameters in the same order")
    find_unused_parameters: bool = key(False, "look after each forward pass for parameters without a gradient")
    comm_hook: Literal["bf16", "fp16", "powersgd"] | None = key(None, "how gradients travel; null: as they are")
    powersgd_rank: int = key(1, "rank of the approximation by comm_hook=powersgd", least=1)


@dataclass
class FSDP(Backend):
    blocks: list[str] | None = key(None, "classes of modules to shard as units; null: the model's repeated blocks")
    min_parameters: int | None = key(None, "shard modules of at least so many parameters as units", least=1)
    reshard_after_forward: bool = key(True, "free a unit's weights between forward and backward")
    cpu_offload: bool = key(False, "keep weights, gradients and optimizer state in the CPU's memory")
    replicas: int = key(1, "groups of processes that shard a model each (hybrid sharding)", least=1)


@dataclass
class DeepSpeed(Backend):
    stage: int = key(2, "what ZeRO shards: 0 nothing, 1 optimizer, 2 gradients too, 3 weights too", least=0, most=3)
    offload_optimizer: bool = key(False, "optimizer state and step on the CPU")
    offload_parameters: bool = key(False, "weights in the CPU's memory (stage 3)")
    config_file: str | None = key(None, "a DeepSpeed JSON of your own, merged with the recipe")


#: Sections whose keys depend on their `name`.
_VARIANTS: dict[type, dict[str, type]] = {Backend: {"ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}}


def variant(section: type, values: Any) -> type:
    """The section with the keys that its `name` brings."""
    name = values.get("name") if isinstance(values, Mapping) else None
    return _VARIANTS.get(section, {}).get(name, section) if isinstance(name, str) else section


def variants(section: type) -> Iterable[type]:
    """The sections that a section becomes by its `name`."""
    return _VARIANTS.get(section, {}).values()


def elsewhere(section: type, key: str) -> list[str]:
    """The names under which a section would have a key."""
    return [name for name, kind in _VARIANTS.get(section, {}).items() if key in keys_of(kind)]


@dataclass
class Launch:
    nproc_per_node: int | None = key(None, "processes on each node; null: the number of GPUs, or 1", least=1)
    nnodes: int = key(1, "computers that train together", least=1)
    node_rank: int | None = key(None, "this computer's number; 0 is the one that rdzv_endpoint names", least=0)
    rdzv_endpoint: str | None = key(None, "HOST:PORT where the computers meet")
    rdzv_id: str | None = key(None, "a name of the job, the same on all computers")
    timeout: float = key(1800.0, "seconds without progress that count as a hang", above=0)
    max_restarts: int = key(0, "how often the processes are started again after a failure", least=0, most=10**6)
    threads: int | None = key(None, "threads per process; default: cores / processes", least=1, most=1024)


@dataclass
class Best:
    metric: str = key("loss", "name in the evaluation record")
    mode: Literal["min", "max"] = key("min", "which way is better")


@dataclass
class Every:
    steps: int | None = key(None, "save every so many optimizer steps", least=1)
    epochs: int | None = key(None, "save every so many epochs", least=1)
    seconds: float | None = key(None, "save every so many seconds", above=0)


@dataclass
class Checkpoint:
    every: Every | None = key(None, "{steps: N}, {epochs: N} or {seconds: N}; null: only the last")
    keep: int = key(2, "how many of the newest are kept", least=2)
    best: Best | None = key(None, "{metric, mode}: the best evaluation's checkpoint is kept too")
    milestones: int | None = key(None, "checkpoints of steps that are a multiple of this are kept for ever", least=1)
    async_: bool = key(True, "write in the background while the training goes on", name="async")
    on_error: Literal["stop", "continue"] = key("stop", "what to do when a checkpoint cannot be written")


@dataclass
class Config:
    name: str = key("run", "the run's name")
    seed: int = key(0, "data order, initialisation and dropout follow from it", least=0, most=2**63 - 1)
    determinism: Literal["default", "kernels", "canonical"] = key(
        "default", "kernels: deterministic kernels; canonical: the same bits on any number of processes"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", "auto: the accelerator that is there, else cpu")
    train: Train = group(Train, "how long")
    batch: Batch = group(Batch, "batch arithmetic")
    accumulation: Accumulation = group(Accumulation, "gradient accumulation")
    eval: Eval = group(Eval, "when to evaluate")
    log: Log = group(Log, "when to write training records")
    model: Spec | None = key(None, "the model: a torch.nn.Module, or a function that returns one")
    task: Spec | None = key(None, "how a batch becomes a loss and metrics")
    optimizer: Spec | None = key(None, "the optimizer; no_decay names parameters without weight decay")
    scheduler: Spec | None = key(None, "the learning-rate schedule, stepped once an optimizer step; null: constant")
    data: Data = group(Data, "the data sets and how they are read")
    precision: Precision = group(Precision, "number formats")
    backend: Backend = group(Backend, "how processes train together")
    launch: Launch = group(Launch, "processes and threads")
    activation_checkpointing: Literal["none", "full", "selective"] = key(
        "none", "recompute in the backward pass: full: each block; selective: all but matrix products"
    )
    compile: bool | dict[str, Any] = key(False, "torch.compile: true, or its options and scope: model or block")
    debug: bool = key(False, "print the engine's decisions, and check that all processes call the same collectives")
    grad_clip: float | None = key(None, "maximum global gradient norm, or null", above=0)
    checkpoint: Checkpoint | None = key(Checkpoint, "when to save and what to keep; checkpoint=none saves nothing")
    resume: str = key("auto", "auto: go on where this run directory stopped; never; or a checkpoint's or run's path")
    resume_allow: list[str] = key(list, "keys that may differ from what the run was started with")
    init_from: str | dict[str, Any] | None = key(
        None, "weights to begin with: a safetensors file, a folder, a hub's name or a checkpoint; or {path, ...}"
    )
    trust: list[str] = key(list, "names that a recipe from elsewhere may build: package.module.Name, or package.*")
    nan: Literal["stop", "skip", "rollback", "ignore"] = key(
        "stop", "what to do about a loss or gradient that is not finite"
    )
    hooks: Specs = key(Specs, "name -> what to build; null removes a hook")
    trackers: Specs = key(Specs, "name -> what to build; null removes a tracker")
    run_dir: str | None = key(None, "where the run writes; default runs/DATE-TIME-NAME-xxxx")


@dataclass(frozen=True)
class Key:
    """One key of the schema: what it may be, its default, its help and its limits."""

    name: str
    kinds: tuple[Any, ...]
    make: Callable[[], Any]
    help: str
    limits: Mapping[str, float]

    @property
    def default(self) -> Any:
        """The default value, as plain data."""
        made = self.make()
        if is_dataclass(made):
            return complete({}, type(made))
        return dict(made) if isinstance(made, dict) else made

    @property
    def optional(self) -> bool:
        return type(None) in self.kinds or Any in self.kinds

    @property
    def section(self) -> type | None:
        """The dataclass of a key that is a section."""
        return next((kind for kind in self.kinds if isinstance(kind, type) and is_dataclass(kind)), None)

    @property
    def words(self) -> tuple[Any, ...]:
        """The words of a Literal."""
        return tuple(word for kind in self.kinds if get_origin(kind) is Literal for word in get_args(kind))

    @property
    def builds(self) -> bool:
        """Whether the key says what to build."""
        return Spec in self.kinds


@functools.cache
def keys_of(section: type) -> Mapping[str, Key]:
    """The keys of a section, in order."""
    hints = get_type_hints(section)
    found = {}
    for item in fields(section):
        hint = hints[item.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        make = functools.partial(_same, item.default) if item.default is not MISSING else item.default_factory
        limits = {name: limit for name, limit in item.metadata.items() if name not in ("help", "name")}
        name = item.metadata.get("name", item.name)
        found[name] = Key(name, kinds, make, item.metadata["help"], limits)  # type: ignore[arg-type]
    return found


def _same(value: Any) -> Any:
    return value


def complete(values: dict[str, Any], section: type = Config) -> dict[str, Any]:
    """The values of a section with the defaults of keys that are missing, in the schema's order; others at the end."""
    full: dict[str, Any] = {}
    for key in keys_of(variant(section, values)).values():
        value = values.get(key.name, key.default)
        if key.section is not None and isinstance(value, dict):
            value = complete(value, key.section)
        elif key.kinds == (Specs,) and value is None:
            value = {}
        full[key.name] = value
    return {**full, **{name: value for name, value in values.items() if name not in full}}
