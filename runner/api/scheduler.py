"""A prepared scheduler: its unit is the optimizer step that was really taken, whatever processes and accumulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from runner.api.optimizer import PreparedOptimizer


class PreparedScheduler:
    """Wraps a user's scheduler; everything but `step` is that scheduler's own.

    `step` may be called with every micro-batch. It moves the scheduler when gradients are synchronised, unless all
    optimizer steps since it last did were skipped. A scheduler of a metric (ReduceLROnPlateau) moves at every call.
    """

    def __init__(
        self,
        scheduler: Any,
        optimizers: Sequence[PreparedOptimizer],
        synchronised: Callable[[], bool],
        *,
        tied: bool = True,
        repeat: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self._optimizers = list(optimizers)
        self._synchronised = synchronised
        self._tied = tied and not isinstance(scheduler, ReduceLROnPlateau)
        self._repeat = repeat if self._tied else 1
        self._seen = self._counts()

    def _counts(self) -> tuple[int, int]:
        return sum(one.taken for one in self._optimizers), sum(one.skipped for one in self._optimizers)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Moves the scheduler by the optimizer step that was just taken."""
        if self._tied:
            if not self._synchronised():
                return
            (taken, skipped), self._seen = self._seen, self._counts()
            if self._seen[0] == taken and self._seen[1] > skipped:
                return
        for _ in range(self._repeat):
            total = getattr(self.scheduler, "total_steps", None)
            # A schedule of a fixed length refuses to be moved beyond its end.
            if self._repeat == 1 or total is None or self.scheduler.last_epoch + 1 < total:
                self.scheduler.step(*args, **kwargs)

    def settle(self) -> None:
        """Counts anew from here, after a state was loaded."""
        self._seen = self._counts()

    def get_last_lr(self) -> list[float]:
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        plain = {"_optimizers": [], "_synchronised": _always, "_tied": False, "_repeat": 1, "_seen": (0, 0)}
        self.__dict__.update({**plain, **state})


def _always() -> bool:
    return True
