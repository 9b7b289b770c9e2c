"""The backends by name, imported when one is asked for."""

from __future__ import annotations

import importlib

from runner.engine.backend import Backend

_WHERE = {
    "single": "runner.engine.single:Single",
    "ddp": "runner.engine.ddp:DDP",
    "fsdp": "runner.engine.fsdp:FSDP",
    "deepspeed": "runner.engine.deepspeed:DeepSpeed",
}

NAMES = ("auto", *_WHERE)


def named(name: str, processes: int) -> str:
    """A backend's own name, where it was called `auto`."""
    return name if name != "auto" else "single" if processes == 1 else "ddp"


def backend_class(name: str, processes: int) -> type[Backend]:
    """The adapter of a name; `auto` is single for one process, else ddp."""
    name = named(name, processes)
    module, _, kind = _WHERE[name].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), kind)
    return found
