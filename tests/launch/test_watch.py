"""The watchdog of a process that has no parent: it stops in order, and knows time in which it was stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from parents import ROOT

#: The main thread is in one call of C for two seconds, in which a thread goes on beating; a watchdog allows 1.5.
PROGRAM = """
import ctypes, fcntl, threading, time
from pathlib import Path
from runner.heartbeat import TRAIN, Heartbeat
from runner.launch.watch import Watchdog

heartbeat = Heartbeat()
held = open("lock", "w")
fcntl.flock(held, fcntl.LOCK_EX)

def work():
    for step in range(1, 41):
        heartbeat.beat(TRAIN, step)
        Path("step").write_text(str(step))
        time.sleep(0.05)
    fcntl.flock(held, fcntl.LOCK_UN)

watchdog = Watchdog(heartbeat, 1.5, Path("."), print).start()
threading.Thread(target=work).start()
waiting = open("lock")
ctypes.CDLL(None).flock(waiting.fileno(), fcntl.LOCK_EX)
watchdog.stop()
print("completed")
"""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def steps(folder: Path) -> int:
    path = folder / "step"
    return int(path.read_text() or 0) if path.exists() else 0


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: steps(tmp_path) > 3)
        yield started
    finally:
        started.kill()
        started.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=20)
    return process.returncode, out


def test_a_process_in_a_call_of_c_stops_without_its_timers(process: subprocess.Popen[str], tmp_path: Path) -> None:
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: state(process.pid) == "T", 5)
    before = steps(tmp_path)
    time.sleep(2.5)
    assert steps(tmp_path) == before
    process.send_signal(signal.SIGCONT)
    assert ended(process) == (0, "completed\n")
    assert list((tmp_path / "logs").iterdir()) == []


def test_who_is_to_go_on_at_once_does_not_stop(process: subprocess.Popen[str], tmp_path: Path) -> None:
    process.send_signal(signal.SIGTSTP)
    process.send_signal(signal.SIGCONT)
    assert ended(process) == (0, "completed\n")


#: What handlers and files a process has, while a watchdog watches and after it.
AROUND = """
import os, signal, sys
from pathlib import Path
from runner.heartbeat import Heartbeat
from runner.launch.watch import Watchdog

def caught():
    mask = int(Path("/proc/self/status").read_text().partition("SigCgt:")[2].split()[0], 16)
    return [bool(mask >> number - 1 & 1) for number in (signal.SIGTSTP, signal.SIGCONT, signal.SIGALRM)]

signal.signal(signal.SIGTSTP, getattr(signal, sys.argv[1]))
before = caught(), os.listdir("/proc/self/fd")
watchdog = Watchdog(Heartbeat(), 60.0, Path("."), print).start()
print(caught()[0])
watchdog.stop()
print((caught(), os.listdir("/proc/self/fd")) == before)
"""


@pytest.mark.parametrize(("handler", "catches"), [("SIG_DFL", True), ("SIG_IGN", False)])
def test_what_was_there_is_back_afterwards(handler: str, catches: bool, tmp_path: Path) -> None:
    """Who has SIGTSTP ignored (a shell without job control) is not stopped by it."""
    done = subprocess.run(
        [sys.executable, "-c", AROUND, handler], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{catches}\nTrue\n", "")
