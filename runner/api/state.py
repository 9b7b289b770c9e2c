"""The state of a whole loop: what `save_state` writes through the one checkpoint store, and `load_state` reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from runner.api.tracking import Records
from runner.checkpoint import Checkpointer, RandomState, find, latest
from runner.engine.model_state import ModelState, OptimizerState
from runner.errors import InputError, RunnerError, wrong
from runner.train.schedules import Schedule

_log = logging.getLogger("runner")


class Held:
    """Everything with state that an engine knows, under the names it has in a checkpoint."""

    def __init__(self) -> None:
        self.models: list[ModelState] = []
        self.optimizers: list[OptimizerState] = []
        self.schedulers: list[Schedule] = []
        self.loaders: list[Any] = []
        self.custom: list[Any] = []
        self.records = Records()

    def named(self, scaler: Any) -> dict[str, Any]:
        """In the order in which they are loaded: random states last."""
        kinds: dict[str, Sequence[Any]] = {
            "model": self.models,
            "optimizer": self.optimizers,
            "scheduler": self.schedulers,
            "loader": self.loaders,
            "custom": self.custom,
        }
        state = {f"{kind}_{number}": item for kind, items in kinds.items() for number, item in enumerate(items)}
        state |= {"scaler": scaler} if scaler is not None else {}
        return {**state, "records": self.records, "random": RandomState()}


def optimizer_state(models: Sequence[nn.Module], optimizer: Any) -> OptimizerState:
    """An optimizer's state by the names of its model's parameters, or of all its models' in their order."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owners = [model for model in models if any(id(p) in own for p in model.parameters())]
    return OptimizerState(owners[0] if len(owners) == 1 else nn.ModuleList(owners), optimizer)


def check_custom(objects: Sequence[Any]) -> None:
    """Raises InputError, naming them, for objects that cannot be saved."""
    lacking = [
        type(item).__name__
        for item in objects
        if not callable(getattr(item, "state_dict", None)) or not callable(getattr(item, "load_state_dict", None))
    ]
    if lacking:
        why = f"{', '.join(lacking)} cannot be saved: it takes state_dict() and load_state_dict(state)"
        raise wrong("register_for_checkpointing", why, "give objects that have both")


def warn_of_window(micro_batches: int) -> None:
    """Says that a state is saved whose gradients are lost."""
    _log.warning(
        "save_state: in the middle of an accumulation window; the gradients of its first %d micro-batches are not "
        "saved, and these count for nothing after load_state: save where engine.sync_gradients is true",
        micro_batches,
    )


def save(folder: Path, state: Mapping[str, Any], step: int, keep: int) -> Path:
    """A checkpoint in `folder`, verified and complete when it appears."""
    return Checkpointer(folder, state, keep).save(step)


def load(folder: Path, state: Mapping[str, Any]) -> Path:
    """Loads the latest checkpoint of `folder`, or the one that it is."""
    path = _latest(folder) or find(folder, "load_state")
    Checkpointer(path.parent, state, optional=["records", "buckets"], reads_only=True).load(path, convert=True)
    return path


def _latest(folder: Path) -> Path | None:
    """The latest checkpoint inside: first, because a user's folder may itself be called step_100."""
    try:
        return latest(folder)
    except InputError:
        raise
    except RunnerError:
        return None
