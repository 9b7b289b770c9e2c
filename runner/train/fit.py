"""`batch.micro_size=auto`: the most samples a forward pass that the memory takes, found before the first step."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner import distributed
from runner.checkpoint import RandomState
from runner.errors import wrong
from runner.train.run import Run
from runner.train.step import check_loss

_log = logging.getLogger("runner")


@dataclass(frozen=True)
class Fit:
    """What was found: samples per forward pass, micro-batches per step and process, and the sizes that were too big."""

    micro_size: int
    accumulation: int
    too_big: tuple[int, ...] = ()


def fit_micro_size(run: Run) -> Fit:
    """Finds the largest micro-batch that fits and gives it to `run.train_data`; to be called before the first step.

    Begins with a process's whole share of a step and goes down through its divisors, each at most half of the one
    before, until no process runs out of memory. A trial is the forward and backward of the next step's largest
    micro-batch (where the data set tells `lengths`, of the longest samples it has), twice where a step has several,
    with room taken for the optimizer's state that the first step will make. Nothing of it stays: gradients are thrown
    away, buffers and random states put back. So the training is that of a run that was given the size.

    Gradients stay at home in a trial, so a process that fails leaves nobody waiting, and all agree before they go on.
    Not so where the forward itself communicates (FSDP, ZeRO stage 3): processes there run out of memory together, as
    they hold the same sizes; where only one does, the others wait for it until launch.timeout.

    Raises InputError where not even one sample fits. Other errors of the forward or backward pass through.
    """
    order, readers = run.train_data.order, run.engine.mesh.data_size
    share = order.global_size // readers
    too_big: list[int] = []
    room: int | None = share
    while room is not None:
        if _fits(run, room):
            fit = Fit(room, share // room, tuple(too_big))
            run.train_data.micro_size = room
            _report(run, fit)
            return fit
        too_big.append(room)
        room = _below(share, room)
    raise _nothing_fits(run)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a device or the host has no memory left."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower()
        words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(word in text for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _below(share: int, size: int) -> int | None:
    """The largest divisor of a process's share that is at most half of `size`; None below 1."""
    return next((d for d in range(size // 2, 0, -1) if share % d == 0), None)


def _fits(run: Run, size: int) -> bool:
    """Whether no process runs out of memory with micro-batches of `size`."""
    engine = run.engine
    random, kept = RandomState(), _buffers(engine.model)
    before = random.state_dict()
    batches = _batches(run, size)
    engine.seed(run.settings.seed, run.progress.step)
    failed = False
    try:
        _try(run, batches)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    del batches
    # By now the error is gone, and with it the frames that held the tensors of the forward.
    engine.backend.discard()
    _free(engine.device)
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    random.load_state_dict(before)
    return not distributed.total(torch.tensor(float(failed))).item()


def _try(run: Run, batches: list[Any]) -> None:
    engine, task = run.engine, run.task
    room = list(_room_for_state(engine.optimizer))
    for batch in batches:
        with engine.accumulate(False):
            loss = task.loss(engine.forward(task.inputs(batch)), batch)
            check_loss(loss, task)
            engine.backward(loss, engine.factor(1))
        del loss
    del room


def _batches(run: Run, size: int) -> list[Any]:
    """The largest micro-batch of the next step, twice where a step has several: the second finds gradients there."""
    data, step = run.train_data, run.progress.step
    run.engine.seed(run.settings.seed, step, "data")
    order = copy(data.order)
    if hasattr(order, "count") and order.count(step) < order.global_size:
        step += 1  # the short last step of an epoch says little
    found = _read(data, size, order, step)
    lengths = getattr(data.dataset, "lengths", None)
    if lengths is not None:
        longest = torch.as_tensor(lengths).topk(min(size, len(lengths))).indices
        found += _read(data, size, _Always(longest.repeat(run.engine.mesh.data_size)), 0)
    largest = max(found, key=_elements)
    return [largest] * (1 if size * run.engine.mesh.data_size == data.order.global_size else 2)


def _read(data: Any, size: int, order: Any, step: int) -> list[Any]:
    """A step's micro-batches of this size, read by a copy of the loader, so that the true one has seen nothing."""
    trial = copy(data)
    trial.micro_size, trial.order = size, order
    if hasattr(order, "ends"):
        order.ends = list(order.ends)
    stateful = hasattr(data.dataset, "state_dict") and hasattr(data.dataset, "load_state_dict")
    state = data.dataset.state_dict() if stateful else None
    steps = trial.steps(step, step + 1)
    found = list(next(steps).batches)
    steps.close()
    if stateful:
        data.dataset.load_state_dict(state)
    return found


class _Always:
    """An order of samples whose every step is the same."""

    seed = 0

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    def indices(self, step: int) -> Tensor:
        return self._samples

    def count(self, step: int) -> int:
        return len(self._samples)


def _elements(value: Any) -> int:
    """How many numbers the tensors of a nested structure hold."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Mapping):
        return sum(_elements(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_elements(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_elements(getattr(value, field.name)) for field in fields(value))
    return 0


def _room_for_state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Memory as large as the state that an optimizer makes at its first step; nothing where that has been."""
    if optimizer.state:
        return
    copies = _state_tensors(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for _ in range(copies):
                yield torch.empty_like(parameter)


def _state_tensors(optimizer: torch.optim.Optimizer) -> int:
    """How many tensors of a parameter's size an optimizer keeps for it, seen on a small one."""
    small = nn.Parameter(torch.zeros(4, 4))
    small.grad = torch.zeros(4, 4)
    try:
        made: Any = type(optimizer)([small], **optimizer.defaults)
        made.step()
    except Exception:
        return 2  # an optimizer that cannot be made so easily: as much as Adam
    return sum(isinstance(v, Tensor) and v.shape == small.shape for v in made.state[small].values())


def _buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A model's buffers with their values, kept in the host's memory."""
    return [(buffer, buffer.detach().to("cpu", copy=True)) for buffer in model.buffers() if not buffer.is_meta]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()


def _report(run: Run, fit: Fit) -> None:
    if run.engine.mesh.data_rank:
        return
    sizes = ", ".join(str(size) for size in fit.too_big)
    note = f" ({sizes} ran out of memory)" if sizes else ""
    _log.info(
        "batch.micro_size=auto: %d%s; accumulation.steps=%d, batch.global_size=%d",
        fit.micro_size,
        note,
        fit.accumulation,
        run.train_data.order.global_size,
    )


def _nothing_fits(run: Run) -> Exception:
    why = f"not even a micro-batch of one sample fits the memory of {run.engine.device}"
    fix = "activation_checkpointing=full, backend=fsdp over several processes, precision=bf16, or a smaller model"
    return wrong("batch.micro_size", why, fix, value="auto")
