"""DeepSpeed's ZeRO: optimizer, gradients and weights divided among the processes (Rajbhandari et al., 2020)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from copy import deepcopy
from functools import partial
from io import StringIO
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from runner import distributed
from runner.engine import deepspeed_config
from runner.engine.backend import Backend, BuildModel, BuildOptimizer, Handle, Update
from runner.engine.buffers import follow_first
from runner.engine.deepspeed_layout import Layout, layout_of
from runner.engine.deepspeed_state import states
from runner.engine.gradients import Finite, clip, global_norm, wide
from runner.engine.mesh import Mesh
from runner.engine.model_state import trained_weights
from runner.engine.optimizer import without_compiler
from runner.engine.precision import LossScaling, Precision
from runner.engine.scaler import Scaler
from runner.errors import InputError, Problem, wrong

OLDEST = (0, 19)

#: Elements of gradients that travel together; the library's own 500 million would be a buffer of 2 GB.
_BUCKET = 50_000_000

#: Optimizers of torch's that look at a parameter as a matrix, or at all at once: divided, they would compute another
#: thing without a word. Adagrad is replaced by the library with one that forgets its groups.
_NOT_DIVIDED = ("Adafactor", "Adagrad", "LBFGS", "Muon", "SparseAdam")


class DeepSpeed(Backend):
    """The library places the model and steps the optimizer that the recipe names; the loop does the rest.

    Losses are weighed and gradients clipped by the loop, so the library scales and clips nothing. In fp32 all stages
    compute what one process does, up to the order of sums. In bf16 the weights of the forward pass are bfloat16, with
    float32 copies that are stepped (elsewhere `bf16` keeps float32 weights and casts at each operation), so its loss
    differs from that of the other backends in the third digit.

    Gradients travel with the last micro-batch of a step, which keeps them whole until then. Stages 2 and 3 in
    bf16 or with offloading let them travel with each micro-batch, and keep only a part.

    Args:
        stage: what is divided: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 weights as well.
        offload_optimizer: keep and step the optimizer in the CPU's memory.
        offload_parameters: keep weights in the CPU's memory between their uses (stage 3).
        config_file: the user's own DeepSpeed JSON. What contradicts the recipe is refused.
        recipe: global_size, micro_size, accumulation, grad_clip, nan, optimizer of the recipe, as far as known.
    """

    name = "deepspeed"
    grouped = True
    #: The process group that the library knows.
    _world: ClassVar[Callable[[], Any] | None] = None

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        mesh: Mesh,
        *,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        config_file: str | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(device, precision, mesh)
        self._stage = stage
        self._offload = {"offload_optimizer": offload_optimizer, "offload_parameters": offload_parameters}
        self._file = config_file
        self._recipe = recipe or {}
        self._engine: Any = None
        self._handle: ZeroHandle | None = None
        self._nothing = nullcontext()
        #: What is to be done when this object ends.
        self._ends: list[weakref.finalize[Any, Any]] = []
        #: Environment variables that were set here.
        self._said: set[str] = set()
        #: The library's own context in which gradients stay where they are, from the first micro-batch of a step on.
        self._held: AbstractContextManager[Any] | None = None
        #: Whether gradients may wait for the last micro-batch in it.
        self._waits = False

    # --- before a model exists ---------------------------------------------------------------------------------------

    def check(self) -> list[Problem]:
        problems = [*self._precision_problems(), *self._scaling_problems(), *self._option_problems()]
        if self._stage and self._recipe.get("nan") == "ignore":
            why = f"DeepSpeed's stage {self._stage} leaves out every step that is not finite"
            problems.append(Problem("nan", why, "nan=skip, or backend.stage=0", value="ignore"))
        version = _version()
        if version is None:
            problems.append(Problem("backend", "DeepSpeed is not installed", _install(), value=self.name))
        elif version < OLDEST:
            needed = ".".join(map(str, OLDEST))
            why = f"DeepSpeed {'.'.join(map(str, version))} is installed, and {needed} or newer is needed"
            problems.append(Problem("backend", why, _install(), value=self.name))
        if not problems:
            try:
                self._config()
            except InputError as error:
                problems += error.problems
        return problems

    def _precision_problems(self) -> list[Problem]:
        name, why, fix = self.precision.name, "", "precision=bf16 or precision=fp32"
        if self.precision.loss_scaling is not None and self.device.type == "cpu":
            why = "DeepSpeed has no fp16 on a CPU"
        elif name not in ("fp32", "tf32", "bf16", "fp16"):
            why = "DeepSpeed keeps float32 copies of the weights" if name == "bf16_full" else "DeepSpeed cannot do it"
        elif self._stage == 0 and name in ("bf16", "fp16"):
            why = f"DeepSpeed's stage 0 sums gradients in {name}, without float32 copies"
            fix = "backend.stage=1, or backend=ddp"
        if why:
            return [Problem("precision", why, f"{fix}, or another backend", value=name)]
        return super().check()

    def _scaling_problems(self) -> list[Problem]:
        """Options of the loss scaling that the library has fixed."""
        scaling, problems = self.precision.loss_scaling, []
        for name, fixed in (("growth_factor", 2.0), ("backoff_factor", 0.5)):
            if scaling is not None and (value := getattr(scaling, name)) != fixed:
                why = f"DeepSpeed's own loss scaling has a factor of {fixed} here"
                problems.append(
                    Problem(f"precision.loss_scaling.{name}", why, f"{fixed}, or backend=fsdp", value=value)
                )
        if scaling is not None and not math.log2(scaling.init_scale).is_integer():
            why = "DeepSpeed's loss scaling begins with a power of 2"
            fix = f"{2.0 ** round(math.log2(scaling.init_scale))}, or backend=fsdp"
            problems.append(Problem("precision.loss_scaling.init_scale", why, fix, value=scaling.init_scale))
        return problems

    def _option_problems(self) -> list[Problem]:
        problems = []
        if self._stage not in range(4):
            problems.append(Problem("backend.stage", "there is no such ZeRO stage", "0, 1, 2 or 3", value=self._stage))
        if self.device.type not in ("cpu", "cuda"):
            why = f"DeepSpeed is used on CPUs and CUDA devices here, not on {self.device.type}"
            problems.append(Problem("device", why, "device=cpu", value=self.device.type))
        for name, chosen in self._offload.items():
            if chosen and self.device.type == "cpu":
                why = "everything is in the CPU's memory already"
                problems.append(Problem(f"backend.{name}", why, f"backend.{name}=false", value=True))
        if self._offload["offload_parameters"] and self._stage != 3:
            why = f"weights can leave the device at stage 3 only, and backend.stage is {self._stage}"
            problems.append(Problem("backend.offload_parameters", why, "backend.stage=3", value=True))
        if self._offload["offload_optimizer"] and self._stage == 0:
            why = "the optimizer can leave the device from stage 1 on, and backend.stage is 0"
            problems.append(Problem("backend.offload_optimizer", why, "backend.stage=2", value=True))
        if self.mesh.replicas != 1:
            why = "DeepSpeed divides over all processes"
            problems.append(Problem("backend.replicas", why, "1, or backend=fsdp", value=self.mesh.replicas))
        return problems

    def _config(self) -> dict[str, Any]:
        recipe = deepspeed_config.wanted(
            self.precision, self.mesh.data_size, self._recipe, stage=self._stage, **self._offload
        )
        if self._file is None:
            return deepspeed_config.merged(recipe, {})
        file = deepspeed_config.read(self._file)
        return deepspeed_config.merged(recipe, file, self._file, self._recipe.get("optimizer"))

    # --- placing -----------------------------------------------------------------------------------------------------

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        model = build_model().to(self.device)
        without_compiler()
        self.model, self.handle = self._start(model, build_optimizer(model))

    def adopt(
        self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[list[nn.Module], list[Handle]]:
        """One model with its optimizer, in one call; other models only where they train nothing."""
        if not optimizers:
            return [model.to(self.device) for model in models], []
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = [model for model in models if any(id(p) in held for p in model.parameters())]
        if len(optimizers) > 1 or len(trained) != 1 or self._engine is not None:
            there = f"{len(optimizers)} optimizers and {len(trained)} of their models in this call"
            before = ", and one was prepared before" if self._engine is not None else ""
            why = f"DeepSpeed needs one model and its optimizer in one call: {there}{before}"
            fix = "prepare(model, optimizer) once, or backend=ddp or fsdp for several"
            raise wrong("backend", why, fix, value=self.name)
        self.model, self.handle = self._start(trained[0].to(self.device), optimizers[0])
        return [self.model if model is trained[0] else model.to(self.device) for model in models], [self.handle]

    def _start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, ZeroHandle]:
        self._suits(model, optimizer)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        config = self._config()
        zero = config["zero_optimization"]
        zero.setdefault("reduce_bucket_size", min(_BUCKET, max(1, sum(p.numel() for p in model.parameters()))))
        library = self._library()
        library.init_distributed(dist_init_required=False)
        try:
            library.DeepSpeedConfig(deepcopy(config))
        except (ValueError, AssertionError) as error:
            why = f"DeepSpeed refuses it: {error}"
            raise wrong(deepspeed_config.FILE_KEY, why, "correct the file", value=self._file) from error
        own = {id(p): set(vars(p)) for p in model.parameters()}
        with redirect_stdout(StringIO()):  # it prints how much memory is used
            engine = library.initialize(model=model, optimizer=optimizer, config=config)[0]
        # Else tables of the library hold it for ever. Its hooks must not hold this object, which ends first.
        end = weakref.finalize(self, _end, engine, own)
        end.atexit = False
        self._ends.append(end)
        follow_first(engine.module, lambda: True)
        engine.module.register_forward_pre_hook(partial(_remind, self.device, self._said), prepend=True)
        if self.precision.autocast:
            cast = partial(_cast, self.precision.compute_dtype)
            engine.module.register_forward_pre_hook(cast, with_kwargs=True)
        self._engine = engine
        layout = layout_of(engine, [p for group in groups for p in group])
        self._waits = hasattr(engine.optimizer, "_coalesce_grad_reduction") and not (
            self.precision.autocast or any(self._offload.values())
        )
        handle = self._handle = ZeroHandle(self, engine, optimizer, groups, layout)
        self._state = {
            **states(engine.module, optimizer, groups, layout),
            "scaler": self._scale_of(engine.optimizer),
        }
        return engine, handle

    def _scale_of(self, wrapper: Any) -> Any:
        options = self.precision.loss_scaling
        if options is None:
            return Scaler(None, self.device)
        return LibraryScale(wrapper.loss_scaler, options, self.mesh.data_size)

    def _suits(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                why = f"its parameter {name} has shape (), which DeepSpeed cannot send"
                raise wrong("model", why, "give it the shape (1,), or backend=fsdp")
        if self._stage == 3 and any("_orig_mod" in module._modules for module in model.modules()):
            why = "DeepSpeed's stage 3 cannot divide what torch.compile has wrapped"
            raise wrong("model", why, "compile it in place, by model.compile(), or backend.stage=2")
        kind = type(optimizer)
        if self._stage and kind.__module__.startswith("torch.optim") and kind.__name__ in _NOT_DIVIDED:
            why = "its parameters are cut into flat pieces here, and it needs them whole"
            raise wrong("optimizer", why, "backend.stage=0, or AdamW, Adam, SGD and the like", value=kind.__name__)

    def _library(self) -> Any:
        _tell(self.device, self._said)
        self._ends.append(weakref.finalize(self, _unsay, self._said))
        try:
            import deepspeed
        except ImportError as error:
            if error.name != "deepspeed":
                raise
            raise wrong("backend", "DeepSpeed is not installed", _install(), value=self.name) from None
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if self.device.type == "cpu":
            # Else it asks compilers what they can do, and builds a collective through shared memory.
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        self._forget_groups(deepspeed)
        there = deepspeed.get_accelerator().device_name()
        if there != self.device.type:
            why = f"DeepSpeed has been set up for {there} in this process"
            raise wrong("device", why, "start another process for another device", value=self.device.type)
        return deepspeed

    @classmethod
    def _forget_groups(cls, library: Any) -> None:
        """Process groups of an earlier run in this interpreter, which the library keeps after they have ended."""
        world = torch.distributed.group.WORLD
        if cls._world is None or cls._world() is not world:
            cls._world = weakref.ref(world)
            library.utils.groups._WORLD_GROUP = None
            library.comm.comm.cdb = None

    # --- training ----------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the library has cast the weights, and a hook casts what goes into the model."""
        return self._nothing

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        if self._engine is None:
            yield
            return
        self._engine.set_gradient_accumulation_boundary(last)
        if self._waits and not last and self._held is None:
            self._held = self._engine.coalesce_grad_reduction()
            self._held.__enter__()
        try:
            yield
        except BaseException:
            self.release(travel=False)
            raise
        if last:
            self.release()

    def release(self, *, travel: bool = True) -> None:
        """Ends the waiting of gradients; they travel now, or (after an error) never."""
        held, self._held = self._held, None
        if held is None:
            return
        if not travel:
            self._engine._flush_coalesced_reduction_zero12 = lambda optimizer: None
            self._engine._flush_coalesced_reduction_zero3 = lambda optimizer: None
        try:
            held.__exit__(None, None, None)
        finally:
            if not travel:
                del self._engine._flush_coalesced_reduction_zero12, self._engine._flush_coalesced_reduction_zero3

    def backward(self, loss: Tensor, factor: Tensor | None, **options: Any) -> Tensor:
        retain = options.pop("retain_graph", None)
        if options:
            raise wrong("backward", f"DeepSpeed takes no {', '.join(options)}", "leave it out, or backend=ddp or fsdp")
        share = loss if factor is None else loss * factor
        self._engine.backward(share, retain_graph=bool(retain), scale_wrt_gas=False)
        return share.detach()

    def settle(self, skipped: bool) -> bool:
        return self._handle is not None and self._handle.overflowed

    def state(self) -> Mapping[str, Any]:
        return self._state

    def kept(self) -> Mapping[str, Any] | None:
        return None if self._engine is None else self._state

    def close(self) -> None:
        for end in self._ends:
            end()

    def weights(self) -> dict[str, Tensor]:
        if self._stage == 3 or self.precision.autocast:
            why = "keeps the weights that are trained where nothing else can write to them"
            what = f"stage={self._stage}, {self.precision.name}"
            raise wrong("backend", f"deepspeed ({what}) {why}", "leave out the EMA, or use backend=fsdp")
        return trained_weights(self._engine.module)

    def describe(self) -> list[str]:
        version = ".".join(map(str, _version() or ()))
        divided = ["nothing", "the optimizer's state", "optimizer state and gradients", "everything"][self._stage]
        lines = [f"DeepSpeed {version}, ZeRO stage {self._stage}: {divided} divided over {self.mesh.data_size}"]
        if self._engine is not None:
            wrapper, stepped = type(self._engine.optimizer).__name__, type(self.handle.optimizer).__name__
            when = "the last micro-batch" if self._waits or not self._each_time() else "each micro-batch"
            lines += [f"{stepped} is stepped by {wrapper}", f"gradients travel with {when} of a step"]
        lines += [f"{name.replace('_', ' ')} to the CPU" for name, chosen in self._offload.items() if chosen]
        return lines

    def _each_time(self) -> bool:
        return self._stage >= 2


