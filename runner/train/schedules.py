"""Learning-rate schedules by the optimizer step, and the stepping of any of torch's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from runner.errors import wrong


def linear(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> LambdaLR:
    """Linear warm-up from 0, then linear decay to `final` times the learning rate at the last step.

    Args:
        total_steps: length of the run, given by the runner.
        warmup: steps where >= 1, a fraction of the run where < 1.
        final: factor reached at the end.
    """
    return _warm(optimizer, total_steps, warmup, lambda done: 1.0 - (1.0 - final) * done)


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> LambdaLR:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter, "SGDR", 2017) down to `final`; arguments as linear."""
    return _warm(optimizer, total_steps, warmup, lambda done: final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def constant(optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> LambdaLR:
    """Linear warm-up, then the learning rate as it is; arguments as linear."""
    return _warm(optimizer, total_steps, warmup, lambda done: 1.0)


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of a warm-up: as they are from 1 on, below 1 a fraction of the run. Raises InputError where too long."""
    steps = round(warmup * total) if warmup < 1 else round(warmup)
    if steps > total:
        why = f"the warm-up of {steps} steps is longer than the run of {total}"
        raise wrong("scheduler.warmup", why, "give a smaller number of steps, or a fraction below 1", value=warmup)
    return steps


def _warm(optimizer: Optimizer, total: int, warmup: float, decay: Callable[[float], float]) -> LambdaLR:
    steps = warmup_steps(warmup, total)

    def factor(step: int) -> float:
        if step < steps:
            return (step + 1) / (steps + 1)
        return decay(min(1.0, (step - steps) / max(1, total - steps)))

    return LambdaLR(optimizer, factor)


class Schedule:
    """Moves a scheduler once an optimizer step that was not skipped; a metric scheduler once an evaluation.

    `length` are the steps of the run, where the scheduler may have been made for so many.
    """

    def __init__(self, scheduler: LRScheduler | None, metric: str = "loss", length: int | None = None) -> None:
        self._scheduler = scheduler
        self._length = length
        self._metric = metric
        by_metric = isinstance(scheduler, ReduceLROnPlateau)
        self.step: Callable[[], Any] = _nothing if scheduler is None or by_metric else scheduler.step
        # A copy: lists in it are those that the scheduler goes on with.
        self._configured = {} if scheduler is None else deepcopy(_plain(scheduler.state_dict()))
        self._plateau = scheduler if isinstance(scheduler, ReduceLROnPlateau) else None
        self._first = [] if scheduler is None else [group["lr"] for group in scheduler.optimizer.param_groups]
        #: Whether the checkpoint that was loaded knew nothing of such a schedule.
        self._new = False

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Tells a metric scheduler of an evaluation. Raises InputError where its metric is not there."""
        if self._plateau is None:
            return
        if self._metric not in metrics:
            there = ", ".join(name for name in metrics if name != "samples")
            raise wrong("scheduler.monitor", "no evaluation reports it", f"choose of {there}", value=self._metric)
        self._plateau.step(metrics[self._metric])

    def state_dict(self) -> dict[str, Any]:
        """What the scheduler holds now, and what it held as configured: options that change are not carried over."""
        if self._scheduler is None:
            return {}
        known = {"configured": self._configured, "kind": self._kind, "length": self._length}
        return {"now": _plain(self._scheduler.state_dict()), **known}

    @property
    def _kind(self) -> str:
        return type(self._scheduler).__name__

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what was saved, but for what the configuration now sets otherwise.

        Where the run has another length, and options follow from it, the rate is the one to which the same number of
        steps would have led with the new ones: torch's schedulers go on from the rate before, which is on the old
        curve, and at its end is 0.
        """
        scheduler = self._scheduler
        self._new = scheduler is not None and (not state or state.get("kind", self._kind) != self._kind)
        if scheduler is None or self._new:
            return
        other_length = self._plateau is None and state.get("length") not in (None, self._length)
        if other_length and not isinstance(scheduler, LambdaLR) and _changed(self._configured, state["configured"]):
            self._go_to(scheduler, _steps(state["now"]))
            return
        live = scheduler.state_dict()
        scheduler.load_state_dict(_merged(live, self._configured, state["configured"], state["now"]))
        if isinstance(scheduler, LambdaLR):
            # Rates are computed from the configured base, so that a learning rate changed on purpose applies.
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(scheduler.last_epoch)

    def catch_up(self, steps: int) -> None:
        """After loading: a schedule of another kind than the saved one stands where so many steps would have led it."""
        scheduler = self._scheduler
        if scheduler is None or not self._new:
            return
        self._new = False
        self._go_to(scheduler, steps)

    def _go_to(self, scheduler: LRScheduler, steps: int) -> None:
        """Takes so many steps from the first rate on."""
        for group, rate in zip(scheduler.optimizer.param_groups, self._first, strict=True):
            group["lr"] = rate
        if self._plateau is not None:
            return
        # Within a run, in a rollback, it has moved already.
        fresh = deepcopy(self._configured)
        scheduler.load_state_dict(_merged(scheduler.state_dict(), fresh, fresh, fresh))
        with warnings.catch_warnings():
            # That it moves before the optimizer does.
            warnings.simplefilter("ignore", UserWarning)
            if isinstance(scheduler, LambdaLR):
                scheduler.last_epoch = max(0, steps - 1)
                steps = min(steps, 1)
            for _ in range(steps):
                scheduler.step()


_INSIDE = "_schedulers"  # of SequentialLR and ChainedScheduler


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state can be written down, also in those of schedulers inside it; code makes the rest."""
    found = {key: value for key, value in state.items() if _is_plain(value)}
    if _INSIDE in state:
        found[_INSIDE] = [_plain(inner) for inner in state[_INSIDE]]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _changed(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    """Whether options of a scheduler, or of those inside it, differ; rates are the optimizer's options."""
    inside, before = now.get(_INSIDE, []), then.get(_INSIDE, [])
    if len(inside) != len(before) or any(map(_changed, inside, before)):
        return True
    keys = (now.keys() & then.keys()) - {_INSIDE, "base_lrs", "_last_lr"}
    return any(now[key] != then[key] for key in keys)


def _steps(state: Mapping[str, Any]) -> int:
    """How many steps a scheduler had taken. One that chains others counts none itself."""
    return int(state["last_epoch"]) if "last_epoch" in state else _steps(state[_INSIDE][0])


def _merged(
    live: Mapping[str, Any], now: Mapping[str, Any], then: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """A scheduler's state: `saved` where the configuration is the same `now` as `then`, else what is `live`."""
    merged = dict(live)
    merged |= {key: value for key, value in saved.items() if key in now and key in then and now[key] == then[key]}
    if _INSIDE in live and len(live[_INSIDE]) == len(saved.get(_INSIDE, ())):
        parts = zip(live[_INSIDE], now[_INSIDE], then[_INSIDE], saved[_INSIDE], strict=True)
        merged[_INSIDE] = [_merged(*part) for part in parts]
    return merged


def _nothing() -> None:
    return None
