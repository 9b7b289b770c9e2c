"""Checks of several lines of SEMANTICS.md in one start of the processes, each told to the test named after it."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks

from contract.training import trained
from runner import distributed

HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="deepspeed is not installed")

#: So that stage 3 divides small parameters too, and steps them in several rounds.
ZERO3 = str(Path(__file__).with_name("zero3.json"))

#: What `Engine(backend=...)` takes, by the name that a test has in its parameters.
BACKENDS: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": {"name": "fsdp", "min_parameters": 20},
    "fsdp_keep": {"name": "fsdp", "min_parameters": 20, "reshard_after_forward": False},
    "hsdp": {"name": "fsdp", "replicas": 2},
    **{f"zero{stage}": {"name": "deepspeed", "stage": stage} for stage in range(3)},
    "zero3": {"name": "deepspeed", "stage": 3, "config_file": ZERO3},
}


def trained_on(name: str, accumulation: int = 1, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """`trained` with a backend by its name here."""
    changes = dict(changes or {})
    if name == "zero3":
        changes["options"] = {"config_file": ZERO3}
    return trained(name.replace("zero", "deepspeed-z"), accumulation, changes)


def backends(*names: str) -> Any:
    """A parameter `backend` of a test, with DeepSpeed's skipped where it is not installed."""
    marks = [pytest.param(name, marks=needs_deepspeed if name.startswith("zero") else ()) for name in names]
    return pytest.mark.parametrize("backend", marks)


Check = tuple[Callable[..., Any], tuple[Any, ...]]


class Together:
    """Checks that one start of `world` processes makes, one after the other.

    `add(function, *arguments)` before the first result is asked for; `together(function, *arguments)` then gives what
    the function returned on each rank, or raises what it raised there.
    """

    def __init__(self, world: int, timeout: float = 240.0) -> None:
        self._world, self._timeout = world, timeout
        self._checks: list[Check] = []
        self._found: list[dict[Any, Any]] | None = None
        self._failed: BaseException | None = None

    def add(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        if not HAVE_DEEPSPEED and any(str(a).startswith("zero") for a in arguments):
            return function
        self._checks.append((function, arguments))
        return function

    def each(self, *backends: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: the function is called with each of these names."""

        def added(function: Callable[..., Any]) -> Callable[..., Any]:
            for name in backends:
                self.add(function, name)
            return function

        return added

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if self._failed is not None:
            raise self._failed
        if self._found is None:
            names = [(f.__module__, f.__name__, arguments) for f, arguments in self._checks]
            try:
                self._found = run_ranks(perform, self._world, names, timeout=self._timeout)
            except BaseException as error:
                self._failed = error
                raise
        results = [rank[function.__name__, arguments] for rank in self._found]
        errors = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(results) if text is not None]
        assert not errors, "\n".join(errors)
        return [value for _, value in results]


def perform(names: list[tuple[str, str, tuple[Any, ...]]]) -> dict[Any, tuple[str | None, Any]]:
    """(traceback or None, result) of each check. Ends where ranks no longer stand at the same check."""
    import torch
    import torch.distributed as dist

    store: Any = dist.PrefixStore("checks", dist.distributed_c10d._get_default_store())
    rank, world = distributed.rank(), distributed.world_size()
    found: dict[Any, tuple[str | None, Any]] = {}
    for number, (module, name, arguments) in enumerate(names):
        torch.manual_seed(0)
        try:
            found[name, arguments] = (None, getattr(importlib.import_module(module), name)(*arguments))
        except BaseException:
            found[name, arguments] = (traceback.format_exc(), None)
        store.set(f"{number}/{rank}", "done")
        if found[name, arguments][0] is not None:
            try:
                store.wait([f"{number}/{other}" for other in range(world)], timedelta(seconds=10))
            except RuntimeError:
                raise AssertionError(f"{name}{arguments}: {found[name, arguments][0]}") from None
    return found
