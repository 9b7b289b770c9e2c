"""What a data worker does before it fetches anything: it ends with its training process, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import Any

import torch

from runner.signals import SIGNALS, deaf, end_with, fresh_in_forks, heard


def in_worker(number: int = 0) -> None:
    """To be called first in a data worker (`worker_init_fn`): it ends with its training process, and by it alone."""
    fresh_in_forks()
    for each in heard():
        signal.signal(each, deaf)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _nameless_sockets()
    _nameless_memory()
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)


def _nameless_sockets() -> None:
    """Lets the socket over which tensors leave this process have no place in a folder, where the system can.

    Python gives it one in the temporary folder: it stays there when the process is killed, and in a folder with a long
    name (a socket's may have 107 bytes) the worker fails in a thread of its own, and its training waits for ever.
    Only this socket, for which both sides prove that they know the processes' secret: those that trust whoever may
    open their file (a forkserver's, CVE-2022-42919) keep it.
    """
    if sys.platform != "linux":
        return
    from multiprocessing import connection, resource_sharer

    sharer: Any = resource_sharer._ResourceSharer  # type: ignore[attr-defined]
    begin = sharer._start

    def begin_nameless(self: Any) -> None:
        named = connection.arbitrary_address  # type: ignore[attr-defined]
        # Names are those of a network, in which other processes may have this one's number.
        connection.arbitrary_address = lambda family: f"\0runner-{os.urandom(16).hex()}"  # type: ignore[attr-defined]
        try:
            begin(self)
        finally:
            connection.arbitrary_address = named  # type: ignore[attr-defined]

    sharer._start = begin_nameless


def _nameless_memory() -> None:
    """Lets the memory in which batches reach the training process have no name, where the system can.

    torch makes a file in /dev/shm and removes its name at once; of a worker that is killed in between it stays, and in
    a container that folder often holds no more than 64 MB, of which workers die by a bus error. A memfd is shared in
    the same way, by its descriptor, and is limited by the memory alone.
    """
    try:
        os.close(os.memfd_create("batch", os.MFD_CLOEXEC))
    except (AttributeError, OSError):
        return  # not there, or not allowed: then as torch does it
    storage: Any = torch.UntypedStorage
    share = storage._share_fd_cpu_

    def new(cls: Any, size: int) -> Any:
        memory = os.memfd_create("batch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, size)
            return cls._new_shared_fd_cpu(memory, size)  # has a descriptor of its own
        finally:
            os.close(memory)

    def share_nameless(self: Any) -> Any:
        if not self.is_shared():
            shared = new(type(self), self.nbytes())
            shared.copy_(self)
            self._swap_data_ptr_(shared)
        return share(self)

    storage._new_using_fd_cpu = classmethod(new)
    storage._share_fd_cpu_ = share_nameless
