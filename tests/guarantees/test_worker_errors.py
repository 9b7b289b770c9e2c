"""G14 with data workers: what one meets, and how one ends, is told last, in one line and with its key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from guarantees.supervised import WORDS, Program, Seen

WICKED = """
import os, signal, sys, time
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from runner.data.synthetic import separable_classification

OF = separable_classification(256, 16, 4, seed=0)

def make(what):
    if get_worker_info() is None and what != "always":
        return
    if what in ("error", "always"):
        raise ValueError("bad sample 3\\nof this file\\n")
    if what == "sys_exit":
        sys.exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(what))

class Data(Dataset):
    def __init__(self, what, at=100):
        self.what, self.at = what, at
    def __len__(self):
        return len(OF)
    def __getitem__(self, index):
        if index == self.at:
            make(self.what)
        return OF[index]

class Stream(IterableDataset):
    def __iter__(self):
        yield from (OF[i] for i in range(100))
        raise ValueError("bad sample 3\\nof this file\\n")

class Collate:
    def __call__(self, samples):
        if get_worker_info() is not None:
            raise ValueError("bad sample 3\\nof this file\\n")
        return torch.utils.data.default_collate(samples)

class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(16, 4)
    def forward(self, x):
        if self.training:
            time.sleep(0.02)
        return super().forward(x)
"""

TRAIN, EVAL = "data.train={_target_: wicked.Data, what: '%s'}", "data.eval={_target_: wicked.Data, what: '%s'}"
BAD = "ValueError: bad sample 3 of this file"
ITSELF = "a data worker ended itself with exit code"
CASES = {
    "here": (("data.num_workers=0", TRAIN % "always"), f"{BAD} (in data.train)"),
    "train": ((TRAIN % "error",), f"{BAD} (in data.train)"),
    "eval": ((EVAL % "error", "eval.every=2"), f"{BAD} (in data.eval)"),
    "stream": (("data.train={_target_: wicked.Stream}",), f"{BAD} (in data.train)"),
    "collate": (("data.collate={_target_: wicked.Collate}",), BAD),
    "two": ((TRAIN % "error", "launch.nproc_per_node=2"), f"{BAD} (in data.train)"),
    "restart": ((TRAIN % "error", "launch.nproc_per_node=2", "launch.max_restarts=1"), BAD),
    "sys_exit": ((TRAIN % "sys_exit",), f"{ITSELF} 3 (in data.train)"),
    "exit_3": ((TRAIN % "3",), f"{ITSELF} 3 (in data.train)"),
    "exit_0": ((TRAIN % "0",), f"{ITSELF} 0 (in data.train)"),
    "exit_eval": ((EVAL % "3", "eval.every=2"), f"{ITSELF} 3 (in data.eval)"),
    "kill": ((TRAIN % "kill",), "likely out of memory, try a smaller data.num_workers (in data.train)"),
}
#: Of the others one process or another says it.
_QUICK = ("train", "stream", "collate", "sys_exit", "exit_0")


def ended(folder: Path, *words: str) -> Seen:
    folder.mkdir(exist_ok=True)
    (folder / "wicked.py").write_text(WICKED)
    more = ("train.steps=40", "data.num_workers=1", "model={_target_: wicked.Model}")
    given = {word.partition("=")[0] for word in words}
    program = Program(folder, (*WORDS, *(word for word in more if word.partition("=")[0] not in given), *words))
    try:
        return program.end(120)
    finally:
        program.kill()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in CASES])
def test_what_a_data_worker_meets_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    words, told = CASES[name]
    seen = ended(tmp_path, *words)
    assert seen.code == 1, seen.err
    assert seen.last.startswith("error: smoke failed "), seen.err
    assert told in seen.last, seen.err
    if name not in ("two", "restart"):
        assert seen.last.endswith(f": {told}") or name == "kill", seen.err
    assert ("(in " in seen.last) == (name != "collate"), seen.err
    assert seen.json("summary.json")["error"] in seen.last
    assert seen.json("status.json")["reason"] in seen.last
    assert seen.err.count("in make") <= 1 + ("two" in name)
    if name == "restart":
        again = next(line for line in seen.err.splitlines() if line.startswith("restart 1 of 1: "))
        assert f"{BAD} (in data.train)" in again
        assert seen.last.endswith("(in data.train) (after restart 1)")
    shutil.rmtree(tmp_path / "r")
