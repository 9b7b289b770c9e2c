"""G3: a process is killed within a save, a commit or a prune; what is left is looked at."""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guarantees.store_children import Child, in_small_pieces, run_children


@dataclass(frozen=True)
class Case:
    """`at` is the how-manieth small thing done on the disk before which rank `victim` kills itself, or seconds."""

    number: int
    world: int
    victim: int
    at: int | float
    waits: bool
    again: bool

    def __str__(self) -> str:
        when = f"event {self.at}" if isinstance(self.at, int) else f"{self.at * 1000:.1f} ms"
        words = ["waits" if self.waits else "beside", *(["same step again"] if self.again else [])]
        return f"{self.number}: rank {self.victim} of {self.world}, {when}, {', '.join(words)}"


def cases(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        world = 2 if number % 5 == 4 else 1
        at = rng.randrange(60) if number % 3 else rng.uniform(0, 0.06)
        found.append(Case(number, world, rng.randrange(world), at, rng.random() < 0.5, rng.random() < 0.2))
    return found


def run(case: Case, folder: Path) -> str | None:
    place = folder / "checkpoints"
    timed = isinstance(case.at, float)
    event = None if timed else [case.victim, case.at]
    codes, said = run_children(
        "guarantees.cases_g03:save_and_die",
        [str(place), event, case.waits, case.again],
        world=case.world,
        kill=[case.victim],
        delay=float(case.at) if timed else None,
    )
    errors = [words["error"] for words in said if "error" in words and words["rank"] == case.victim]
    if errors:
        return f"the child failed before it was killed: {errors[0]} ({codes})"
    if codes[case.victim] != -signal.SIGKILL:
        return f"it was not killed: {codes}"
    return left(place, max((words["saved"] for words in said if "saved" in words), default=0))


def left(place: Path, known: int) -> str | None:
    """What is wrong with what a killed process left; `known` is the last step that it had said to be saved."""
    from runner.checkpoint import Checkpointer, store
    from runner.checkpoint.manifest import Manifest
    from runner.checkpoint.verify import verify
    from runner.errors import RunnerError

    if not known and not place.exists():
        return None
    try:
        for path in store.candidates(place):
            verify(path, Manifest.read(path))
    except RunnerError as error:
        return f"a torn one is visible: {error}"
    try:
        newest = store.latest(place)
    except RunnerError as error:
        return f"none is taken: {error}"
    seen = 0 if newest is None else store.step_of(newest)
    if seen < known:
        return f"step {known} was said to be saved, and {newest} is the newest"
    if len(store.candidates(place)) < min(known, 2):
        return f"after step {known} only {sorted(path.name for path in place.iterdir())} are there"
    box = Box(0)
    loader = Checkpointer(place, {"box": box})
    litter = [path.name for path in place.iterdir() if path.name.startswith(".")] if place.exists() else []
    if litter:
        return f"not swept: {litter}"
    for path in store.candidates(place):
        box.fill(0)
        if loader.load(path) != {"step": store.step_of(path)} or not box.holds(store.step_of(path)):
            return f"{path.name} holds something else"
    return None


class Box:
    """Tensors that all hold one number, and the number; where it is `shared`, one of which each process has a row."""

    def __init__(self, number: int, *, shared: bool = False) -> None:
        self._shared = shared
        self.fill(number)

    def fill(self, number: int) -> None:
        import torch

        self.state: dict[str, Any] = {f"t{i}": torch.full((40_000 * i + 3,), float(number)) for i in range(4)}
        if self._shared:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.tensor import DTensor, Shard

            row, mesh = torch.full((1, 60_000), float(number)), init_device_mesh("cpu", (2,))
            self.state["rows"] = DTensor.from_local(row, mesh, [Shard(0)], run_check=False)
        self.state["number"] = number

    def holds(self, number: int) -> bool:
        tensors = [value for name, value in self.state.items() if name != "number"]
        return (
            len(tensors) >= 4
            and self.state["number"] == number
            and all(bool((tensor == number).all()) for tensor in tensors)
        )

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def save_and_die(child: Child, place: str, event: list[int] | None, waits: bool, again: bool) -> None:
    from runner.checkpoint import Checkpointer, store

    in_small_pieces(65_536)
    box = Box(0, shared=child.world > 1)
    saver = Checkpointer(Path(place), {"box": box}, keep=2)
    for step in range(1, 200):
        if step == 4:
            child.say(armed=True)
            if event is not None and event[0] == child.rank:
                die_before(event[1])
        for _ in range(2 if again else 1):
            box.fill(step)
            done = saver.save(step, {"step": step}, wait=waits)
            published = saver.finish() if done is None else [done]
            child.say(saved=store.step_of(published[-1]))


def die_before(number: int) -> None:
    """Kills this process before its how-manieth next step on the disk: open, write, sync, rename, remove, mkdir."""
    from runner.checkpoint import store, synced

    remaining = [number]

    def count() -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(name: str, _arguments: Any) -> None:
        if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            count()

    def before(function: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            count()
            return function(*arguments)

        return counted

    sys.addaudithook(hear)
    synced.os = type("counted", (), {**vars(os), "fsync": staticmethod(before(os.fsync))})  # type: ignore[attr-defined]
    synced.Written._out = before(synced.Written._out)  # type: ignore[method-assign]
    store.exchange = before(store.exchange)
