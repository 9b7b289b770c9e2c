"""Processes that save checkpoints and die: forked from one that has torch already, so that each costs little.

A child's function gets the arguments of the case and a `Child`, through which it says what it has reached. What was
said is known afterwards, however the child ended.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

_server: list[subprocess.Popen[str]] = []


class Child:
    """One of the processes of a case, from inside."""

    def __init__(self, rank: int, world: int, pipe: int) -> None:
        self.rank, self.world, self._pipe = rank, world, pipe

    def say(self, **words: Any) -> None:
        os.write(self._pipe, (json.dumps({"rank": self.rank, **words}) + "\n").encode())


def in_small_pieces(size: int) -> None:
    """Files are written in pieces of `size` bytes from now on, past the page cache, as much larger ones are."""
    from runner.checkpoint import synced

    synced._WRITTEN, synced._COPIED = size, size // 2


@contextlib.contextmanager
def room_for(size: int, number: int = errno.ENOSPC, before: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """A disk that takes `size` more bytes of this process; then it does `before()` and refuses with `number`."""
    from runner.checkpoint import synced

    out, remaining = synced.Written._out, size

    def refuse(self: Any, data: memoryview) -> int:
        nonlocal remaining
        if not remaining:
            before()
            raise OSError(number, os.strerror(number))
        taken = out(self, data[:remaining])
        remaining -= taken
        return taken

    synced.Written._out = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        synced.Written._out = out  # type: ignore[method-assign]


#: What Python tells of before it is done, by the kind of call that is refused.
_EVENTS = {"open": ("open",), "mkdir": ("os.mkdir",), "rename": ("os.rename", "runner.exchange")}


@contextlib.contextmanager
def refusing(what: str, at: int, number: int, folder: Path, *, once: bool = False) -> Iterator[None]:
    """A disk that refuses this process a kind of call below `folder`: the `at`-th from 0, and unless `once` all after.

    `what` is open (a new file), mkdir, rename (an exchange of names as well), or fsync, of which all count.
    """
    from runner.checkpoint import synced

    seen, over, system = 0, False, synced.os

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == at + 1 or (seen > at and not once):
            raise OSError(number, os.strerror(number))

    def hear(name: str, arguments: Any) -> None:
        if over or name not in _EVENTS.get(what, ()) or not isinstance(arguments[0], str | os.PathLike):
            return
        if (what != "open" or arguments[2] & os.O_CREAT) and Path(arguments[0]).is_relative_to(folder):
            count()

    def fsync(handle: int) -> None:
        count()
        os.fsync(handle)

    sys.addaudithook(hear)
    if what == "fsync":
        synced.os = type("refusing", (), {**vars(os), "fsync": staticmethod(fsync)})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        over, synced.os = True, system  # type: ignore[attr-defined]


def run_children(
    function: str, arguments: Sequence[Any], *, world: int = 1, kill: Sequence[int] = (), delay: float | None = None
) -> tuple[list[int], list[dict[str, Any]]]:
    """(exit codes by rank, what was said in order). `delay` seconds after the first word `armed`, the ranks `kill` die.

    `function` is "module:name" of a top-level function(child, *arguments) below tests/.
    """
    if not _server or _server[0].poll() is not None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        _server[:] = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        ]
    server = _server[0]
    assert server.stdin is not None
    assert server.stdout is not None
    task = {"function": function, "arguments": list(arguments), "world": world, "kill": list(kill), "delay": delay}
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the parent of the children is gone"
    found = json.loads(answer)
    return found["codes"], found["said"]


def _serve() -> None:
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.tensor

    import runner.checkpoint.storage  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        answers.write(json.dumps(_handled(task)) + "\n")
        answers.flush()


def _handled(task: dict[str, Any], patience: float = 60.0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as meeting:
        reading, writing = os.pipe()
        children = []
        for rank in range(task["world"]):
            child = os.fork()
            if child == 0:
                os.close(reading)
                _be(task, Child(rank, task["world"], writing), meeting)
            children.append(child)
        os.close(writing)
        data, until, kill_at = b"", time.monotonic() + patience, None
        while True:
            now = time.monotonic()
            wait = min(until, kill_at if kill_at is not None else until) - now
            if select.select([reading], [], [], max(wait, 0))[0]:
                part = os.read(reading, 1 << 16)
                data += part
                if not part:
                    break
                if task["delay"] is not None and b'"armed"' in data and kill_at is None:
                    kill_at = time.monotonic() + task["delay"]
            elif time.monotonic() >= until:
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                until += 5
            if kill_at is not None and time.monotonic() >= kill_at:
                kill_at = until
                # Stopped first, so that none of them hears of another's end before its own.
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for rank in task["kill"]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(children[rank], number)
        os.close(reading)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        # The last line may be a part of one.
        said = [json.loads(line) for line in data.decode().split("\n")[:-1]]
        return {"codes": codes, "said": said}


def _be(task: dict[str, Any], child: Child, meeting: str) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if child.world > 1:
            import torch.distributed as dist

            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}/group", rank=child.rank, world_size=child.world
            )
        module, _, name = task["function"].partition(":")
        getattr(importlib.import_module(module), name)(child, *task["arguments"])
        # As the interpreter does at its end.
        threading._shutdown()  # type: ignore[attr-defined]
        code = 0
    except BaseException as error:
        child.say(error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
