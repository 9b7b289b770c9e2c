"""`batch.micro_size=auto`: the most samples a forward pass that the memory takes, found before the first step."""

from __future__ import annotations

import gc
import logging
import math
import pickle
from collections.abc import Generator, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner import distributed
from runner.data.loader import to_device
from runner.data.main import NotRead
from runner.errors import wrong
from runner.signals import Interrupted
from runner.train.run import Run
from runner.train.step import check_loss
from runner.train.trial import trial

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

    All processes try the same micro-batch, the largest that any of them has, and agree before they go on. Gradients
    stay at home in a trial, so a process that fails alone leaves nobody waiting. Not so where a forward or backward
    itself communicates (FSDP; ZeRO stage 3, and stage 2 in bf16 or with offloading): processes there run out of
    memory together, as they hold the same sizes; where only one does, because something else uses its device, the
    others wait for it until launch.timeout.

    Raises InputError where not even one sample fits. Other errors of the forward or backward pass through.
    """
    order, readers = run.train_data.order, run.engine.mesh.data_size
    share = order.global_size // readers
    too_big: list[int] = []
    room: int | None = share
    while room is not None:
        if run.signal is not None:
            raise Interrupted(run.signal)
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
    with trial(engine.model, run.train_data):
        fits = _together(_parts(run, size))
        # By now an error is gone, and with it the frames that held the tensors of the forward.
        engine.backend.discard()
        _free(engine.device)
    return fits


def _together(parts: Generator[None, None, None]) -> bool:
    """Goes through the parts of a trial; false, and no further, where one has no memory for its next part."""
    error: Exception | None = None
    while True:
        try:
            next(parts)
        except StopIteration:
            return True
        except Exception as caught:
            if not is_out_of_memory(caught) and not isinstance(caught, NotRead):
                raise
            error = caught
        lacking = bool(distributed.total(torch.tensor(float(is_out_of_memory(error)))).item())
        if error is not None and not lacking:
            raise error
        if lacking:
            parts.close()
            return False


def _parts(run: Run, size: int) -> Generator[None, None, None]:
    """Forward and backward of the largest micro-batch, in parts: after each, processes agree whether to go on.

    Agreed on is before whatever may communicate: the reading of a first process, the buffers in a forward pass.
    """
    engine, task, data, step = run.engine, run.task, run.train_data, run.progress.step
    order = copy(data.order)
    if hasattr(order, "count") and order.count(step) < order.global_size:
        step += 1  # the short last step of an epoch says little
    found = _read(data, size, order, step)
    yield
    # Where the first process reads for all, the others do not know the lengths.
    longest = distributed.broadcast(_longest(data.dataset, size) if distributed.rank() == 0 else None)
    if longest is not None:
        found += _read(data, size, _Always(longest.repeat(engine.mesh.data_size)), 0)
        yield
    batch = _same_everywhere(max(found, key=lambda batch: _elements(_shapes(batch))), engine.device)
    del found
    if engine.device.type != "cpu":
        batch = to_device(batch, engine.device)  # another process's comes in the host's memory
    room = list(_room_for_state(engine.optimizer))
    yield
    engine.seed(run.settings.seed, run.progress.step)
    # The second of several finds gradients there.
    for _ in range(1 if size * engine.mesh.data_size == data.order.global_size else 2):
        with engine.accumulate(False):
            loss = task.loss(engine.forward(task.inputs(batch)), batch)
            check_loss(loss, task)
            engine.backward(loss, engine.factor(1))
        del loss
        yield
    del room


def _longest(dataset: Any, size: int) -> Tensor | None:
    """The indices of the longest samples, where the data set tells `lengths`."""
    lengths = getattr(dataset, "lengths", None)
    return None if lengths is None else torch.as_tensor(lengths).topk(min(size, len(lengths))).indices


def _same_everywhere(batch: Any, device: torch.device) -> Any:
    """The largest of all processes' batches; each keeps its own where it cannot be sent."""
    shapes = distributed.gather(_shapes(batch))
    if all(each == shapes[0] for each in shapes):
        return batch
    sizes = [_elements(each) for each in shapes]
    source = sizes.index(max(sizes))
    if distributed.rank() == source:
        distributed.broadcast(_packed(batch, device), source)
        return batch
    sent = distributed.broadcast(None, source)
    return batch if sent is None else pickle.loads(sent)


def _packed(batch: Any, device: torch.device) -> bytes | None:
    try:
        if device.type != "cpu":
            batch = to_device(batch, torch.device("cpu"))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return pickle.dumps(batch)
    except Exception:  # whatever the user's own types raise
        return None


def _read(data: Any, size: int, order: Any, step: int) -> list[Any]:
    """A step's micro-batches of this size, read by a copy of the loader, so that the true one has seen nothing."""
    other = copy(data)
    other.micro_size, other.order = size, order
    if hasattr(order, "ends"):
        order.ends = list(order.ends)
    steps = other.steps(step, step + 1)
    try:
        return list(next(steps).batches)
    finally:
        steps.close()


class _Always:
    """An order of samples whose every step is the same."""

    seed = 0
    steps_per_epoch = 1

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    def indices(self, step: int) -> Tensor:
        return self._samples

    def count(self, step: int) -> int:
        return len(self._samples)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    """Those of the tensors in a nested structure."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif is_dataclass(value) and not isinstance(value, type):
        inner = (getattr(value, field.name) for field in fields(value))
    return [shape for item in inner for shape in _shapes(item)]


def _elements(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


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
