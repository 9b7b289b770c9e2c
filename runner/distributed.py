"""The end of a process that has trained: what must be gone before it exits, in order."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress


def leave() -> None:
    """Frees what the caller has dropped, meets the other processes, ends their group, flushes.

    A process group that goes down while objects still use it aborts the process now and then.
    """
    gc.collect()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        # A stream may be closed or its reader gone: no reason to fail at the very end.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
