"""Parents that start small processes, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.launch.worker import WorkPlan

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROGRAM = """\
import sys
from pathlib import Path
from runner.launch.local import supervise
from runner.launch.worker import WorkPlan
sys.exit(supervise("works:work", WorkPlan.load(Path(sys.argv[1])), int(sys.argv[2])))
"""


@dataclass
class Told:
    code: int
    out: str
    err: str
    seconds: float


class Parent:
    """A started parent and its folder."""

    def __init__(self, folder: Path, nproc: int, plan: WorkPlan, variables: dict[str, str]) -> None:
        self.folder = folder
        self.nproc = nproc
        plan.save(folder / "given.json")
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "given.json", str(nproc)],
            cwd=folder,
            env={**inherited, "PYTHONPATH": f"{HERE}:{ROOT}", "TMPDIR": str(folder / "tmp"), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout: float = 30) -> Told:
        out, err = self.process.communicate(timeout=timeout)
        return Told(self.process.returncode, out, err, time.monotonic() - self.started)

    def wait_for(self, name: str, seconds: float = 20) -> None:
        """Until each rank has written a file `NAME_rank`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if all((self.folder / f"{name}_{rank}").exists() for rank in range(self.nproc)):
                return
            time.sleep(0.01)
        raise AssertionError(f"{name}: {sorted(path.name for path in self.folder.iterdir())}")

    def children(self) -> list[int]:
        """The processes that the parent has started."""
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return []
        return [int(word) for word in text.split()]

    def left(self, *names: str) -> list[int]:
        """The processes that the ranks have written down (files pid_N …) and that still live."""
        found = []
        for name in ("pid", *names):
            for path in self.folder.glob(f"{name}_*"):
                if path.read_text() and alive(int(path.read_text())):
                    found.append(int(path.read_text()))
        return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def told(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"told_{rank}").read_text())
