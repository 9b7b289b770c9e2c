"""Several processes that share one model's weights, gradients and optimizer state: torch's FSDP2 (`fully_shard`)."""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from runner.engine.backend import BuildModel, BuildOptimizer, Handle
from runner.engine.buffers import follow_first
from runner.engine.building import Built, Rows, build_in_parts
from runner.engine.mesh import Mesh
from runner.engine.model_state import placed_as
from runner.engine.optimizer import plain_step, without_compiler
from runner.engine.precision import Precision
from runner.engine.sharded import ShardedHandle
from runner.engine.single import Single
from runner.engine.wrapping import bare, units_of
from runner.errors import Problem, wrong

#: glibc's name for the size from which blocks come from the system one by one.
_M_MMAP_THRESHOLD = -3
_LARGE = 2**20
#: Tables in blocks that are smaller stay whole on every process where their type is not that of matrix products.
_SMALL = 2**16


class FSDP(Single):
    """Each process holds its rows of every parameter; a unit's parameters are whole while that unit computes.

    Args:
        blocks: class names of the modules to shard as units; None for the model's repeated blocks and big layers.
        min_parameters: makes a unit of modules that hold this many parameters outside of smaller units.
        reshard_after_forward: frees a unit's whole parameters after its forward and gathers them again for backward;
            without, they stay until the last backward of a step.
        cpu_offload: rows, gradients and optimizer live in the host's memory; for GPUs.
    """

    name = "fsdp"
    grouped = True
    most_processes = None
    # torch's fused kernels of other optimizers do not take DTensors.
    fused = frozenset({"Adam", "AdamW"})

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        mesh: Mesh,
        *,
        blocks: Sequence[str] | None = None,
        min_parameters: int | None = None,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__(device, precision, mesh)
        self._blocks = blocks
        self._min_parameters = min_parameters
        self._reshard = reshard_after_forward
        self._offload = cpu_offload
        self._device_mesh: DeviceMesh | None = None
        self._roots: list[FSDPModule] = []
        #: Parameters that are whole on every process: what cannot be sharded.
        self._whole: list[nn.Parameter] = []
        self._last = True
        self._moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}
        self._decisions: list[str] = []

    def check(self) -> list[Problem]:
        problems = super().check()
        size, replicas = self.mesh.data_size, self.mesh.replicas
        if replicas < 1 or size % replicas:
            divisors = [str(n) for n in range(1, size + 1) if size % n == 0]
            why = f"{size} processes cannot be {replicas} groups of equal size"
            problems.append(Problem("backend.replicas", why, f"one of {', '.join(divisors)}", value=replicas))
        if self.device.type not in ("cpu", "cuda"):
            why = f"torch's FSDP does not run on {self.device.type}"
            problems.append(Problem("backend", why, "backend=single, or device=cpu", value=self.name))
        if self._offload and self.device.type == "cpu":
            why = "on a CPU the weights are in the host's memory already"
            problems.append(Problem("backend.cpu_offload", why, "backend.cpu_offload=false", value=True))
        return problems

    def prepare(self, build_model: BuildModel, build_optimizer: BuildOptimizer) -> None:
        built = build_in_parts(build_model, self._rows)
        self.model = self._placed(built)
        without_compiler()
        self.handle = self.drive(build_optimizer(self.model))

    def place(self, model: nn.Module) -> nn.Module:
        return self._placed(Built(model, whole="the model was there already"))

    def drive(self, optimizer: torch.optim.Optimizer) -> Handle:
        _refuse_fused(optimizer)
        group = self.device_mesh.get_group("shard") if self.mesh.shards > 1 else None
        return ShardedHandle(optimizer, self.scaler, self.device, group)

    def adopt(
        self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[list[nn.Module], list[Handle]]:
        placed = []
        for optimizer in optimizers:
            plain_step(optimizer)  # what is refused is refused before anything is placed
            _refuse_fused(optimizer)
        for model in models:
            before = {name: weakref.ref(p) for name, p in _named(model).items()}
            model = self.place(model)
            for name, new in _named(model).items():
                old = before[name]()
                if old is not None and old is not new:
                    self._moved[id(old)] = (before[name], new)
            placed.append(model)
        for optimizer in optimizers:
            self._point(optimizer)
        return placed, [self.drive(optimizer) for optimizer in optimizers]

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        if last != self._last:
            self._last = last
            for root in self._roots:
                root.set_requires_gradient_sync(last)
                if not self._reshard:
                    root.set_reshard_after_backward(last)
        return self._nothing

    def backward(self, loss: Tensor, factor: Tensor | None, **options: Any) -> Tensor:
        share = super().backward(loss, factor, **options)
        if self._last and self._whole and self.mesh.data_size > 1:
            _average([p for p in self._whole if p.requires_grad], self.mesh.data_size)
        return share

    def rewritten(self) -> None:
        for root in self._roots:
            for module in _modules(root):
                if isinstance(module, FSDPModule):
                    module.reshard()

    def discard(self) -> None:
        super().discard()
        for root in self._roots:
            root.reset_iter_state()
        self.forget()

    def forget(self, model: nn.Module | None = None) -> None:
        for root in self._roots if model is None else [model]:
            for module in _modules(root):
                if isinstance(module, FSDPModule):
                    for group in module._get_fsdp_state()._fsdp_param_groups:
                        for held in group.fsdp_params:
                            held.unsharded_accumulated_grad = None
                            if hasattr(held, "_unsharded_param"):
                                held._unsharded_param.grad = None

    def describe(self) -> list[str]:
        precision = self.precision
        types = f"all in {_word(precision.param_dtype)}"
        if precision.autocast:
            types = (
                f"shards {_word(precision.param_dtype)}, weights of matrix products travel as "
                f"{_word(precision.compute_dtype)}, sums of gradients {_word(precision.reduce_dtype)}"
            )
        after = "freed" if self._reshard else "kept"
        where = ", rows in the host's memory" if self._offload else ""
        return [
            f"FSDP over {self.mesh.shards} shards in {self.mesh.replicas} replicas; whole parameters are {after} "
            f"after forward{where}; {types}",
            *self._decisions,
        ]

    @property
    def device_mesh(self) -> DeviceMesh:
        if self._device_mesh is None:
            mesh, kind = self.mesh, self.device.type
            if mesh.replicas == 1:
                self._device_mesh = init_device_mesh(kind, (mesh.shards,), mesh_dim_names=("shard",))
            else:
                shape = (mesh.replicas, mesh.shards)
                self._device_mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        return self._device_mesh

    @property
    def _rows(self) -> Rows:
        return Rows(self.mesh.data_rank % self.mesh.shards, self.mesh.shards)

    def _policy(self, unit: nn.Module, root: bool = False) -> MixedPrecisionPolicy:
        """In which types a unit's weights and gradients travel.

        Arithmetic follows autocast, as on every backend. What autocast casts for matrix products is cast before it
        travels: half of the bytes, the same numbers, and nothing that autograd would have to keep a copy of. An
        embedding is read as it is, and so is what stands outside of units.
        """
        precision = self.precision
        if not precision.autocast:
            return MixedPrecisionPolicy(reduce_dtype=precision.reduce_dtype)
        as_is = root or isinstance(bare(unit), nn.Embedding)
        return MixedPrecisionPolicy(
            param_dtype=None if as_is else precision.compute_dtype,
            reduce_dtype=precision.reduce_dtype,
            output_dtype=torch.float32 if root else None,
            cast_forward_inputs=False,
        )

    def _placed(self, built: Built) -> nn.Module:
        """The model sharded in place, unit by unit, so that no more than one unit is whole on the device."""
        model = built.model
        if isinstance(model, FSDPModule) or any(model is m for root in self._roots for m in _modules(root)):
            return model
        if not any(True for _ in model.parameters()):
            return super().place(model)  # buffers only: nothing to shard
        if self.device.type == "cpu":
            _give_back_freed_memory()
        units = units_of(model, self._blocks, self._min_parameters)
        parts = {name: built.rows[p] for name, p in model.named_parameters() if p in built.rows}
        apart = _read_as_is(units) if self.precision.autocast else set()
        whole = self._prepared(model, parts, apart)
        common: dict[str, Any] = {
            "mesh": self.device_mesh,
            "offload_policy": CPUOffloadPolicy(pin_memory=True) if self._offload else OffloadPolicy(),
            "ignored_params": set(whole.values()) or None,
        }
        for _, unit in reversed(units):
            if not isinstance(unit, FSDPModule):
                fully_shard(unit, reshard_after_forward=self._reshard, mp_policy=self._policy(unit), **common)
        # The root's weights are needed first in backward: None keeps them until then.
        after = None if self._reshard else False
        root: Any = fully_shard(model, reshard_after_forward=after, mp_policy=self._policy(model, root=True), **common)
        self._whole += whole.values()
        self._tell(built, len(parts), units, list(whole))
        self._fill(model, parts)
        root.set_requires_gradient_sync(self._last)
        self._watch(root)
        self._roots.append(root)
        return model

    def _prepared(self, model: nn.Module, parts: dict[str, Tensor], apart: set[int]) -> dict[str, nn.Parameter]:
        """Types, places and memory formats as FSDP wants them; the parameters that it does not shard, by name."""
        dtype = self.precision.param_dtype
        whole: dict[str, nn.Parameter] = {}
        nested = {id(p) for m in model.modules() if isinstance(m, FSDPModule) for p in _parameters(m)}
        for name, p in model.named_parameters():
            if id(p) in nested:
                continue
            if isinstance(p, DTensor):
                why = f"shares the parameter {name} with a model that was sharded before"
                raise wrong("model", why, "prepare one module that contains both")
            if p.is_meta and name not in parts:
                why = f"its parameter {name} is on the meta device and has no values"
                raise wrong("model", why, "build it as for one process: each process keeps only its part meanwhile")
            p.data = (p.data.to(dtype) if p.is_floating_point() else p.data).contiguous()
            if name in parts:
                parts[name] = parts[name].to(p.dtype)
            elif p.dim() == 0 or not p.is_floating_point() or id(p) in apart:
                whole[name] = p
                p.data = p.data.to(self.device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device, dtype if buffer.is_floating_point() else buffer.dtype)
        return whole

    def _fill(self, model: nn.Module, parts: dict[str, Tensor]) -> None:
        """Puts this process's rows in the place of sharded parameters that are on the meta device."""
        made: dict[int, nn.Parameter] = {}
        place = torch.device("cpu") if self._offload else self.device
        for name, p in list(model.named_parameters()):
            if name in parts:
                made[id(p)] = nn.Parameter(_of_rows(parts.pop(name).to(place), p), requires_grad=p.requires_grad)
        if not made:
            return
        for module in model.modules():
            for key, held in module._parameters.items():
                if id(held) in made:  # tied ones stay one
                    module._parameters[key] = made[id(held)]
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # As FSDPModule does itself after `to` and the like, which would untie parameters.
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for sharded in group.fsdp_params:
                        sharded.reset_sharded_param()

    def _watch(self, root: Any) -> None:
        """Hooks of a whole model: buffers as DistributedDataParallel keeps them, weights as they were."""
        follow_first(root, lambda: self._last)

        def loading(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
            """Every process may load whole values: each keeps its part."""
            for name, own in root.state_dict(prefix=prefix, keep_vars=True).items():
                if name in state:
                    state[name] = placed_as(own, state[name])

        root.register_load_state_dict_pre_hook(loading)

        def after(*_: Any) -> None:
            if self._reshard and not torch.is_grad_enabled():
                root.reshard()  # no backward will

        root.register_forward_hook(after)

    def _point(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts new parameters in the place of those that they replace, with the state that there is."""
        for group in optimizer.param_groups:
            for number, old in enumerate(group["params"]):
                before, new = self._moved.get(id(old), (None, None))
                if before is None or new is None or id(before()) != id(old):
                    continue
                group["params"][number] = new
                if old in optimizer.state:
                    state = dict(optimizer.state.pop(old))
                    optimizer.state[new] = {key: self._state_of(value, new, key) for key, value in state.items()}

    def _state_of(self, value: Any, new: nn.Parameter, key: str) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or not isinstance(new, DTensor):
            return value
        if value.shape != new.shape:
            why = f"has state already, and its {key} of shape {list(value.shape)} cannot be split with its parameter"
            raise wrong("optimizer", why, "prepare model and optimizer before the first step")
        return _of_rows(self._rows.of(value).clone().to(new.device), new)

    def _tell(self, built: Built, parts: int, units: Sequence[tuple[str, nn.Module]], whole: Sequence[str]) -> None:
        kinds = Counter(_class(unit) for _, unit in units)
        inside = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none: the model is one unit"
        words = [f"{_class(built.model)}: units {inside}"]
        if built.whole is not None:
            words.append(f"held whole once ({built.whole})")
        elif parts:
            words.append(f"{parts} parameters were cut while the model was built")
        if whole:
            words.append(f"whole on every process: {', '.join(whole[:5])}{', ...' if len(whole) > 5 else ''}")
        self._decisions.append("; ".join(words))


def _refuse_fused(optimizer: torch.optim.Optimizer) -> None:
    """Raises InputError for a fused optimizer of torch's that would fail at its first step."""
    kind = type(optimizer)
    ours = kind.__module__.startswith("torch.optim") and kind.__name__ not in FSDP.fused
    if ours and optimizer.defaults.get("fused"):
        why = f"torch's fused {kind.__name__} cannot step weights of which each process holds its rows"
        raise wrong("optimizer.fused", why, "leave it out", value=True)


def _give_back_freed_memory() -> None:
    """Lets glibc return every large block as it is freed.

    Left alone it keeps blocks of up to 32 MiB for later once it has seen some freed, and the holes between them make a
    process larger than one that had never freed its weights at all.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _class(module: nn.Module) -> str:
    return type(bare(module)).__name__.removeprefix("FSDP")


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _modules(root: Any) -> Iterator[nn.Module]:
    return iter(root.modules())


def _parameters(root: Any) -> Iterator[nn.Parameter]:
    return iter(root.parameters())


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _of_rows(rows: Tensor, like: Any) -> DTensor:
    """A tensor placed like another, of which this process has the rows."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _read_as_is(units: Sequence[tuple[str, nn.Module]]) -> set[int]:
    """The small parameters in units that autocast does not cast: norms' weights and the like, which stay whole."""
    found = set()
    for _, unit in units:
        if isinstance(bare(unit), nn.Embedding):
            continue
        for module in unit.modules():
            if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)):
                found |= {id(p) for p in module.parameters(recurse=False) if p.dim() < 2 or p.numel() < _SMALL}
    return found


def _average(parameters: Sequence[nn.Parameter], size: int) -> None:
    """Averages gradients of whole parameters in one all-reduce; one that no process has stays absent."""
    if not parameters:
        return
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parts[0].device)
    flat = torch.cat([*(part.detach().flatten().float() for part in parts), there])
    dist.all_reduce(flat)
    *values, there = flat.split([*(part.numel() for part in parts), len(parts)])
    # Only where this process lacks a gradient must it know of the others'; reading waits for the device.
    counts = [1.0] * len(parts) if all(p.grad is not None for p in parameters) else there.tolist()
    for p, value, count in zip(parameters, values, counts, strict=True):
        if count:
            p.grad = (value / size).view_as(p).to(p.dtype)
