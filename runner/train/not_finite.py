"""What follows where a loss, a gradient or a weight is not finite: the policy `nan`, and the record of the samples."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from runner import distributed
from runner.checkpoint import SaveFailed
from runner.checkpoint.tree import tensors_of
from runner.data.stream import StreamOrder
from runner.engine.backend import Update
from runner.errors import InputError, TrainingStopped
from runner.train.run import Run

#: In the run's folder: a line for each step that was not finite.
JOURNAL = "not_finite.jsonl"

#: Steps in a row without a finite loss and gradient after which `skip` and `rollback` give up. Samples that are bad
#: come one by one, or in a stretch of a file; after so many batches of different ones it is not the samples.
MOST_IN_A_ROW = 100

Named = tuple[str, Tensor]

#: What is looked at, in the words of a message; of a hook it is `hooks.NAME`.
WEIGHTS, BUFFERS = "weights or optimizer state", "buffers"

_log = logging.getLogger("runner")


class GoBack(Exception):
    """The training is to go on from the last good checkpoint, passing over the samples of one step.

    `bad` is that step and `found` the one at which it showed (both from 1); `what` says what was not finite.
    """

    def __init__(self, bad: int, found: int, what: str, numbers: dict[str, Any]) -> None:
        super().__init__(f"step {found}: {what}")
        self.bad, self.found, self.what, self.numbers = bad, found, what, numbers


def follow(run: Run, update: Update) -> None:
    """What the policy says of a step that was not finite and has changed no weight, on all processes alike.

    Returns under `skip` and `ignore`. Raises TrainingStopped under `stop` and where more steps would lead nowhere,
    GoBack under `rollback`.
    """
    policy, step = run.settings.nan, run.unsettled_step
    if policy == "ignore":
        return
    run.progress.in_a_row += 1
    found = _not_finite(run)
    spoilt = bool(found)
    # Weights that are not finite now were so before this step: what wrote them is the update before, unless a
    # checkpoint was saved after that.
    bad = step - 1 if spoilt and run.saved_at < step - 1 else step
    assert run.loss is not None
    norm = _norm_of_all(update)
    numbers = {"loss": _as_json(run.loss.item()), "grad_norm": _as_json(norm), "weights_finite": not spoilt}
    what = f"not finite (loss {run.loss.item()}, gradient norm {'unknown' if norm is None else norm})"
    if spoilt:
        what += ", because weights are not finite"
    if policy == "rollback" and run.progress.in_a_row < MOST_IN_A_ROW and not _from_the_start(run, found):
        raise GoBack(bad, step, what, numbers)
    record(run, bad, step, **numbers)
    if policy == "stop" or spoilt or run.progress.in_a_row >= MOST_IN_A_ROW:
        why = f"{_why(run, spoilt)}, and {last_good(run)}. {_advice(run, bad, found)}"
        raise TrainingStopped(f"step {step}: {what}; {why}")
    _log.warning("step %d: %s; it is left out. %s", step, what, samples_in_words(run, bad))


def check_weights(run: Run, *, last: bool = False) -> bool:
    """Whether what is about to be saved may be: nothing that is not finite is, whatever the policy.

    That is weights, buffers, optimizer state, and what hooks keep of the weights. Raises as `follow` does. Under
    `ignore` the answer is False and the training goes on, unless it is the `last` checkpoint and a signal ends the run:
    whoever starts it again counts on that one. `skip` has no step to leave out, so it stops.
    """
    hooks = _kept_by_hooks(run)
    found = _not_finite(run, hooks)
    if not found:
        return True
    step, policy = run.progress.step, run.settings.nan
    spoilt = [name for name in found if name in hooks]
    what = f"{' and '.join(found)} {'is' if len(found) == len(spoilt) == 1 else 'are'} not finite"
    if policy == "ignore":
        if last and not run.complete:
            raise TrainingStopped(
                f"step {step}: {what}, so the run that a signal ends here leaves no checkpoint of this step, and "
                f"{last_good(run)}. {_advice(run, step, found)}"
            )
        _log.warning("step %d: %s; no checkpoint is saved, and %s", step, what, last_good(run))
        return False
    numbers: dict[str, Any] = {"loss": None, "grad_norm": None, "weights_finite": len(spoilt) == len(found)}
    if spoilt:
        numbers["hooks"] = spoilt
    if not _from_the_start(run, found):
        # A rollback over the step behind which there is a checkpoint would change nothing.
        if policy == "rollback" and step and step not in run.progress.passed_over:
            raise GoBack(step, step, what, numbers)
        record(run, max(step, 1), step, **numbers)
    good = last_good(run)
    raise TrainingStopped(f"step {step}: {what}; they were not saved, and {good}. {_advice(run, step, found)}")


def look_at_the_start(run: Run) -> None:
    """Notes which buffers and tensors of hooks are not finite by design, and what else is so before any step."""
    hooks = {} if run.checkpointer is None else _kept_by_hooks(run)
    held = [*((name, value) for name, value in _model(run) if name), *(one for kept in hooks.values() for one in kept)]
    run.never_finite = frozenset(name for name, value in held if not _finite([value]))
    run.spoilt_at_start = frozenset(_not_finite(run))


def _from_the_start(run: Run, found: Collection[str]) -> bool:
    """Whether something of it was so before this process made a step: no step is to blame, and none mends it."""
    return not run.spoilt_at_start.isdisjoint(found)


def _not_finite(run: Run, hooks: Mapping[str, list[Named]] | None = None) -> tuple[str, ...]:
    """What is not finite on any process, in words, the same on all: of the model, the optimizer, and the `hooks`.

    Buffers that began with something else (a mask of -inf) may have it, and so may tensors of hooks.
    """
    model = list(_model(run))
    named = {BUFFERS: [one for one in model if one[0]], **(hooks or {})}
    held = {
        WEIGHTS: [*(value for name, value in model if not name), *_stepped(run)],
        **{words: [value for name, value in found if name not in run.never_finite] for words, found in named.items()},
    }
    bad = torch.tensor([float(not _finite(tensors)) for tensors in held.values()], device=run.engine.device)
    return tuple(words for words, count in zip(held, distributed.total(bad).tolist(), strict=True) if count)


def _model(run: Run) -> Iterator[tuple[str, Tensor]]:
    """This process's part of all that the model holds: buffers by their names, weights without."""
    weights = {_own(parameter.detach()).data_ptr() for parameter in run.engine.model.parameters()}
    for name, value in run.engine.model.state_dict().items():
        if isinstance(value, Tensor):
            own = _own(value)
            yield "" if own.data_ptr() in weights else name, own