class ZeroHandle(Handle):
    """The optimizer that DeepSpeed steps, and the averaged gradients wherever its stage keeps them."""

    def __init__(
        self,
        backend: DeepSpeed,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        groups: list[list[nn.Parameter]],
        layout: Layout,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in groups for p in group]
        self.overflowed = False
        self._backend = backend
        self._engine = engine
        self._layout = layout
        self._scaled = backend.precision.loss_scaling is not None

    def unscale(self) -> None:
        """The library unscales in its step; what is read here is divided by the scale. Ends an open window."""
        self._backend.release()

    def not_finite(self) -> Tensor:
        gradients = self._layout.gradients()
        return Finite(gradients).found(gradients)

    def norm(self) -> Tensor:
        norm = global_norm(self._layout.gradients()) / self._layout.scale
        if not self._layout.divided:
            return norm
        device = self._backend.device
        square = norm.to(device, wide(device)) ** 2
        return distributed.total(square).sqrt().float()

    def clip(self, max_norm: float, norm: Tensor | None = None) -> Tensor:
        norm = self.norm() if norm is None else norm
        with torch.no_grad():
            clip(self._layout.gradients(), norm, max_norm)
        return norm

    def clip_values(self, most: float) -> None:
        most *= self._layout.scale
        with torch.no_grad():
            for gradient in self._layout.gradients():
                gradient.clamp_(-most, most)

    def step(self, max_norm: float | None = None, *, skip: bool | Tensor = False, measure: bool = False) -> Update:
        skip = bool(skip)
        self.overflowed = False
        norm = self.norm() if measure or max_norm is not None or skip else None
        if skip and not self._scaled:
            self.zero()
            return Update(norm, True)
        if skip:
            # So that the library sees an overflow, and makes its scale smaller.
            for gradient in self._layout.gradients():
                gradient.fill_(float("inf"))
        elif max_norm is not None:
            self.clip(max_norm, norm)
        scale = self._layout.scale
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        skipped = not self._engine.was_step_applied()
        self.overflowed = self._scaled and skipped and self._layout.scale < scale
        self._layout.clear()
        return Update(norm, skipped, self.overflowed)

    def zero(self) -> None:
        self._backend.release(travel=False)
        self._layout.forget()


