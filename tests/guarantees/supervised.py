"""Runs that something happens to, seen from outside: their exit codes, last words, records, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programs import begin, living

HERE = Path(__file__).parent
#: One line of progress a step; the files are the truth.
WORDS = ("+recipe=smoke", "device=cpu", "log.every=1", "launch.threads=1", "train.epochs=null", "run_dir=r")


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass
class Seen:
    """How a program ended."""

    code: int
    out: str
    err: str
    seconds: float
    run: Path

    @property
    def last(self) -> str:
        return (self.err.rstrip().splitlines() or [""])[-1]

    @property
    def steps(self) -> list[int]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record["step"] for record in map(json.loads, lines) if record["split"] == "train"]

    def json(self, name: str) -> dict[str, Any]:
        path = self.run / name
        return json.loads(path.read_text()) if path.exists() else {}


@dataclass
class Program:
    """A started program in a folder of its own, with a folder for temporary files that must be empty afterwards."""

    folder: Path
    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    asked: float = 0.0

    def __post_init__(self) -> None:
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "trouble.py", self.folder)
        self.started = time.monotonic()
        variables = {"TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1", **self.variables}
        self.process: subprocess.Popen[str] = begin(self.folder, *self.words, **variables)

    @property
    def run(self) -> Path:
        return self.folder / "r"

    def wait_for(self, condition: Callable[[], Any], seconds: float = 90.0) -> None:
        until = time.monotonic() + seconds
        while True:
            over = self.process.poll() is not None
            if condition():
                return
            if over:
                raise Broken(f"ended too early: {self.process.communicate()}")
            if time.monotonic() > until:
                raise Broken("what was waited for did not happen")
            time.sleep(0.01)

    def records(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def ranks(self) -> list[int]:
        """The processes of the run: those of its parent, or the program itself."""
        found = sorted(pid for pid, line in living(self.process.pid).items() if "runner.launch.worker" in line)
        mains = [pid for pid in found if parent(pid) == self.process.pid]
        return mains or [self.process.pid]

    def send(self, number: int, target: str) -> None:
        """Sends a signal to the parent or to rank N (`rank0`, `rank1`)."""
        self.asked = time.monotonic()
        pid = self.process.pid if target == "parent" else self.ranks()[int(target[4:])]
        os.kill(pid, number)

    def end(self, timeout: float = 90.0) -> Seen:
        """Waits for the end. No process of the session and no temporary file is left, or Broken."""
        try:
            out, err = self.process.communicate(timeout=timeout)
            done = time.monotonic()
            self.check_litter()
        except subprocess.TimeoutExpired:
            raise Broken(f"did not end in {timeout} s") from None
        finally:
            self.kill()
        return Seen(self.process.returncode, out, err, done - (self.asked or self.started), self.run)

    def check_litter(self, seconds: float = 10.0) -> None:
        until = time.monotonic() + seconds
        while (left := living(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.02)
        if left:
            raise Broken(f"left behind: {left}")
        files = [path.name for path in (self.folder / "tmp").iterdir() if not of_torch(path)]
        if files:
            raise Broken(f"files left behind: {files}")

    def kill(self) -> None:
        for pid in living(self.process.pid):
            os.kill(pid, signal.SIGKILL)


def whole_checkpoints(run: Path) -> list[int]:
    """The steps of a run's checkpoints, each of them read and verified; Broken where one is not whole."""
    from runner.checkpoint.manifest import Damaged, Manifest
    from runner.checkpoint.verify import verify

    folders = sorted((run / "checkpoints").glob("step_*"))
    try:
        for folder in folders:
            verify(folder, Manifest.read(folder))
    except Damaged as error:
        raise Broken(str(error)) from None
    return [int(folder.name[5:]) for folder in folders]


def sample_of(step: int, rank: int, nproc: int) -> int:
    """The first sample that a process of the smoke recipe gets in a step (from 1)."""
    from runner.data.order import Order

    return int(Order(256, 32).indices(step - 1)[32 // nproc * rank])


def of_torch(path: Path) -> bool:
    """An empty folder that torch makes, one for a user, in whatever program imports its compiler."""
    return path.name.startswith("torchinductor_") and path.is_dir() and not any(path.iterdir())


def parent(pid: int) -> int:
    """The process that `pid` is a child of; -1 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def slack() -> float:
    """How much longer than alone something may take on a computer that does other things as well."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def require(holds: object, what: str, seen: Seen | None = None) -> None:
    if not holds:
        raise Broken(f"{what}\n{seen.out[-2000:]}\n{seen.err[-2000:]}" if seen else what)


def held(check: Callable[[], None]) -> str | None:
    """None where a check holds, else what it says."""
    try:
        check()
    except Broken as error:
        return str(error)
    return None
