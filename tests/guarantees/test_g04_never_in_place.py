"""G4: nothing writes into a checkpoint that is there, and pruning comes after the new one, by renaming first."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from guarantees.cases_g04 import Case, cases, run
from guarantees.writes import holders, told

TESTS = Path(__file__).resolve().parent.parent

_TRACED = """
import os, sys
from pathlib import Path
folder, log = map(Path, sys.argv[1:3])
sys.path[:0] = sys.argv[3:]
from guarantees.writes import Writes

import torch
import runner.checkpoint.storage
from runner.checkpoint import Checkpointer, SaveFailed, store
from runner.checkpoint import synced
Writes(folder, log).watch()

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
print(*sorted(path.name for path in store.candidates(folder)))
"""


def test_a_trace_of_all_writes(tmp_path: Path) -> None:
    """By waiting and in the background, with a best one and milestones, replaced, resumed and failed."""
    done = subprocess.run(
        [sys.executable, "-c", _TRACED, str(tmp_path / "checkpoints"), str(tmp_path / "log"), str(TESTS)],
        timeout=100,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    heard = told(tmp_path / "log")
    assert heard["violation"] == []
    best, milestones, resumed, newest = [3], [5, 10, 15], [12], [15, 16]
    assert done.stdout.split() == [f"step_{step:08d}" for step in sorted({*best, *milestones, *resumed, *newest})]
    assert len(heard["gone"]) >= 9
    assert heard["exchanged"] == ["step_00000012"] * 2


def test_the_trace_sees_what_can_be_written_to_still(tmp_path: Path) -> None:
    """By a descriptor from before the rename, or a mapping."""
    (tmp_path / "manifest.json").write_text("{}")
    assert holders(tmp_path) == []
    with (tmp_path / "a").open("wb") as file:
        file.write(b"x")
        assert len(holders(tmp_path)) == 1
    with (tmp_path / "a").open("rb+") as file, mmap.mmap(file.fileno(), 1) as memory:
        assert any(" maps " in holder for holder in holders(tmp_path))
        memory.close()
    with (tmp_path / "a").open("rb"):
        assert holders(tmp_path) == []


def test_retention_of_ten_thousand_random_listings(tmp_path: Path) -> None:
    listings = [case for case in cases(10_000, seed=0) if isinstance(case, Case)]
    assert len(listings) == 9_998  # the others are runs of two processes, in the long form
    wrong = {str(case): why for case in listings if (why := run(case, tmp_path)) is not None}
    assert wrong == {}
