"""G4: nothing writes into a checkpoint that is there, and pruning comes after the new one, by renaming first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from guarantees.cases_g04 import cases, run

_TRACED = """
import os, sys, threading
from pathlib import Path
folder = Path(sys.argv[1])
violations, gone, exchanged = [], [], []

def inside(path):
    try:
        path = Path(os.path.abspath(os.fsdecode(path)))
    except TypeError:
        return None
    words = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    return words if words and words[0].startswith("step_") else None

def hear(name, arguments):
    if name == "open":
        path, mode, flags = arguments
        written = (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        if isinstance(path, (str, bytes, os.PathLike)) and written and inside(path):
            violations.append(f"open {path} to write")
    elif name == "os.rename":
        source, target = inside(arguments[0]), inside(arguments[1])
        if source and (len(source) > 1 or not Path(arguments[1]).name.startswith((".trash-", ".old-"))):
            violations.append(f"rename {arguments[0]} to {arguments[1]}")
        if target and (len(target) > 1 or not Path(arguments[0]).name.startswith(".tmp-")):
            violations.append(f"rename {arguments[0]} to {arguments[1]}")
        if source and not violations:
            left = [name for name in os.listdir(folder) if name.startswith("step_")]
            newer = [name for name in left if name >= Path(arguments[0]).name and
                     (folder / name / "manifest.json").exists()]
            gone.append(Path(arguments[0]).name)
            if ".trash-" in str(arguments[1]) and len(newer) < 3:
                violations.append(f"{arguments[0]} goes while only {newer} are newer")
    elif name == "runner.exchange":
        exchanged.append(Path(arguments[1]).name)
        staged, there = arguments
        if not staged.name.startswith(".tmp-") or not (staged / "manifest.json").exists() or len(inside(there)) > 1:
            violations.append(f"exchange {staged} and {there}")
    elif name in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.link",
                  "os.symlink", "os.setxattr", "os.removexattr", "shutil.rmtree"):
        if any(inside(argument) for argument in arguments[:2] if isinstance(argument, (str, bytes, os.PathLike))):
            violations.append(f"{name} {arguments}")

import torch
import runner.checkpoint.storage
from runner.checkpoint import Checkpointer, SaveFailed, store
from runner.checkpoint import synced
sys.addaudithook(hear)

class Box:
    def __init__(self): self.state = {"w": torch.zeros(1000)}
    def state_dict(self): return self.state
    def load_state_dict(self, state): self.state = state

saver = Checkpointer(folder, {"box": Box()}, 2, ("loss", "min"), milestones=5)
for step in range(1, 13):
    saver.save(step, metrics={"loss": abs(step - 3)}, wait=step % 2 == 0)
saver.save(12)
saver.save(12, wait=False)
saver.finish()
source = store.latest(folder)
exchange, store.exchange = store.exchange, lambda one, two: False
saver = Checkpointer(folder, {"box": (box := Box())}, 2, ("loss", "min"), protected=[source], milestones=5)
saver.load(source)
box.state["w"] += 1
for step in (12, 13, 14, 15, 16):
    saver.save(step, wait=step % 2 == 0)
saver.close()
fsync, os.fsync = os.fsync, lambda handle: os.posix_fadvise(-1, 0, 0, 0)
try:
    saver.save(17)
except SaveFailed:
    pass
assert not violations, violations
print(*sorted(path.name for path in store.candidates(folder)))
print(len(gone))
print(*exchanged)
"""


def test_a_trace_of_all_writes(tmp_path: Path) -> None:
    """By waiting and in the background, with a best one and milestones, replaced, resumed and failed."""
    done = subprocess.run(
        [sys.executable, "-c", _TRACED, str(tmp_path)],
        timeout=100,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    names, gone, exchanged = done.stdout.splitlines()
    best, milestones, resumed, newest = [3], [5, 10, 15], [12], [15, 16]
    assert names.split() == [f"step_{step:08d}" for step in sorted({*best, *milestones, *resumed, *newest})]
    assert int(gone) >= 9
    assert exchanged.split() == ["step_00000012"] * 2


def test_retention_of_ten_thousand_random_listings(tmp_path: Path) -> None:
    wrong = {str(case): why for case in cases(10_000, seed=0) if (why := run(case, tmp_path)) is not None}
    assert wrong == {}
