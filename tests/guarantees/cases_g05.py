"""G5: a disk that does not take a checkpoint, on one rank or all, at some byte or call, waiting for it or beside it."""

from __future__ import annotations

import errno
import itertools
import random
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guarantees.store_children import Child, in_small_pieces, refusing, room_for, run_children

#: How the disk refuses: no file may be longer (the kernel's limit), or the n-th byte is answered with an error; it goes
#: away, or says beforehand that there is no room; or it refuses a kind of call.
BYTES = ("ENOSPC", "EDQUOT", "EIO", "EROFS")
CALLS = {"fsync": "EIO", "open": "ENOSPC", "mkdir": "ENOSPC", "rename": "EROFS"}
KINDS = ("limit", *BYTES, "vanished", "lying", *CALLS)
TENSORS, STATE, MANIFEST = "tensors", "state.json", "manifest.json"
#: Bytes that one of the two processes has to write, at least, and those of the text in state.json: it is the largest
#: file, so that the kernel's limit can hit it.
_EACH, _TEXT = 60_000, 90_000


@dataclass(frozen=True)
class Case:
    """Bytes run out at `part` of a file (each process's own of tensors), or the `call`-th call is refused."""

    number: int
    kind: str
    victims: tuple[int, ...]
    waits: bool
    file: str
    part: float
    call: int = 0
    #: The checkpoint that is there is saved again, on a file system that can exchange two names, or cannot.
    again: bool = False
    exchanges: bool = True

    def __str__(self) -> str:
        whom = "all ranks" if len(self.victims) > 1 else f"rank {self.victims[0]}"
        where = f"call {self.call}" if self.kind in CALLS else f"{self.part:.3f} of {self.file}"
        more = [", again"] * self.again + [" by two renames"] * (self.again and not self.exchanges)
        return f"{self.number}: {self.kind} at {where} on {whom}, {'waits' if self.waits else 'beside'}{''.join(more)}"


def _places() -> Iterator[tuple[str, str, int, bool | None, bool]]:
    """Kind, file, call, whether it is saved again (None: either) and names can be exchanged: 40 of bytes, 12 of calls.

    One process alone does what a call other than its first fsync is for: a document's (fsync 1 and 2, open 1 and 2),
    the folder's (fsync 3) and, after the rename, that of the folder above (fsync 4).
    """
    byte = [(kind, file) for kind in BYTES for file in (TENSORS, STATE, MANIFEST)]
    byte += [(kind, TENSORS) for kind in ("vanished", "lying")] * 4
    call = [("fsync", 0, False, True), ("fsync", 2, False, True), ("fsync", 3, False, True), ("fsync", 4, False, True)]
    call += [("fsync", 4, True, True), ("fsync", 4, True, False), ("open", 1, False, True), ("mkdir", 0, False, True)]
    call += [("rename", 0, False, True), ("rename", 0, True, True), ("rename", 0, True, False)]
    call += [("rename", 1, True, False)]
    for number, (kind, file) in enumerate(byte):
        yield "limit", (TENSORS, STATE)[number % 2], 0, None, True
        yield kind, file, 0, False if kind == "vanished" else None, True
        if number < len(call):
            yield call[number][0], TENSORS, *call[number][1:]


def cases(count: int, seed: int) -> list[Case]:
    """For each place: one rank and all of them, waiting and beside."""
    rng = random.Random(seed)
    found: list[Case] = []
    for kind, file, call, again, exchanges in itertools.cycle(_places()):
        part, one = rng.random(), rng.randrange(2)
        if again is None:
            again, exchanges = rng.random() < 0.3, rng.random() < 0.5
        if file != TENSORS or call or kind in ("mkdir", "rename"):
            one = 0  # documents, folders and names are the first process's
        for victims in ((one,), (0, 1)):
            for waits in (False, True):
                found.append(Case(len(found), kind, victims, waits, file, part, call, again, exchanges))
        if len(found) >= count:
            break
    return found[:count]


