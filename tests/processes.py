"""Several processes in one gloo group, for tests: a function is called in each, and its results come back."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Calls a top-level function of a module below tests/ in `world` processes; results in rank order.

    Raises AssertionError with the first failing rank's traceback, or where `timeout` seconds were not enough. No
    process is left in any case.
    """
    module = Path(sys.modules[function.__module__].__file__ or "").relative_to(HERE).with_suffix("")
    name = f"{'.'.join(module.parts)}:{function.__name__}"
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listening:
        Path(folder, "arguments").write_bytes(pickle.dumps(arguments))
        port = listening.getsockname()[1]
        command = [sys.executable, str(Path(__file__)), name, folder, str(world), str(port), str(listening.fileno())]
        started = [
            subprocess.Popen(
                [*command, str(rank)],
                pass_fds=[listening.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank in range(world)
        ]
        listening.close()
        deadline = time.monotonic() + timeout
        outputs = []
        late = False
        try:
            _wait(started, deadline)
            late = any(process.poll() is None for process in started)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                outputs.append(process.communicate()[0])
        results = []
        errors = []
        for rank in range(world):
            path = Path(folder, f"result_{rank}")
            found = pickle.loads(path.read_bytes()) if path.exists() else None
            if found is None or found[0] == "error":
                when = found[1] if found else float("inf")
                text = found[2] if found else f"no result, exit code {started[rank].returncode}"
                errors.append((when, f"rank {rank}: {text}\n{outputs[rank][-4000:]}"))
            else:
                results.append(found[1])
        assert not late, f"not finished in {timeout} s\n" + "\n".join(text for _, text in sorted(errors))
        assert not errors, min(errors)[1]
        return results


def _wait(started: list[subprocess.Popen[str]], deadline: float) -> None:
    """Until all have ended; when one fails, the others get a moment to fail as well."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in started]
        if None not in codes:
            return
        if any(code not in (None, 0) for code in codes):
            deadline = min(deadline, time.monotonic() + 3.0)
        time.sleep(0.02)


def _main(name: str, folder: str, world: str, port: str, descriptor: str, rank: str) -> None:
    sys.path.insert(0, str(HERE))
    sys.path.insert(1, str(HERE.parent))
    import torch

    from runner import distributed

    torch.set_num_threads(1)
    ranks = distributed.Ranks(int(rank), int(world), int(rank), int(world), ("127.0.0.1", int(port)), int(descriptor))
    code, result = 0, Path(folder, f"result_{rank}")
    try:
        distributed.join(ranks, distributed.store(ranks), "cpu", 50.0)
        module, _, function = name.partition(":")
        found = getattr(importlib.import_module(module), function)(
            *pickle.loads(Path(folder, "arguments").read_bytes())
        )
        result.write_bytes(pickle.dumps(("done", found)))
    except BaseException:
        code = 1
        result.write_bytes(pickle.dumps(("error", time.time(), traceback.format_exc())))
    distributed.leave(together=code == 0)
    os._exit(code)


if __name__ == "__main__":
    _main(*sys.argv[1:])