def _stepped(run: Run) -> Iterator[Tensor]:
    """The same of the optimizer's state."""
    # Where a backend steps other tensors than those of the model, these are the keys.
    for parameter, entry in run.engine.optimizer.state.items():
        for value in (parameter, *entry.values()):
            if isinstance(value, Tensor):
                yield _own(value.detach())


def _kept_by_hooks(run: Run) -> dict[str, list[Named]]:
    """By `hooks.NAME`, this process's part of what each hook with state keeps of the weights, as an average of them.

    Those are the tensors that go by a weight's name and have its shape. Others may hold what they like: the best loss
    so far begins as infinity, and the loss of a step that was left out is NaN.
    """
    shapes: dict[str, torch.Size] = {}
    with suppress(InputError):  # a backend that keeps the weights to itself: no hook can have averages of them
        shapes = {name: weight.shape for name, weight in run.engine.backend.weights().items()}
    found: dict[str, list[Named]] = {}
    for name, hook in run.hooks.items():
        if hasattr(hook, "state_dict"):
            kept = found[f"hooks.{name}"] = []
            with suppress(Exception):  # of a state that cannot be told, the save itself says so
                kept += [
                    (path, _own(value.detach()))
                    for path, value in tensors_of(hook.state_dict(), f"hooks.{name}").items()
                    if any(shapes.get(end) == value.shape for end in _ends(_last_name(path)))
                ]
    return found


def _last_name(path: str) -> str:
    """The last key on the way to a tensor that is no place in a list."""
    return next((word for word in reversed(path.split("/")) if not word.isdecimal()), "")


def _ends(key: str) -> Iterator[str]:
    """`module.0.weight`, `0.weight`, `weight`: what is averaged may be wrapped."""
    yield key
    while "." in key:
        key = key.partition(".")[2]
        yield key