def run(case: Case, folder: Path) -> str | None:
    from runner.checkpoint import store

    place = folder / "checkpoints"
    codes, said = run_children("guarantees.cases_g05:save_on_a_full_disk", [str(place), asdict(case)], world=2)
    if codes != [0, 0] or any("error" in words for words in said):
        return f"{codes}, {said}"
    failures = [words for words in said if "failed" in words]
    if len(failures) != 2 or failures[0]["failed"] != failures[1]["failed"]:
        return f"not the same failure on both ranks: {said}"
    name = "step_00000001" if case.again else "step_00000002"
    # What has vanished was not theirs to keep; nor is it made anew, or a part of one left in it.
    there = [] if case.kind == "vanished" else ["step_00000001"]
    for words in failures:
        if f"{name} could not be saved" not in words["failed"] or not words["needed"] or words["needed"] < 2 * _EACH:
            return f"the message does not say what is needed where: {words}"
        if words["free"] is None or f"{words['free']:,} are free" not in words["failed"]:
            return f"the message does not say what is free: {words}"
        if words["names"] != there:
            return f"after the failure there are {words['names']}"
        if words["last"] != "".join(there):
            return f"the last good one is {words['last']}"
        if words["kept"] is not True:
            return f"what was there before is another one now: {words}"
    later = sorted(words["later"] for words in said if "later" in words)
    if case.kind == "vanished":
        # Or one process was writing into the folder while the other one removed it, so that it stayed, empty.
        was = "saved" if failures[0]["folder"] else "failed"
        if later != [was, was] or place.exists() != failures[0]["folder"]:
            return f"the next save {later}, and the folder is {'there' if place.exists() else 'gone'}: {said}"
        return None
    newest = store.latest(place)
    if later != ["saved"] * 2 or newest is None or newest.name != "step_00000003" or len(store.candidates(place)) != 2:
        return f"when there was room again, {newest} was the newest: {said}"
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


def save_on_a_full_disk(child: Child, place: str, about: dict[str, Any]) -> None:
    from runner import distributed
    from runner.checkpoint import Checkpointer, SaveFailed, store

    case = Case(**about)
    in_small_pieces(8192)
    folder = Path(place)
    shares = Shares()
    saver = Checkpointer(folder, {"shares": shares})
    first = saver.save(1, "x" * _TEXT)
    if not case.exchanges:
        store.exchange = lambda one, two: False
    distributed.barrier()
    before, sizes = (first / MANIFEST).read_bytes(), {path.name: path.stat().st_size for path in first.iterdir()}
    shares.state["same"] += 1
    distributed.barrier()
    with full(case, child.rank, sizes, folder) if child.rank in case.victims else nullcontext():
        try:
            saver.save(1 if case.again else 2, "x" * _TEXT, wait=case.waits)
            saver.finish()
        except SaveFailed as error:
            there = folder.exists()
            last = saver.latest() if there else None
            child.say(
                failed=str(error),
                needed=error.needed,
                free=error.free,
                folder=there,
                names=sorted(path.name for path in folder.iterdir()) if there else [],
                last="" if last is None else last.name,
                kept=case.kind == "vanished" or (first / MANIFEST).read_bytes() == before,
            )
    distributed.barrier()
    try:
        saver.save(3, wait=case.waits)
        saver.finish()
        child.say(later="saved")
    except SaveFailed:
        child.say(later="failed")
    distributed.barrier()


@contextmanager
def full(case: Case, rank: int, sizes: Mapping[str, int], folder: Path) -> Iterator[None]:
    """A disk that refuses, for this process; a checkpoint of these sizes is what it is to take."""
    from runner.checkpoint import storage

    own = sizes[f"rank_{rank}.safetensors"]
    # Documents are written after the tensors, the manifest last.
    before = {TENSORS: 0, STATE: own, MANIFEST: own + sizes[STATE]}[case.file]
    byte = before + int(case.part * (own if case.file == TENSORS else sizes[case.file]))
    if case.kind == "limit":
        # It is one of each file, not of all together: state.json is the largest. Python ignores the signal.
        byte = byte if case.file == TENSORS else own + int(case.part * (sizes[STATE] - own))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    elif case.kind == "vanished":
        with room_for(byte, errno.ENOENT, lambda: shutil.rmtree(folder, ignore_errors=True)):
            yield
    elif case.kind == "lying":
        # A file system that says beforehand that there is not enough, on the rank that asks it; the other's is full.
        said = storage.free_bytes
        storage.free_bytes = lambda place: byte
        with room_for(byte):
            yield
        storage.free_bytes = said
    elif case.kind in CALLS:
        # What renames back what was renamed must not be refused as well.
        with refusing(case.kind, case.call, getattr(errno, CALLS[case.kind]), folder, once=case.kind == "rename"):
            yield
    else:
        with room_for(byte, getattr(errno, case.kind)):
            yield
