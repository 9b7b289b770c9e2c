"""G20: saves beside the training: changed meanwhile, failing, killed in flight, one after the other, at the exit."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guarantees.cases_g03 import Box, left
from guarantees.store_children import Child, in_small_pieces, room_for, run_children

KINDS = ("changed", "failing", "killed", "one in flight", "exit waits")


@dataclass(frozen=True)
class Case:
    number: int
    kind: str
    world: int
    #: Where in the save, from 0 to 1.
    place: float

    def __str__(self) -> str:
        return f"{self.number}: {self.kind}, {self.world} processes, at {self.place:.2f}"


def cases(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        found.append(Case(number, KINDS[number % len(KINDS)], 1 + number // len(KINDS) % 2, rng.random()))
    return found


def run(case: Case, folder: Path) -> str | None:
    place = folder / "checkpoints"
    kills = case.kind == "killed"
    codes, said = run_children(
        "guarantees.cases_g20:save_beside",
        [str(place), case.kind, case.place],
        world=case.world,
        kill=range(case.world) if kills else (),
        delay=case.place * 0.05 if kills else None,
    )
    wrong = [words["wrong"] for words in said if "wrong" in words]
    errors = [words["error"] for words in said if "error" in words]
    if wrong or errors or any(code != (-signal.SIGKILL if kills else 0) for code in codes):
        return f"{wrong}, {errors}, {codes}"
    known = max((words["saved"] for words in said if "saved" in words), default=0)
    if known < {"changed": 3, "failing": 3, "killed": 2, "one in flight": 3}.get(case.kind, 1):
        return f"it ended early: {said}"
    if case.kind == "exit waits":
        known = 2
    return left(place, known)


def save_beside(child: Child, place: str, kind: str, where: float) -> None:
    from runner.checkpoint import Checkpointer

    in_small_pieces(65_536)
    box = Box(1)
    saver = Checkpointer(Path(place), {"box": box})
    saver.save(1, {"step": 1})
    child.say(saved=1)
    globals()[f"_{kind.replace(' ', '_')}"](child, saver, box, where)


def _published(child: Child, saver: Any, steps: list[int]) -> None:
    """What is told as published is durable, complete and there, and told once."""
    from runner.checkpoint import store

    found = saver.finish()
    if steps != [store.step_of(path) for path in found] or saver.finish() or saver.poll():
        child.say(wrong=f"{steps} should be told, {found} were")
    child.say(saved=steps[-1])


def _changed(child: Child, saver: Any, box: Box, where: float) -> None:
    """Parameters are changed right after the call, in place and by another tensor."""
    for step in (2, 3):
        slowly(where / 5)
        box.fill(step)
        if saver.save(step, {"step": step}, wait=False) is not None:
            child.say(wrong="it waited")
        box.state["number"] = -1
        for name in list(box.state):
            if name != "number":
                box.state[name].fill_(-1)
        _published(child, saver, [step])


def _failing(child: Child, saver: Any, box: Box, where: float) -> None:
    """The writer fails somewhere: nothing is published, it is said at the next look, and the next save is well."""
    from runner import distributed
    from runner.checkpoint import SaveFailed

    # Replicated tensors are written by the first process: it fails, and the others hear of it.
    with room_for(int(where * 900_000)):
        box.fill(2)
        saver.save(2, {"step": 2}, wait=False)
        until = time.monotonic() + 20
        while not saver.failed and time.monotonic() < until:
            if distributed.world_size() > 1 and saver.poll():
                child.say(wrong="something was published")
            time.sleep(0.001)
        if not saver.failed:
            child.say(wrong="nothing failed")
    try:
        saver.poll() if distributed.world_size() == 1 else saver.finish()
        child.say(wrong="the failure was not raised")
    except SaveFailed as error:
        if error.errno != errno.ENOSPC or saver.failed:
            child.say(wrong=f"{error!r}, failed is {saver.failed}")
    if distributed.rank() == 0 and sorted(os.listdir(saver._folder)) != ["step_00000001"]:
        child.say(wrong=f"left: {os.listdir(saver._folder)}")
    distributed.barrier()
    box.fill(3)
    saver.save(3, {"step": 3}, wait=False)
    _published(child, saver, [3])


def _killed(child: Child, saver: Any, box: Box, where: float) -> None:
    """Until somebody kills it; one save beside the training has been published by then."""
    del where
    from runner.checkpoint import store

    box.fill(2)
    saver.save(2, {"step": 2}, wait=False)
    box.fill(-1)
    _published(child, saver, [2])
    child.say(armed=True)
    for step in range(3, 10_000):
        box.fill(step)
        saver.save(step, {"step": step}, wait=False)
        box.fill(-1)
        for path in saver.poll():
            child.say(saved=store.step_of(path))


def _one_in_flight(child: Child, saver: Any, box: Box, where: float) -> None:
    """A second save that is due meanwhile waits for the first, and both are told in their order."""
    import threading

    from runner.checkpoint import storage

    written, running, most = storage._write_file, [0], [0]

    def counted(*arguments: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(where / 5)
        try:
            return written(*arguments)
        finally:
            running[0] -= 1

    storage._write_file = counted
    for step in (2, 3):
        box.fill(step)
        saver.save(step, {"step": step}, wait=False)
    box.fill(-1)
    beside = [thread for thread in threading.enumerate() if thread.name.startswith("save-")]
    if most[0] > 1 or len(beside) > 1:
        child.say(wrong=f"{most[0]} at a time, {beside}")
    _published(child, saver, [2, 3])


def _exit_waits(child: Child, saver: Any, box: Box, where: float) -> None:
    """The program ends while the save is going on, and asks for nothing."""
    del child
    slowly(where / 5)
    box.fill(2)
    saver.save(2, {"step": 2}, wait=False)
    box.fill(-1)


def slowly(seconds: float) -> None:
    """The writer waits before it begins, so that it is late for sure."""
    from runner.checkpoint import storage

    written = storage._write_file

    def late(*arguments: Any) -> Any:
        time.sleep(seconds)
        return written(*arguments)

    storage._write_file = late
