"""The process group: coming up, going down, and collectives that are the same for every backend."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from runner.errors import InputError, Problem

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store


@dataclass(frozen=True)
class Ranks:
    """This process's place in a job, as a launcher says it.

    `master` is where the job's store listens (host, port), None for a process alone; `listen_fd` is a listening
    socket for it that rank 0 has inherited, so that no port can be lost between choosing and using it.
    `keep_store` says that the launcher itself keeps the store (torch's elastic agent) and rank 0 only connects;
    `attempt` counts its restarts.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None
    listen_fd: int | None = None
    keep_store: bool = False
    attempt: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0


#: A process that no launcher has started.
ALONE = Ranks()


def store(ranks: Ranks, seconds: float = 300.0) -> Store:
    """The job's key-value store, before any group exists. Raises InputError where its port is taken."""
    import torch.distributed as dist

    wait = timedelta(seconds=seconds)
    if ranks.master is None:
        return dist.HashStore()
    host, port = ranks.master
    keeps = ranks.main and not ranks.keep_store
    try:
        if keeps:
            found = dist.TCPStore(
                host,
                port,
                ranks.world_size,
                is_master=True,
                timeout=wait,
                wait_for_workers=False,
                master_listen_fd=ranks.listen_fd,
            )
        else:
            found = _connected(host, port, ranks.world_size, seconds)
            found.set_timeout(wait)
        # What an attempt before has left in a launcher's store is nobody's.
        return dist.PrefixStore(f"attempt_{ranks.attempt}", found)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        why = f"port {port} of {host} is in use by another program"
        raise InputError(Problem(None, why, "choose another port (MASTER_PORT, --master-port)")) from error


def _connected(host: str, port: int, world_size: int, seconds: float) -> Any:
    """A client of the store, by short tries: a signal is not heard while torch's own code waits."""
    import torch.distributed as dist

    until, wait = time.monotonic() + seconds, timedelta(seconds=5)
    while True:
        try:
            return dist.TCPStore(host, port, world_size, is_master=False, timeout=wait, wait_for_workers=False)
        except dist.DistError:
            if time.monotonic() > until:
                raise


def join(ranks: Ranks, store: Store, device_type: str, seconds: float) -> None:
    """Makes the process group: gloo for CPU tensors and, on GPUs, NCCL for theirs.

    Args:
        seconds: how long a collective may wait for another process. Longer than what counts as a hang, and than a
            start may take: who finds a hang names the process that others wait for, and a collective cannot.
    """
    import torch
    import torch.distributed as dist

    if device_type == "cuda":
        # Under srun a process may see a GPU of its own only.
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=seconds),
    )
    _Joined.timeout = timedelta(seconds=seconds)


class _Joined:
    """How long a collective of the group that `join` has made may wait."""

    timeout: timedelta | None = None


def another_group() -> Any:
    """A gloo group of all processes beside the first, for words of a thread; it waits as long. All call it together."""
    return sys.modules["torch.distributed"].new_group(backend="gloo", timeout=_Joined.timeout)


def joined() -> bool:
    """Whether this process is in a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    return sys.modules["torch.distributed"].get_rank() if joined() else 0


def world_size() -> int:
    return sys.modules["torch.distributed"].get_world_size() if joined() else 1


def barrier() -> None:
    """Waits for all processes."""
    if world_size() > 1:
        sys.modules["torch.distributed"].barrier()


def total(tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place."""
    if world_size() > 1:
        sys.modules["torch.distributed"].all_reduce(tensor)
    return tensor


def broadcast(value: Any, source: int = 0) -> Any:
    """The `source` rank's object, on every rank; pickled between the job's own processes."""
    if world_size() == 1:
        return value
    box = [value]
    sys.modules["torch.distributed"].broadcast_object_list(box, source)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank; pickled between the job's own processes."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    sys.modules["torch.distributed"].all_gather_object(found, value)
    return found


def leave(*, together: bool = True) -> None:
    """Frees what the caller has dropped, meets the other processes, ends their group, flushes.

    A process group that goes down while objects still use it aborts the process now and then. Without `together`
    (after an error) nobody is waited for, and the group is left to the end of the process.
    """
    if joined():
        gc.collect()
    if together and joined():
        barrier()
        sys.modules["torch.distributed"].destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        # A stream may be closed or its reader gone: no reason to fail at the very end.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
