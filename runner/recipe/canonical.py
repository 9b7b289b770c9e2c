"""`determinism: canonical` in a configuration: the shards of a step, and what cannot go with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: No more shards than this: each is a forward and backward of its own.
MOST_SHARDS = 8

#: (key, why, fix, value) of a problem.
Found = tuple[str, str, str, Any]

_KEY = "determinism"


def shards(global_size: int) -> int:
    """Into how many micro-batches a step is cut, over all processes: the largest power of two that divides it."""
    return min(global_size & -global_size, MOST_SHARDS)


def settle(config: dict[str, Any], world: int) -> Iterator[Found]:
    """Fills in what follows from `determinism: canonical` and tells what contradicts it.

    The shards follow from batch.global_size alone, so that no number of processes changes them.
    """
    yield from _elsewhere(config)
    launch = config.get("launch")
    if isinstance(launch, dict):
        if launch.get("threads") not in (None, 1):
            why = "determinism=canonical computes with one thread: another number adds up in another order"
            yield "launch.threads", why, "leave it out", launch["threads"]
        else:
            launch["threads"] = 1
    batch, accumulation = config.get("batch"), config.get("accumulation")
    if not isinstance(batch, dict) or not isinstance(accumulation, dict):
        return
    size = batch.get("global_size")
    if type(size) is int and size > 0:
        yield from _batch(batch, accumulation, size, world)


def _elsewhere(config: dict[str, Any]) -> Iterator[Found]:
    backend = config.get("backend")
    name = backend.get("name") if isinstance(backend, dict) else None
    if name in ("fsdp", "deepspeed"):
        why = f"works on the backends single and ddp: {name} adds up gradients in an order of its own"
        yield _KEY, why, "backend=auto, or leave determinism out", "canonical"
    if config.get("compile"):
        why = "does not go with compile: what the compiler makes depends on the batches that it has seen"
        yield _KEY, why, "compile=false, or leave determinism out", "canonical"


def _batch(batch: dict[str, Any], accumulation: dict[str, Any], size: int, world: int) -> Iterator[Found]:
    count = shards(size)
    micro, steps = batch.get("micro_size"), accumulation.get("steps")
    if any(type(value) is not int for value in (micro, steps) if value not in (None, "auto")):
        return  # told already
    if count % world:
        fewer = max(n for n in (1, 2, 4, 8) if n <= min(count, world))
        why = f"cuts batch.global_size={size} into {count} shards, which {world} processes cannot share"
        fix = f"launch.nproc_per_node={fewer}" + _larger(size, count, world)
        yield _KEY, why, fix, "canonical"
        return
    if micro not in (None, size // count):
        why = f"is {size // count} with determinism=canonical: batch.global_size={size} in {count} shards"
        yield "batch.micro_size", why, "leave it out", micro
    elif steps not in (None, count // world):
        why = f"is {count // world} with determinism=canonical: {count} shards on {world} process{'es' * (world > 1)}"
        yield "accumulation.steps", why, "leave it out", steps
    else:
        batch["micro_size"], accumulation["steps"] = size // count, count // world


def _larger(size: int, count: int, world: int) -> str:
    """What else would do: a global size that so many processes can share."""
    if world > MOST_SHARDS or world & (world - 1):
        return ""
    near = sorted({max(world, size - size % world), size + -size % world})
    return "; or, another training, " + " or ".join(f"batch.global_size={value}" for value in near)
