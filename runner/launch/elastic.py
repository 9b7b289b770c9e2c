"""One of several nodes: torch's elastic agent finds the others and starts this node's processes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.errors import InputError, Problem, RunnerError
from runner.launch.failure import failures, told_run
from runner.launch.local import Ending, heard_signals, tell, tell_interrupted, threads
from runner.launch.processes import address
from runner.launch.report import SIGNAL, Report, temporary
from runner.launch.worker import WorkPlan, command
from runner.signals import NOTHING_TO_SAVE, exit_code, speak_up

#: Seconds that the agent gives the other processes of a node once one has failed.
_GRACE = 5


def run(work: str, plan: WorkPlan, nproc: int) -> int:
    """Runs MODULE:FUNCTION in `nproc` processes of this node, together with those of launch.nnodes - 1 others.

    Every node is started with the same command. Raises InputError where the nodes do not meet.
    """
    with temporary() as folder:
        plan = replace(plan, report=folder)
        path = Path(folder, "plan.json")
        try:
            plan.save(path)
        except OSError as error:
            raise RunnerError(f"this node's processes cannot be started: {error}") from error
        _set_environment(plan, nproc)
        with heard_signals(partial(_forward, Path(folder)), partial(_kill, Path(folder))) as got:
            endings = _launch(plan, nproc, command(work, path), Path(folder))
        if got.left is not None:
            tell_interrupted(plan, told_run(Report(folder)), got.received)
            return got.left
        codes = [int(each.read_text()) for each in Path(folder).glob("rank_*.code")]
        endings += [Ending(-1, code, time.time()) for code in codes]
        return tell(plan, endings, got.received, nproc * plan.config["launch"]["nnodes"])


def _launch(plan: WorkPlan, nproc: int, words: list[str], folder: Path) -> list[Ending]:
    """The processes of this node that failed, as far as the agent tells."""
    # In torch's C++ every lost connection writes a page of stack frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its words would stand in front of ours
    launch = plan.config["launch"]
    wait = int(launch["timeout"])
    # Only where every node says its number do ranks follow it; else the nodes find an order of their own.
    if launch["node_rank"] is None:
        backend, configs = "c10d", {"join_timeout": wait, "timeout": wait, "read_timeout": min(60, wait)}
    else:
        backend, configs = "static", {"rank": launch["node_rank"], "timeout": wait}
    config = LaunchConfig(
        min_nodes=launch["nnodes"],
        max_nodes=launch["nnodes"],
        nproc_per_node=nproc,
        run_id=launch["rdzv_id"] or "runner",
        rdzv_backend=backend,
        rdzv_endpoint=launch["rdzv_endpoint"],
        rdzv_configs=configs,
        max_restarts=launch["max_restarts"],
        local_addr=own_address(launch["rdzv_endpoint"]),
        signals_to_handle="SIGUSR2",  # those that end a run are handed on by _signals
        shutdown_timeout=_GRACE,
    )
    try:
        elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as error:
        # In the order in which they were seen: whoever was killed after the first one, the agent has killed.
        return [
            Ending(rank, found.exitcode, found.timestamp + number / 1000, number > 0 and found.exitcode < 0)
            for number, (rank, found) in enumerate(error.failures.items())
        ]
    except (RendezvousError, DistError) as error:
        if failures(folder):
            return [Ending(-1, 1, time.time(), by_parent=True)]  # the others have gone before the agent could tell
        if _pids(folder):
            raise RunnerError(f"the other nodes have gone: {_reason(error)}") from error
        why = f"the {launch['nnodes']} nodes did not meet: {_reason(error)}"
        fix = "start the same command on each node, the one with launch.node_rank=0 on the host that the endpoint names"
        raise InputError(Problem("launch.rdzv_endpoint", why, fix, launch["rdzv_endpoint"])) from error
    return []


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(cause).strip()
    if "EADDRINUSE" in text:
        return "its port is in use by another program"
    return text.splitlines()[0] if text else "not all of them came in time"


# --- signals --------------------------------------------------------------------------------------------------------


def _forward(folder: Path, number: int, rank: int | None) -> None:
    """Hands the first signal on to this node's processes, which leave their ids in the folder.

    The agent would pass it to the data workers too, and kill what is still saving.
    """
    (folder / SIGNAL).write_text(str(number))  # for those that are about to start
    pids = _pids(folder)
    if not pids:
        go_on = told_run(Report(folder)).get("go_on")  # of an attempt before
        speak_up(f"to go on: {go_on}" if go_on else f"interrupted before the first step: {NOTHING_TO_SAVE}")
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(exit_code(number))
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill(folder: Path) -> None:
    for pid in _pids(folder):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _pids(folder: Path) -> list[int]:
    texts = [path.read_text() for path in folder.glob("rank_*.pid")]
    return [int(text) for text in texts if text]


# --- addresses ------------------------------------------------------------------------------------------------------


def _set_environment(plan: WorkPlan, nproc: int) -> None:
    """What this node's processes inherit: threads, and the network interface that leads to the other nodes."""
    os.environ.update(threads(plan.config, nproc, os.environ))
    own = own_address(plan.config["launch"]["rdzv_endpoint"])
    interface = own and interface_of(own)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def own_address(endpoint: str) -> str | None:
    """This computer's address as the endpoint sees it: its name need not be known to the others."""
    host, port = address(endpoint) or ("", 0)
    for family, kind, protocol, _, where in _resolved(host, port):
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(where)  # UDP: nothing is sent
            return probe.getsockname()[0]
    return None


def _resolved(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return []


def interface_of(own: str) -> str | None:
    """The network interface with an IPv4 address; None where that cannot be found."""
    if sys.platform != "linux" or ":" in own:
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None
