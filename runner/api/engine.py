"""`from runner import Engine`: for people who keep their own loop, on any backend, in words they know."""

from __future__ import annotations

import atexit
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from runner import collectives, distributed
from runner.api import control, group, options, saving, state
from runner.api.gradients import Gradients
from runner.api.loaders import Loader, Sharing, plain_without
from runner.api.model import PreparedModel, bare
from runner.api.optimizer import PreparedOptimizer
from runner.api.scheduler import PreparedScheduler
from runner.api.tracking import Tracking, build_trackers
from runner.api.window import Flow
from runner.debugging import CollectiveWatch, explain, standing
from runner.engine.backend import Backend, Handle
from runner.engine.model_state import ModelState
from runner.errors import wrong
from runner.train.schedules import Schedule

#: Seconds that a process waits at its exit for the others.
_MOMENT = 5.0


class DistributedType(StrEnum):
    """How an engine's processes work together; prints as its value."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"


class Engine:
    """Trains in a loop of your own, on one process or many: the same script, started by `python` or by `torchrun`.

    What is asked for is what runs, or InputError says why it cannot.

    Args:
        backend: "auto" ("single" for one process, else "ddp"), "single", "ddp", "fsdp", "deepspeed", or a mapping of
            a name and the backend's options: {"name": "fsdp", "blocks": ["Block"]}.
        precision: "fp32" (the default), "tf32", "bf16", "fp16" (with loss scaling), "bf16_full", "fp8".
        accumulation_steps: micro-batches per optimizer step inside of `accumulate`; 1 by default.
        device: "auto", "cpu", "cuda", "mps".
        gradient_accumulation_steps, mixed_precision ("no", "fp16", "bf16", "fp8"), cpu: the same in Accelerate's words.
        seed: makes the order of shuffled loaders a function of (seed, epoch). Seeds nothing else.
        grad_scaler: options of fp16's loss scaling: init_scale, growth_factor, backoff_factor, growth_interval, floor.
        split_batches: a loader's batch is the global one and is cut into a part for each process.
        dispatch_batches: process 0 reads and sends; None: for iterable data sets only.
        even_batches: all processes see the same number of full batches, for which samples are repeated at the end.
        step_scheduler_with_optimizer: False moves schedulers at every call of their step.
        step_scheduler_per_process: a scheduler moves as often as there are processes with each step.
        project_dir: where trackers write and states are saved by default.
        trackers, log_with: "jsonl", "tensorboard", "all", a tracker, or a list of these.
        device_placement: whether batches are put on the device.
        timeout: seconds that a collective may wait for another process.
        debug: tells what was decided, and checks before each collective that all processes call the same.

    Example:
        engine = Engine(accumulation_steps=4, precision="bf16")
        model, optimizer, loader, scheduler = engine.prepare(model, optimizer, loader, scheduler)
        for inputs, targets in loader:
            with engine.accumulate(model):
                loss = loss_function(model(inputs), targets)
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    """

    def __init__(
        self,
        backend: str | Mapping[str, Any] = "auto",
        precision: str | None = None,
        accumulation_steps: int | None = None,
        device: str | torch.device = "auto",
        *,
        gradient_accumulation_steps: int | None = None,
        mixed_precision: str | None = None,
        cpu: bool = False,
        seed: int | None = None,
        grad_scaler: Mapping[str, Any] | None = None,
        split_batches: bool = False,
        dispatch_batches: bool | None = None,
        even_batches: bool = True,
        step_scheduler_with_optimizer: bool = True,
        step_scheduler_per_process: bool = False,
        project_dir: str | Path | None = None,
        trackers: Any = None,
        log_with: Any = None,
        device_placement: bool = True,
        timeout: float = 1800.0,
        debug: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            options.refuse_unknown(unknown, _known())
        steps = options.one_of_two(
            "accumulation_steps", accumulation_steps, "gradient_accumulation_steps", gradient_accumulation_steps, 1
        )
        name, backend_options = options.backend_of(backend)
        self._options = options.Options(
            backend=name,
            backend_options=backend_options,
            precision=options.precision_of(precision, mixed_precision, grad_scaler),
            accumulation_steps=options.positive("accumulation_steps", steps),
            seed=seed,
            device_placement=device_placement,
            split_batches=split_batches,
            dispatch_batches=dispatch_batches,
            even_batches=even_batches,
            step_scheduler_with_optimizer=step_scheduler_with_optimizer,
            step_scheduler_per_process=step_scheduler_per_process,
            timeout=timeout,
            project_dir=None if project_dir is None else str(project_dir),
            trackers=options.one_of_two("trackers", trackers, "log_with", log_with, None),
            debug=debug,
        )
        build_trackers(self._options.trackers)
        self._ranks = group.ranks_here()
        self._device = options.device_of(device, cpu, self._ranks)
        self._begin(self._make_backend())

    def _make_backend(self) -> Backend:
        """The backend, once the group it needs is there."""
        found = options.build_backend(self._options, self._device, self._ranks)
        self._owns_group = False
        if (found.grouped or self._ranks.world_size > 1) and not distributed.joined():
            self._store = group.join(self._ranks, self._device.type, self._options.timeout)
            self._owns_group = True
            _leave_at_exit(self)
        self._watch = None
        if self._options.debug:
            self._watch = CollectiveWatch(min(60.0, self._options.timeout)).install()
            explain([standing(self._device), f"precision {self.precision}"], _say)
        return found

    def _begin(self, backend: Backend) -> None:
        """An engine that knows no object yet."""
        self._backend = backend
        self._flow = Flow()
        self._gradients = Gradients(backend, self._flow)
        self._models: list[tuple[nn.Module, PreparedModel]] = []
        self._optimizers: list[PreparedOptimizer] = []
        self._schedulers: list[PreparedScheduler] = []
        self._loaders: list[Loader] = []
        self._held = state.Held()
        self._owned: set[int] = set()
        self._now = _Now(self._options.even_batches, self._optimizers)
        self._trigger = False
        self._tracking: Tracking | None = None
        self.gradient_accumulation_steps = self._options.accumulation_steps

    # --- preparing ---------------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Places models, and makes optimizers, loaders and schedulers follow; returns them in the order given.

        Anything else, None too, comes back as it is, and what is prepared already is not wrapped again. One call or
        several, in any order: an optimizer that comes before its model waits for it. One object comes back alone.

        Example:
            model, optimizer, loader = engine.prepare(model, optimizer, loader)
        """
        self._adopt([one for one in objects if _is_model(one)], [one for one in objects if _is_optimizer(one)])
        found = [self._prepared(one) for one in objects]
        return found[0] if len(found) == 1 else tuple(found)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """`prepare` for one model.

        Example:
            model = engine.prepare_model(model)
        """
        return self.prepare(model)

    def prepare_optimizer(self, optimizer: Optimizer) -> PreparedOptimizer:
        """`prepare` for one optimizer.

        Example:
            optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters()))
        """
        return self.prepare(optimizer)

    def prepare_data_loader(self, loader: DataLoader[Any]) -> Loader:
        """`prepare` for one loader.

        Example:
            loader = engine.prepare_data_loader(DataLoader(dataset, batch_size=8, shuffle=True))
        """
        return self.prepare(loader)

    def prepare_scheduler(self, scheduler: Any) -> PreparedScheduler:
        """`prepare` for one scheduler.

        Example:
            scheduler = engine.prepare_scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 10))
        """
        return self.prepare(scheduler)

    def _adopt(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Gives models and optimizers that are new, and optimizers that waited for such a model, to the backend."""
        known = {id(own) for own, _ in self._models}
        fresh = list({id(model): model for model in models if id(model) not in known}.values())
        owned = self._owned | {id(p) for model in fresh for p in model.parameters()}
        asked = {id(one.optimizer) for one in self._optimizers}
        others = {id(one): one for one in optimizers if id(one) not in asked}.values()
        added = [PreparedOptimizer(optimizer, self._gradients) for optimizer in others]
        waiting = [one for one in (*self._optimizers, *added) if one.handle is None]
        ready = [one for one in waiting if all(id(p) in owned for p in one.parameters())]
        before = [list(model.parameters()) for model in fresh]
        placed: list[nn.Module] = []
        handles: list[Handle] = []
        if fresh or ready:
            for model in fresh:
                _same_everywhere(model)
            placed, handles = self._backend.adopt(fresh, [one.optimizer for one in ready])
            if self._options.debug:
                explain(self._backend.describe(), _say)
        # Only now, so that what the backend refuses leaves nothing behind.
        self._owned = owned
        self._optimizers += added
        self._gradients.optimizers += added
        for own, tensors, module in zip(fresh, before, placed, strict=True):
            for old, new in zip(tensors, own.parameters(), strict=True):
                self._owned.add(id(new))
                if old is not new:
                    self._gradients.replaced[old] = new
            prepared = PreparedModel(module, own, self._backend, self._gradients)
            self._models.append((own, prepared))
            self._now.models.append(weakref.ref(prepared))
            self._held.models.append(ModelState(module))
        for one, handle in zip(ready, handles, strict=True):
            one.handle = handle
        for one in self._optimizers[len(self._held.optimizers) :]:
            if one.handle is None:
                break
            owners = [bare(own) for own, _ in self._models]
            self._held.optimizers.append(state.optimizer_state(owners, one.optimizer))

    def _prepared(self, one: Any) -> Any:
        if isinstance(one, (PreparedModel, PreparedOptimizer, PreparedScheduler, Loader)):
            return one
        if isinstance(one, nn.Module):
            if isinstance(getattr(one, "_orig_mod", None), PreparedModel):
                return one  # compiled after it was prepared
            return next(prepared for own, prepared in self._models if own is one)
        if isinstance(one, Optimizer):
            return next(prepared for prepared in self._optimizers if prepared.optimizer is one)
        if isinstance(one, DataLoader):
            return self._prepared_loader(one)
        if _is_scheduler(one):
            return self._prepared_scheduler(one)
        return one

    def _prepared_loader(self, loader: DataLoader[Any]) -> Loader:
        for known in self._loaders:
            if known._source is loader:
                return known
        sharing = Sharing(
            self.process_index,
            self.num_processes,
            self._device if self._options.device_placement else None,
            self._options.split_batches,
            self._options.dispatch_batches,
            self._options.seed,
        )
        made = Loader(loader, sharing, self._flow, self._now.even, self._now.training)
        self._loaders.append(made)
        self._held.loaders.append(made)
        return made

    def _prepared_scheduler(self, scheduler: Any) -> PreparedScheduler:
        for known in self._schedulers:
            if known.scheduler is scheduler:
                return known
        inside = [scheduler, *getattr(scheduler, "_schedulers", ())]
        its = [getattr(one, "optimizer", None) for one in inside]
        mine = [one for one in self._optimizers if any(one is held or one.optimizer is held for held in its)]
        repeat = self.num_processes if self._options.step_scheduler_per_process else 1
        made = PreparedScheduler(
            scheduler,
            mine or self._optimizers,
            self._gradients.is_synchronised,
            tied=self._options.step_scheduler_with_optimizer,
            repeat=1 if self._options.split_batches else repeat,
        )
        self._schedulers.append(made)
        self._held.schedulers.append(Schedule(scheduler) if isinstance(scheduler, LRScheduler) else scheduler)
        return made

    def unwrap_model(self, model: nn.Module, keep_torch_compile: bool = False) -> nn.Module:
        """The user's own model, with its class and names, out of everything around it; compiled or not.

        Example:
            engine.unwrap_model(model).config
        """
        return bare(model, keep_compiled=keep_torch_compile)

    def get_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's whole state under its own names, shards put together; all processes call it.

        Example:
            weights = engine.get_state_dict(model)  # on all processes
            engine.save(weights, "weights.pt")  # on the first
        """
        own = bare(model)
        placed = next((prepared.module for known, prepared in self._models if bare(known) is own), own)
        kept = self._backend.kept()
        if kept is not None and placed is self._backend.model:
            # The model itself may be empty.
            return saving.all_names(own, kept["model"].state_dict())
        return saving.whole_state(own)

    def free_memory(self, *objects: Any) -> Any:
        """Lets go of everything that was prepared, and gives a None for each of `objects`.

        Example:
            model, optimizer = engine.free_memory(model, optimizer)
        """
        count = len(objects)
        del objects
        for _, prepared in self._models:
            prepared.release()
        scaler = self._backend.scaler
        for one in self._optimizers:
            one.handle = None
        self._models, self._optimizers, self._schedulers, self._loaders = [], [], [], []
        tracking, even, steps = self._tracking, self.even_batches, self.gradient_accumulation_steps
        records = self._held.records
        self._gradients.forget()
        self._begin(options.build_backend(self._options, self._device, self._ranks))
        if scaler is not None:
            self._backend.scaler = scaler
        self._tracking, self.even_batches, self.gradient_accumulation_steps = tracking, even, steps
        self._held.records = records
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None if count == 1 else (None,) * count

    def clear(self, *objects: Any) -> Any:
        """Another name of `free_memory`.

        Example:
            model, optimizer = engine.clear(model, optimizer)
        """
        return self.free_memory(*objects)

    # --- gradients ---------------------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, *models: nn.Module, weight: Any = None, steps: int | None = None) -> Iterator[None]:
        """Around one micro-batch. Gradients travel, and optimizers and schedulers act, with the last of a window only.

        A window has `gradient_accumulation_steps` micro-batches; it ends early where the loader ends, and is scaled
        by what it holds. Blocks of different models have windows of their own.

        Args:
            models: the models that are trained in the block; none is all.
            weight: the window's whole weight over all processes (tokens, samples). The losses given to `backward` are
                then SUMS, and the gradient is that of their sum / weight. Without it losses are means, and each
                micro-batch counts the same.
            steps: micro-batches of this very window, where the loop has fetched them itself.

        Example:
            window = [next(batches) for _ in range(4)]
            total = engine.reduce(sum(batch["mask"].sum() for batch in window))
            for batch in window:
                with engine.accumulate(model, weight=total, steps=4):
                    engine.backward(loss_sum(model(batch["ids"]), batch))
                    optimizer.step()
                    optimizer.zero_grad()
        """
        exact = None if steps is None else options.positive("steps", steps)
        with self._gradients.accumulate(models, self.gradient_accumulation_steps, weight, exact):
            yield

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around forward and backward passes whose gradients stay on this process until one outside of the block.

        Example:
            with engine.no_sync(model):
                engine.backward(loss_function(model(first), targets))
            engine.backward(loss_function(model(second), targets))  # the gradients of both travel
        """
        return self._gradients.no_sync(model)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Adds the gradients of a loss (0-d): the mean of this process's samples, or a sum where `weight` was given.

        Gradients are averaged over the processes. Inside of `accumulate` they are divided by the micro-batches of the
        window, so do not divide the loss yourself. `retain_graph=True` and the like go to torch.

        Example:
            loss = loss_function(model(inputs), targets)
            engine.backward(loss)
        """
        self._gradients.backward(loss, **kwargs)

    def clip_grad_norm_(self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales gradients to a global norm of at most `max_norm`; returns the true norm before (0-d).

        Acts when gradients are synchronised; before, it returns 0 and changes nothing.

        Example:
            engine.backward(loss)
            norm = engine.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        """
        return self._gradients.clip_norm(parameters, float(max_norm), float(norm_type))

    def clip_grad_value_(self, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
        """Limits each element of the true gradients to [-clip_value, clip_value], when they are synchronised.

        Example:
            engine.backward(loss)
            engine.clip_grad_value_(model.parameters(), 0.5)
            optimizer.step()
        """
        self._gradients.clip_values(parameters, float(clip_value))

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Makes the gradients of one optimizer, of several or of all the true ones, to be looked at before the step.

        Example:
            engine.backward(loss)
            engine.unscale_gradients(optimizer)
            largest = max(p.grad.abs().max() for p in model.parameters())
        """
        self._gradients.unscale(optimizer)

    def autocast(self) -> AbstractContextManager[Any]:
        """For arithmetic outside of a prepared model (a loss) in the precision of its forward.

        Example:
            with engine.autocast():
                loss = criterion(outputs, targets)
        """
        return self._backend.autocast()

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch is the last of its step.

        Example:
            if engine.sync_gradients:
                progress.update(1)  # once a step, not once a micro-batch
        """
        return self._gradients.synchronised

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._gradients.synchronised = value

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of a window; may be changed between steps.

        Example:
            engine.gradient_accumulation_steps = 8  # from the next window on
        """
        return self._accumulation

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, value: int) -> None:
        self._accumulation = options.positive("gradient_accumulation_steps", value)
        self._flow.lookahead = max(1, value - 1)

    @property
    def accumulation_steps(self) -> int:
        """Another name of `gradient_accumulation_steps`."""
        return self._accumulation

    @accumulation_steps.setter
    def accumulation_steps(self, value: int) -> None:
        self.gradient_accumulation_steps = value

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last step of any optimizer changed nothing because of an overflow.

        Example:
            optimizer.step()
            if engine.optimizer_step_was_skipped:
                engine.print("an overflow; the scale is now", engine.scaler.value)
        """
        return any(one.step_was_skipped for one in self._optimizers)

    @contextmanager
    def join_uneven_inputs(self, joinables: Sequence[Any] = (), even_batches: bool | None = False) -> Iterator[None]:
        """Loaders see what is left, uneven, inside of the block; training over them neither hangs nor repeats samples.

        A process without a batch of its own trains on one that weighs nothing. `joinables` are not looked at.

        Example:
            with engine.join_uneven_inputs([model]):
                for inputs, targets in loader: ...
        """
        before = self.even_batches
        self.even_batches = before if even_batches is None else even_batches
        try:
            yield
        finally:
            self.even_batches = before

    # --- data --------------------------------------------------------------------------------------------------------

    def skip_first_batches(self, dataloader: DataLoader[Any], num_batches: int = 0) -> DataLoader[Any]:
        """The loader with everything it has, without its first batches in its first pass.

        Example:
            for batch in engine.skip_first_batches(loader, 120): ...  # the rest of an interrupted epoch
            for batch in loader: ...  # the next epoch
        """
        if isinstance(dataloader, Loader):
            return dataloader.skipping(num_batches)
        return plain_without(dataloader, num_batches)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """`gather` of what belongs to the present batch, without samples that were only repeated to fill it up.

        Tensors of shape (batch, ...), nested containers of such, or lists of objects (one for each sample).

        Example:
            predictions, targets = engine.gather_for_metrics((logits.argmax(-1), targets))
        """
        one = self._flow.latest()
        size, real = (None, None) if one is None else (one.share.size, one.share.real)
        objects = input_data
        if real is not None and isinstance(input_data, (list, tuple)):
            objects = control.kept_items(input_data, size, real)
        if use_gather_object:
            return collectives.gather_object(objects)
        return collectives.gather_either(control.kept(input_data, size, real), objects)

    # --- collectives -------------------------------------------------------------------------------------------------

    def gather(self, tensor: Any) -> Any:
        """Tensors (n, ...) of all processes in rank order as (n_0 + n_1 + ..., ...); 0-d ones as (processes,).

        Example:
            losses = engine.gather(loss)  # (num_processes,)
        """
        return collectives.gather(tensor)

    def gather_object(self, value: Any) -> list[Any]:
        """Any object of each process in rank order; lists are joined into one.

        Example:
            texts = engine.gather_object(["one", "two"])
        """
        return collectives.gather_object(value)

    def broadcast(self, value: Any, from_process: int = 0) -> Any:
        """The nested tensors, or any object, of one process on all.

        Example:
            settings = engine.broadcast(read_settings() if engine.is_main_process else None)
        """
        return collectives.broadcast(value, from_process)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Tensors of any shape, added up over the processes ("sum", the default), or their "mean", "max", "min".

        Example:
            tokens = engine.reduce(mask.sum())  # 0-d, on all processes
        """
        return collectives.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Tensors filled up along `dim` to the longest of all processes.

        Example:
            ids = engine.pad_across_processes(ids, dim=1, pad_index=pad)  # (batch, longest)
        """
        return collectives.pad_across_processes(tensor, dim, pad_index, pad_first)

    # --- processes ---------------------------------------------------------------------------------------------------

    @property
    def process_index(self) -> int:
        """This process's number, from 0 to `num_processes` - 1.

        Example:
            torch.manual_seed(seed + engine.process_index)
        """
        return self._ranks.rank

    @property
    def local_process_index(self) -> int:
        """This process's number on its machine.

        Example:
            port = 9000 + engine.local_process_index  # another for each process of a machine
        """
        return self._ranks.local_rank

    @property
    def num_processes(self) -> int:
        """The processes of the job.

        Example:
            samples = len(loader) * batch_size * engine.num_processes
        """
        return self._ranks.world_size

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0.

        Example:
            if engine.is_main_process:
                Path("report.txt").write_text(report)
        """
        return self._ranks.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its machine.

        Example:
            bar = tqdm(loader, disable=not engine.is_local_main_process)
        """
        return self._ranks.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this process has the highest number.

        Example:
            if engine.is_last_process:
                print("the last of", engine.num_processes)
        """
        return self._ranks.rank == self._ranks.world_size - 1

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process.

        Example:
            if engine.use_distributed:
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        """
        return self._ranks.world_size > 1

    @property
    def device(self) -> torch.device:
        """Where this process's models and batches are.

        Example:
            mask = torch.zeros(8, device=engine.device)
        """
        return self._device

    @property
    def backend(self) -> str:
        """The backend that runs: single, ddp, fsdp or deepspeed.

        Example:
            if engine.backend == "fsdp": ...
        """
        return self._backend.name

    @property
    def precision(self) -> str:
        """The precision by its own name.

        Example:
            engine.print(engine.precision)  # bf16
        """
        return self._options.precision.name

    @property
    def mixed_precision(self) -> str:
        """The precision in Accelerate's words: "no", "fp16", "bf16" or "fp8".

        Example:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(engine.mixed_precision, torch.float32)
        """
        return self.precision if self.precision in ("fp16", "bf16", "fp8") else "no"

    @property
    def distributed_type(self) -> DistributedType:
        """How the processes work together; `str` of it is its value.

        Example:
            engine.print(engine.distributed_type)  # MULTI_GPU
        """
        sharded = {"fsdp": DistributedType.FSDP, "deepspeed": DistributedType.DEEPSPEED}
        if self._backend.name in sharded:
            return sharded[self._backend.name]
        if self.num_processes == 1:
            return DistributedType.NO
        return DistributedType.MULTI_CPU if self._device.type == "cpu" else DistributedType.MULTI_GPU

    @property
    def split_batches(self) -> bool:
        """Whether a loader's batch is the global one."""
        return self._options.split_batches

    @property
    def dispatch_batches(self) -> bool | None:
        """Whether process 0 reads for all; None: iterable data sets only."""
        return self._options.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """Whether all processes see the same number of batches."""
        return self._now.even_batches

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self._now.even_batches = value

    @property
    def scaler(self) -> Any:
        """The loss scaling in use (its `value` is the scale), or None."""
        found = self._backend.scaler
        return found if found is not None and found.active else None

    def wait_for_everyone(self) -> None:
        """Waits until all processes have come here.

        Example:
            engine.save(weights, "weights.pt")  # by the first process
            engine.wait_for_everyone()
            weights = torch.load("weights.pt")
        """
        distributed.barrier()

    def main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on process 0 first, then, also when it raised there, on the others.

        Example:
            with engine.main_process_first():
                dataset = download_once()
        """
        return control.goes_first(self.is_main_process)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """The block runs on the first process of each machine, then on the others.

        Example:
            with engine.local_main_process_first():
                dataset = download_to_local_disk()
        """
        return control.goes_first(self.is_local_main_process)

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on process 0 only, and gives None elsewhere.

        Example:
            @engine.on_main_process
            def report(): ...
        """
        return control.only(lambda: self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on the first process of each machine only.

        Example:
            @engine.on_local_main_process
            def report(): ...
        """
        return control.only(lambda: self.is_local_main_process, function)

    def on_last_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the function runs on the last process only.

        Example:
            @engine.on_last_process
            def report(): ...
        """
        return control.only(lambda: self.is_last_process, function)

    def on_process(self, function: Any = None, process_index: int | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on one process only.

        Example:
            @engine.on_process(process_index=1)
            def report(): ...
        """
        return self._on(function, process_index, lambda index: self.process_index == index)

    def on_local_process(self, function: Any = None, local_process_index: int | None = None) -> Callable[..., Any]:
        """Decorator: the function runs on one process of each machine only.

        Example:
            @engine.on_local_process(local_process_index=1)
            def report(): ...
        """
        return self._on(function, local_process_index, lambda index: self.local_process_index == index)

    def _on(self, function: Any, index: int | None, here: Callable[[int], bool]) -> Callable[..., Any]:
        if isinstance(function, int):
            function, index = None, function
        if index is None:
            raise wrong("process_index", "is missing", "on_process(process_index=1)")
        if function is None:
            return lambda later: control.only(lambda: here(index), later)
        return control.only(lambda: here(index), function)

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's part of a list, tuple, dictionary, tensor or data set; the first ones get what is over.

        Example:
            with engine.split_between_processes(["a", "b", "c"]) as prompts: ...  # ["a", "b"] on process 0 of 2
        """
        yield control.split(inputs, self.process_index, self.num_processes, apply_padding)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on the first process of each machine only.

        Example:
            engine.print(f"epoch {epoch}: loss {loss.item():.4f}")
        """
        if self.is_local_main_process:
            print(*args, **kwargs)

    def set_trigger(self) -> None:
        """Raises a flag that `check_trigger` sees on all processes.

        Example:
            if too_bad(loss):  # on any process
                engine.set_trigger()
        """
        self._trigger = True

    def check_trigger(self) -> bool:
        """Whether any process has raised the flag since the last check; all processes call it, and it is then down.

        Example:
            if too_bad(loss):
                engine.set_trigger()
            if engine.check_trigger():
                break
        """
        flag = torch.tensor(float(self._trigger), device=self._device)
        self._trigger = False
        return bool(distributed.total(flag).item() > 0)

    # --- saving ------------------------------------------------------------------------------------------------------

    @property
    def project_dir(self) -> str | None:
        """Where trackers write and states are saved."""
        return self._options.project_dir

    def save(self, obj: Any, f: str | Path, safe_serialization: bool = False) -> None:
        """Writes an object by torch.save, or a mapping of tensors as safetensors, on process 0; complete or not at all.

        Example:
            engine.save(engine.get_state_dict(model), "weights.pt")
        """
        if self.is_main_process:
            saving.save_object(obj, Path(f), safe=safe_serialization)

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | Path,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes a model's weights under its own names as `model.safetensors`; all processes call it.

        Larger than `max_shard_size`, they become `model-00001-of-00003.safetensors` ... and an index.

        Example:
            engine.save_model(model, "out")  # out/model.safetensors
        """
        weights = self.get_state_dict(model)
        if self.is_main_process:
            saving.save_weights(weights, Path(save_directory), max_shard_size, safe_serialization)
        distributed.barrier()

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Objects with state_dict and load_state_dict that `save_state` saves too, in this order.

        Example:
            engine.register_for_checkpointing(average, counter)
            engine.save_state("checkpoints")
        """
        state.check_custom(objects)
        self._held.custom += [one for one in objects if all(one is not known for known in self._held.custom)]

    def save_state(
        self, output_dir: str | Path | None = None, keep: int = 2, *, safe_serialization: bool = True
    ) -> str:
        """Saves models, optimizers, schedulers, loss scale, loaders' epochs, registered objects and random states.

        Writes OUTPUT_DIR/step_XXXXXXXX, complete or not at all, and returns OUTPUT_DIR, where the `keep` newest stay.
        All processes call it. Without `output_dir` it is PROJECT_DIR/checkpoints.

        Example:
            engine.save_state("checkpoints")
            engine.load_state("checkpoints")  # in another process: the newest
        """
        if not safe_serialization:
            why = "a state is saved as safetensors and JSON, never by pickle"
            raise wrong("safe_serialization", why, "leave it out", value=safe_serialization)
        folder = self._state_folder(output_dir)
        steps = max((one.taken for one in self._optimizers), default=0)
        if self.is_main_process and (waiting := self._gradients.unfinished()):
            state.warn_of_window(waiting)
        state.save(folder, self._state(), steps, keep)
        return str(folder)

    def load_state(self, input_dir: str | Path | None = None) -> str:
        """Loads the newest of what `save_state` wrote to a folder, or one checkpoint by its path; returns that path.

        The same objects must have been prepared and registered in the same order. Random states come last.

        Example:
            engine.load_state("checkpoints")  # the newest
            rest = engine.skip_first_batches(loader, batches_seen)
        """
        found = state.load(self._state_folder(input_dir), self._state())
        step = int(found.name.rpartition("_")[2])
        for one in self._optimizers:
            one.taken = step
        for scheduler in self._schedulers:
            scheduler.settle()
        if self._tracking is not None:
            self._tracking.resumed()
        return str(found)

    def _state_folder(self, folder: str | Path | None) -> Path:
        if folder is not None:
            return Path(folder)
        if self.project_dir is None:
            raise wrong("output_dir", "is missing, and so is project_dir", "give one: Engine(project_dir=...)")
        return Path(self.project_dir) / "checkpoints"

    def _state(self) -> dict[str, Any]:
        for one in self._optimizers:
            one.driven()
        named = self._held.named(self._backend.scaler)
        if (own := self._backend.kept()) is not None:
            named |= {"model_0": own["model"], "optimizer_0": own["optimizer"], "scaler": own["scaler"]}
        named |= self._backend.extras()
        named["random"] = named.pop("random")
        return named

    # --- records -----------------------------------------------------------------------------------------------------

    def init_trackers(
        self,
        project_name: str = "",
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the trackers, which write below PROJECT_DIR/PROJECT_NAME.

        Example:
            engine = Engine(log_with="tensorboard", project_dir="runs")
            engine.init_trackers("first", config={"lr": 0.1})
        """
        if init_kwargs:
            fix = 'log_with=[runner.trackers.tensorboard.TensorBoard(seconds=1.0), "jsonl"]'
            raise wrong("init_kwargs", "trackers take their options where they are made", fix, value=dict(init_kwargs))
        folder = Path(self.project_dir or ".") / project_name
        self._tracking = Tracking(
            self._options.trackers, folder, config or {}, self._held.records, main=self.is_main_process
        )

    @property
    def trackers(self) -> list[Any]:
        """The trackers that were started.

        Example:
            for tracker in engine.trackers: ...
        """
        return [] if self._tracking is None else list(self._tracking.by_name.values())

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """A tracker by its name: "jsonl", "tensorboard", or that of your own.

        Example:
            writer = engine.get_tracker("tensorboard")
        """
        if unwrap and name in ("jsonl", "tensorboard"):
            fix = "use its method log(record), or give log_with an object of your own"
            raise wrong("unwrap", f"the tracker {name} has nothing inside to be used", fix, value=unwrap)
        known = {} if self._tracking is None else self._tracking.by_name
        if name not in known:
            fix = f"known are {', '.join(known)}" if known else "call init_trackers first"
            raise wrong("get_tracker", "there is no such tracker", fix, value=name)
        return known[name]

    def log(self, values: Mapping[str, Any], step: int | None = None, split: str = "train") -> None:
        """Hands numbers to all trackers, on process 0. Without `step` calls are counted.

        Example:
            engine.log({"loss": loss, "lr": scheduler.get_last_lr()[0]}, step=step)
        """
        if self._tracking is None:
            raise wrong("log", "no tracker was started", "call init_trackers first")
        if self.is_main_process:
            self._tracking.log(values, step, split)

    def end_training(self) -> None:
        """Closes the trackers, lets go of all objects and leaves the other processes; the last word of a script.

        Example:
            engine.save_model(model, "out")
            engine.end_training()
        """
        if self._tracking is not None:
            self._tracking.close()
            self._tracking = None
        self._leave(lambda: distributed.leave(together=True))

    def _leave(self, how: Callable[[], None]) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._flow = Flow()
        self._gradients.forget()
        for _, prepared in self._models:
            prepared.release()
        self._models, self._optimizers, self._schedulers, self._loaders = [], [], [], []
        self._held = state.Held()
        if self._owns_group:
            self._owns_group = False
            self._backend.close()
            self._backend = None  # type: ignore[assignment]  # it may hold what still uses the group
            how()
            self._backend = _Left(self._options.backend)  # type: ignore[assignment]

    @contextmanager
    def profile(self, folder: str | Path | None = None, **kwargs: Any) -> Iterator[Any]:
        """torch's profiler around the block; with `folder` each process writes `profile_RANK.json` (Chrome's format).

        Example:
            with engine.profile(record_shapes=True) as profiler:
                step()
            engine.print(profiler.key_averages().table())
        """
        if folder is not None and not isinstance(folder, (str, Path)):
            why = f"a {type(folder).__name__} is no folder"
            raise wrong("profile", why, "give the words of torch.profiler.profile: profile(record_shapes=True)")
        with torch.profiler.profile(**kwargs) as profiler:
            yield profiler
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(Path(folder) / f"profile_{self.process_index}.json"))

    # --- as an object ------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # To a worker of a data loader, say: what it is and where, and nothing that was prepared.
        return {"options": self._options, "ranks": self._ranks, "device": self._device}

    def __setstate__(self, found: dict[str, Any]) -> None:
        self._options, self._ranks, self._device = found["options"], found["ranks"], found["device"]
        self._owns_group, self._watch = False, None
        self._begin(options.build_backend(self._options, self._device, self._ranks))

    def __repr__(self) -> str:
        where = f"process {self.process_index} of {self.num_processes}"
        return f"Engine({self._backend.name}, {self.precision}, {self._device}, {where})"


class _Left:
    """In the place of a backend whose group is gone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        raise wrong("Engine", "has ended its training", "make a new Engine")


class _Now:
    """What an engine's loaders ask when a pass begins; they may outlive the engine."""

    def __init__(self, even: bool, optimizers: list[PreparedOptimizer]) -> None:
        self.even_batches = even
        self.models: list[weakref.ref[PreparedModel]] = []
        self._optimizers = optimizers

    def even(self) -> bool:
        return self.even_batches

    def training(self) -> bool:
        """Whether gradients are on, and a model is in train mode beside an optimizer."""
        models = [ref() for ref in self.models]
        trained = any(model is not None and model.training for model in models)
        return trained and bool(self._optimizers) and torch.is_grad_enabled()


def _leave_at_exit(engine: Engine) -> None:
    """A script that ends without end_training leaves in order too; after an error nobody is waited for.

    Others are waited for a moment only: nobody knows here whether the script has ended or one process has by sys.exit.
    """
    kept = weakref.ref(engine)

    def leave() -> None:
        one = kept()
        if one is not None and one._owns_group:
            failed = hasattr(sys, "last_value") or hasattr(sys, "last_exc")
            store = one._store
            one._leave(partial(distributed.leave, together=False) if failed else lambda: group.leave(store, _MOMENT))

    atexit.register(leave)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _known() -> list[str]:
    names = Engine.__init__.__code__.co_varnames[1 : Engine.__init__.__code__.co_argcount]
    return [*names, *(Engine.__init__.__kwdefaults__ or {})]


def _same_everywhere(model: nn.Module) -> None:
    """Gives all processes the first one's values, as DistributedDataParallel does: a script need not seed."""
    if distributed.world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                tensor.data.copy_(collectives.broadcast(tensor.data))


def _is_model(one: Any) -> bool:
    return (
        isinstance(one, nn.Module)
        and not isinstance(one, PreparedModel)
        and not isinstance(one._modules.get("_orig_mod"), PreparedModel)
    )


def _is_optimizer(one: Any) -> bool:
    return isinstance(one, Optimizer) and not isinstance(one, PreparedOptimizer)


def _is_scheduler(one: Any) -> bool:
    return isinstance(one, LRScheduler) or all(hasattr(one, word) for word in ("step", "get_last_lr", "state_dict"))