def _own(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _finite(tensors: list[Tensor]) -> bool:
    """Whether all are finite. A sum shows it at the speed of memory; one that overflows is looked at again."""
    looked = {
        (tensor.data_ptr(), tensor.numel(), tensor.dtype): tensor
        for tensor in tensors
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel()
    }
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in looked.values():
        wide = torch.float32 if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor.dtype
        sums.setdefault(tensor.device, []).append(tensor.sum(dtype=wide).abs().float())
    if all(bool(torch.stack(found).isfinite().all()) for found in sums.values()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in looked.values())


# --- the record -----------------------------------------------------------------------------------------------------


def record(run: Run, bad: int, found: int, **more: Any) -> None:
    """Appends a line to the journal: the step whose samples are meant, where it showed, and what is known of it."""
    line = {"step": bad, "found_at": found, **_epoch(run, bad), "policy": run.settings.nan, **more, **samples(run, bad)}
    run.folder.append_line(JOURNAL, json.dumps(line))


def samples(run: Run, step: int) -> dict[str, Any]:
    """The samples of a step (from 1): indices of the data set, or places in a stream as [epoch, first, stop]."""
    order = run.train_data.order
    if isinstance(order, StreamOrder):
        epoch, first = order.place(step - 1)
        return {"positions": [epoch, first, first + order.samples(step) - order.samples(step - 1)]}
    return {"samples": order.indices(step - 1).tolist()}


def samples_in_words(run: Run, step: int, most: int = 8) -> str:
    """Which samples they are, for a message."""
    found = samples(run, step)
    if "positions" in found:
        epoch, first, stop = found["positions"]
        return f"Samples {first} to {stop - 1} of pass {epoch + 1} through the stream ({JOURNAL})."
    numbers = found["samples"]
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"Samples {', '.join(map(str, numbers[:most]))}{more} ({JOURNAL})."


def passed_over(run: Run) -> set[int]:
    """The steps (from 1) of this run's journal that a rollback passed over, and that are still to come."""
    steps: set[int] = set()
    if run.settings.nan == "rollback" and distributed.rank() == 0:
        path = run.folder.path / JOURNAL
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                told = json.loads(line)
            except ValueError:  # a last line that a crash cut off
                continue
            if told.get("back_to") is not None and told["step"] > run.progress.step:
                steps.add(told["step"])
    found: set[int] = distributed.broadcast(steps)
    return found


def _epoch(run: Run, step: int) -> dict[str, float]:
    """Epochs seen after a step, as training records have it; nothing where the length of one is not known."""
    order = run.train_data.order
    length = order.samples_per_epoch
    return {"epoch": order.samples(step) / length} if math.isfinite(length) else {}


def _norm_of_all(update: Update) -> float | None:
    """The gradient norm, of the process that found it not finite where only one did."""
    here = None if update.grad_norm is None else float(update.grad_norm.item())
    norms = [norm for norm in distributed.gather(here) if norm is not None]
    return next((norm for norm in norms if not math.isfinite(norm)), norms[0] if norms else None)


def _as_json(number: float | None) -> float | str | None:
    """JSON has no word for what is not finite."""
    return number if number is None or math.isfinite(number) else str(number)


# --- words ----------------------------------------------------------------------------------------------------------


def last_good(run: Run) -> str:
    """Which checkpoint is the last good one, as part of a sentence. All processes call it: one in flight counts."""
    saver = run.checkpointer
    if saver is None:
        return "no checkpoint was saved before"
    try:
        run.written += saver.finish()
    except SaveFailed as error:
        _log.warning("%s", error)
    try:
        saved = saver.newest
    except OSError as error:
        return f"no checkpoint can be read ({error.strerror})"
    return f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved before"


def _why(run: Run, spoilt: bool) -> str:
    if run.settings.nan == "stop":
        return "the step changed no weight"
    if run.progress.in_a_row >= MOST_IN_A_ROW:
        return f"it is the {MOST_IN_A_ROW}th such step in a row, so the samples are not to blame"
    return "leaving steps out does not mend them" if spoilt else "the step changed no weight"


def _advice(run: Run, bad: int, found: Collection[str]) -> str:
    """What may help, where `found` is not finite beside the loss or a gradient.

    Weights that are spoilt say nothing of the samples, and leaving steps out does not mend them.
    """
    if _from_the_start(run, found):
        return f"They were so before the first step: they come from {_origin(run)}."
    others = {"stop": "nan=skip or nan=rollback"}.get(run.settings.nan, "")
    if found:
        others = "" if run.settings.nan == "rollback" else "nan=rollback"
    leave_out = f", or leave such steps out with {others}" if others else ""
    if found and not {WEIGHTS, BUFFERS}.intersection(found):
        return f"Look at what writes the state of {' and '.join(found)}{leave_out}."
    if WEIGHTS in found:
        return f"Lower optimizer.lr, set grad_clip{leave_out}."
    words = samples_in_words(run, bad)
    return f"{words} Lower optimizer.lr, set grad_clip, look at those samples{leave_out}."


def _origin(run: Run) -> str:
    """What this process began with, in words."""
    if run.checkpointer is not None and run.checkpointer.loaded is not None:
        return f"the checkpoint {run.checkpointer.loaded}"
    if run.first_step:
        return f"the checkpoint of step {run.first_step}"
    asked = run.config.get("init_from")
    if asked is not None:
        return f"init_from={asked if isinstance(asked, str) else asked['path']}"
    return "the model as it was built"
