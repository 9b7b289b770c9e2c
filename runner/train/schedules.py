"""Learning-rate schedules by the optimizer step, and the stepping of any of torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    """Moves a scheduler once an optimizer step that was not skipped; a metric scheduler once an evaluation."""

    def __init__(self, scheduler: LRScheduler | None, metric: str = "loss") -> None:
        self._scheduler = scheduler
        self._metric = metric
        by_metric = isinstance(scheduler, ReduceLROnPlateau)
        self.step: Callable[[], Any] = _nothing if scheduler is None or by_metric else scheduler.step
        self._plateau = scheduler if isinstance(scheduler, ReduceLROnPlateau) else None

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Tells a metric scheduler of an evaluation. Raises InputError where its metric is not there."""
        if self._plateau is None:
            return
        if self._metric not in metrics:
            raise wrong(
                "scheduler.monitor", "no evaluation reports it", f"choose of {', '.join(metrics)}", value=self._metric
            )
        self._plateau.step(metrics[self._metric])

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's counters; base rates and options stay the configuration's."""
        return {} if self._scheduler is None else _counters(self._scheduler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        scheduler = self._scheduler
        if scheduler is None or not state:
            return
        scheduler.load_state_dict(_with_counters(scheduler.state_dict(), state))
        if isinstance(scheduler, LambdaLR):
            # Rates are computed from the configured base, so that a learning rate changed on purpose applies.
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(scheduler.last_epoch)


def _counters(state: Mapping[str, Any]) -> dict[str, Any]:
    """What moves in a scheduler's state, also in those of schedulers inside it (SequentialLR, ChainedScheduler)."""
    moving = {key: value for key, value in state.items() if key in _COUNTERS}
    if "_schedulers" in state:
        moving["_schedulers"] = [_counters(inner) for inner in state["_schedulers"]]
    return moving


def _with_counters(state: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**state, **{key: value for key, value in saved.items() if key != "_schedulers"}}
    if "_schedulers" in saved:
        pairs = zip(state["_schedulers"], saved["_schedulers"], strict=True)
        merged["_schedulers"] = [_with_counters(inner, counters) for inner, counters in pairs]
    return merged


_COUNTERS = frozenset({"last_epoch", "_step_count", "best", "num_bad_epochs", "cooldown_counter"})


def _nothing() -> None:
    return None