class LibraryScale:
    """The library's own loss scaler, which divides its scale among the readers and has the keys of `Scaler`.

    Scales given and saved are those of one reader, for the reason that `Scaler` tells. At the floor the scale stays
    there, where the library alone would end the run: what becomes of the step is for the recipe's `nan` to say.
    """

    def __init__(self, scaler: Any, options: LossScaling, readers: int) -> None:
        self._scaler = scaler
        self._readers = readers
        scaler.cur_scale, scaler.min_scale = options.init_scale / readers, options.floor / readers
        scaler.raise_error_at_min_scale = False

    def state_dict(self) -> dict[str, Any]:
        scaler = self._scaler
        tracker = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": float(scaler.cur_scale) * self._readers, "growth_tracker": tracker}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the scale of a checkpoint; one saved without loss scaling leaves the configured scale."""
        if state["scale"]:
            scaler = self._scaler
            scaler.cur_scale = state["scale"] / self._readers
            scaler.last_overflow_iter = scaler.cur_iter - int(state["growth_tracker"]) - 1


def _version() -> tuple[int, ...] | None:
    """The installed version's first numbers, without importing it."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    with suppress(importlib.metadata.PackageNotFoundError):
        return tuple(int(word) for word in re.findall(r"\d+", importlib.metadata.version("deepspeed"))[:3])
    return OLDEST


def _install() -> str:
    return "pip install 'runner[deepspeed]'"


def _end(engine: Any, own: Mapping[int, set[str]]) -> None:
    """Frees what the library's tables and closures would hold; `own` are the attributes that parameters had before.

    The bare model stays as it is, without hooks; at stage 3, where this process has only a part of it, it is emptied.
    """
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    engine.destroy()
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.data = torch.empty(0)
    # A list of the library's own in which stage 3 leaves the modules of its last forward.
    underway = getattr(sys.modules.get("deepspeed.runtime.zero.parameter_offload"), "FWD_MODULE_STACK", [])
    gone = {id(module) for module in engine.module.modules()}
    underway[:] = [module for module in underway if id(module) not in gone]
    for parameter in engine.module.parameters():
        # Bound to the parameter itself, in a circle that the garbage collector does not see through.
        for name in vars(parameter).keys() - own.get(id(parameter), set()):
            delattr(parameter, name)
    for thing in (getattr(engine.optimizer, "parameter_offload", None), engine.optimizer, engine):
        if thing is not None and not isinstance(thing, torch.optim.Optimizer):
            vars(thing).clear()


#: How many backends rely on an environment variable that was set here.
_relying: Counter[str] = Counter()


def _tell(device: torch.device, said: set[str]) -> None:
    """What the library takes from the environment only, where no launcher has said it."""
    for name, value in (("DS_ACCELERATOR", device.type), ("LOCAL_RANK", str(device.index or 0))):
        if name not in os.environ:
            os.environ[name] = value
        elif not _relying[name]:
            continue
        if name not in said:
            said.add(name)
            _relying[name] += 1


def _unsay(said: set[str]) -> None:
    """A rank without the other words of a launcher would be taken for a mistake by the next run in here.

    A backend may be collected only after the next has begun, which then still relies on them.
    """
    for name in said:
        _relying[name] -= 1
        if not _relying[name]:
            os.environ.pop(name, None)
    said.clear()


def _remind(device: torch.device, said: set[str], *_: Any) -> None:
    """Stage 3 looks at the environment again, and another backend that has ended may have cleared it."""
    _tell(device, said)


def _cast(dtype: torch.dtype, module: nn.Module, inputs: Any, named: Any) -> Any:
    """Floating-point inputs as the type of the weights."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (inputs, named))
