"""The program as a user starts it: a process of its own in a folder of its own, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def begin(folder: Path, *words: str, program: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """Starts `python -m runner WORDS` in a session of its own."""
    return subprocess.Popen(
        [*(program or (sys.executable,)), "-m", "runner", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As from a terminal: a SIGHUP that whoever runs the tests ignores (nohup) would stay ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def living(session: int) -> dict[int, str]:
    """The processes of a session that still live, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if int(words[3]) == session and words[0] not in "ZX":
                found[int(entry.name)] = line
    return found


@dataclass
class Told:
    """How a program ended and what it said."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def last(self) -> str:
        return self.err.rstrip().splitlines()[-1]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def losses(self, split: str = "train") -> list[float]:
        records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == sorted(record["step"] for record in records)
        return [record["loss"] for record in records if record["split"] == split]


def end(process: subprocess.Popen[str], run: Path, timeout: float = 90.0) -> Told:
    """Waits for a program. Nothing of its session is left, in time or not."""
    try:
        out, err = process.communicate(timeout=timeout)
        assert living(process.pid) == {}
    finally:
        for pid in living(process.pid):
            os.kill(pid, signal.SIGKILL)
    return Told(process.returncode, out, err, run)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
