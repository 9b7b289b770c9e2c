"""What differs between a run that goes on and the checkpoint it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from runner.assemble import Parts
from runner.checkpoint import extra_of
from runner.errors import InputError, Problem
from runner.launch.worker import WorkPlan
from runner.recipe.redact import redact

log = logging.getLogger("runner")

_BOUND = ("model", "task", "optimizer", "scheduler", "data", "seed", "batch.global_size")
_FREE_DATA = ("num_workers", "reader")


def compare(plan: WorkPlan, parts: Parts, checkpoint: Path) -> None:
    """Raises InputError for configuration that would make the training another one, unless it is in resume_allow.

    Other settings that can change a result are warned of.
    """
    saved = extra_of(checkpoint) or {}
    before, now = saved.get("config", {}), redact(plan.config, plan.written)
    allowed = plan.config["resume_allow"]
    problems = [
        Problem(
            key,
            f"was {old!r} in the run that goes on",
            f"give the old value, allow the change by resume_allow=[{key}], or start a new run without run_dir",
            value=new,
        )
        for bound in _BOUND
        for key, old, new in _differences(bound, _at(before, bound), _at(now, bound))
        if not any(key == word or key.startswith(word + ".") for word in allowed)
        and key.removeprefix("data.") not in _FREE_DATA
    ]
    if problems:
        raise InputError(*problems)
    for name, new in setting(plan, parts).items():
        old = saved.get("setting", {}).get(name, new)
        if new != old:
            log.warning("%s was %s and is %s: results may differ in the last digits", name, old, new)


def setting(plan: WorkPlan, parts: Parts) -> dict[str, Any]:
    """What the training runs on: may differ when it goes on, and is then warned of."""
    return {
        "precision": plan.config["precision"]["name"],
        "device": str(parts.backend.device),
        "torch": torch.__version__,
    }


def _at(config: Any, key: str) -> Any:
    for word in key.split("."):
        config = config.get(word) if isinstance(config, Mapping) else None
    return config


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new
