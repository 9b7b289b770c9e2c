"""G5: a disk that does not take a checkpoint, on one rank or all, at some byte, whether the training waits or not."""

from __future__ import annotations

import errno
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guarantees.store_children import Child, in_small_pieces, room_for, run_children

#: How the disk refuses: no file may be longer (the kernel's limit), or the n-th byte is answered with an error.
KINDS = ("limit", "ENOSPC", "EDQUOT", "EIO", "EROFS", "vanished", "lying")
#: Bytes that one of the two processes has to write, at least.
_EACH = 60_000


@dataclass(frozen=True)
class Case:
    number: int
    kind: str
    victims: tuple[int, ...]
    waits: bool
    byte: int

    def __str__(self) -> str:
        whom = "all ranks" if len(self.victims) > 1 else f"rank {self.victims[0]}"
        return f"{self.number}: {self.kind} at byte {self.byte} on {whom}, {'waits' if self.waits else 'beside'}"


def cases(count: int, seed: int) -> list[Case]:
    """For each byte count: one rank and all of them, waiting and beside. The kernel's limit is every other of them."""
    rng = random.Random(seed)
    found: list[Case] = []
    while len(found) < count:
        place = len(found) // 4
        kind = KINDS[0] if place % 2 == 0 else KINDS[1 + place // 2 % (len(KINDS) - 1)]
        byte = rng.randrange(_EACH)
        for victims in ((rng.randrange(2),), (0, 1)):
            found += [Case(len(found) + more, kind, victims, bool(more), byte) for more in (0, 1)]
    return found[:count]


def run(case: Case, folder: Path) -> str | None:
    from runner.checkpoint import store

    place = folder / "checkpoints"
    codes, said = run_children(
        "guarantees.cases_g05:save_on_a_full_disk",
        [str(place), case.kind, case.victims, case.waits, case.byte],
        world=2,
    )
    if codes != [0, 0] or any("error" in words for words in said):
        return f"{codes}, {said}"
    failures = [words for words in said if "failed" in words]
    if len(failures) != 2 or failures[0]["failed"] != failures[1]["failed"]:
        return f"not the same failure on both ranks: {said}"
    for words in failures:
        if "step_00000002" not in words["failed"] or not words["needed"] or words["needed"] < 2 * _EACH:
            return f"the message does not say what is needed where: {words}"
        if words["free"] is None or f"{words['free']:,} are free" not in words["failed"]:
            return f"the message does not say what is free: {words}"
        if case.kind != "vanished" and words["names"] != ["step_00000001"]:
            return f"after the failure there are {words['names']}"
        if case.kind != "vanished" and words["last"] != "step_00000001":
            return f"the last good one is {words['last']}"
    if case.kind == "vanished":
        return None
    newest = store.latest(place)
    if newest is None or newest.name != "step_00000003" or len(store.candidates(place)) != 2:
        return f"when there was room again, {newest} was the newest"
    return None


class Shares:
    """A tensor of which each process holds its rows, and one that all hold alike."""

    def __init__(self) -> None:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        rows = distribute_tensor(torch.arange(_EACH // 2, dtype=torch.float32).view(2, -1), mesh, [Shard(0)])
        self.state: dict[str, Any] = {"rows": rows, "same": torch.ones(100)}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def save_on_a_full_disk(child: Child, place: str, kind: str, victims: list[int], waits: bool, byte: int) -> None:
    from runner import distributed
    from runner.checkpoint import Checkpointer, SaveFailed

    in_small_pieces(8192)
    folder = Path(place)
    saver = Checkpointer(folder, {"shares": Shares()})
    saver.save(1)
    distributed.barrier()
    with full(kind, byte, folder) if child.rank in victims else _all_is_well():
        try:
            saver.save(2, wait=waits)
            saver.finish()
        except SaveFailed as error:
            there = folder.exists()
            last = saver.latest() if there else None
            names = sorted(path.name for path in folder.iterdir()) if there else []
            child.say(
                failed=str(error),
                needed=error.needed,
                free=error.free,
                names=names,
                last=None if last is None else last.name,
            )
    distributed.barrier()
    if kind != "vanished":
        saver.save(3, wait=waits)
        saver.finish()
    distributed.barrier()


@contextmanager
def _all_is_well() -> Iterator[None]:
    yield


@contextmanager
def full(kind: str, byte: int, folder: Path) -> Iterator[None]:
    """A disk that refuses, for this process."""
    from runner.checkpoint import storage

    if kind == "limit":
        # Python ignores the signal that comes with it.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    if kind == "vanished":
        with room_for(byte, errno.ENOENT, lambda: shutil.rmtree(folder, ignore_errors=True)):
            yield
    elif kind == "lying":
        # A file system that says beforehand that there is not enough, on the rank that asks it; the other's is full.
        before = storage.free_bytes
        storage.free_bytes = lambda place: byte
        with room_for(byte):
            yield
        storage.free_bytes = before
    else:
        with room_for(byte, getattr(errno, kind)):
            yield
