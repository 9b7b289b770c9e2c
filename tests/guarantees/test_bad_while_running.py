"""The list of bad inputs, while a program runs: files that change under it, and memory that is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner.__main__ import main

OWN = """\
import os
from pathlib import Path

import torch


class Rows(torch.utils.data.Dataset):
    \"\"\"Rows of a file that is cut while it is read.\"\"\"

    def __init__(self, file, cut_at):
        self.file, self.cut_at, self.reads = Path(file), cut_at, 0
        self.file.write_bytes(torch.randn(256, 16).numpy().tobytes())

    def __len__(self):
        return 256

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.cut_at:
            os.truncate(self.file, 64)
        with self.file.open("rb") as file:
            file.seek(64 * index)
            row = file.read(64)
        if len(row) < 64:
            raise EOFError(f"{self.file} ends before row {index}")
        return torch.frombuffer(bytearray(row), dtype=torch.float32), index % 4


class Big(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            torch.empty(1 << 50, dtype=torch.uint8)
        return super().forward(x)
"""

SMOKE = ("+recipe=smoke", "run_dir=r", "device=cpu", "log.every=1")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_running.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def records(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n")


def test_a_file_of_the_data_that_is_cut(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was read for the fingerprint counts as well, so the row at which it fails is not fixed."""
    cut = "data.train={_target_: own_running.Rows, file: rows.bin, cut_at: 150}"
    assert main([*SMOKE, cut, "checkpoint.every.steps=1"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: smoke failed after step ")
    assert "EOFError: rows.bin ends before row" in last
    assert last.endswith("(in data.train)")
    assert records(home / "r") >= 2
    assert list((home / "r" / "checkpoints").glob("step_*"))


def test_memory_that_is_not_there(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    big = "model={_target_: own_running.Big, in_features: 16, out_features: 4}"
    assert main([*SMOKE, big]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: smoke failed after step 2: RuntimeError: ")
    assert "you tried to allocate 1125899906842624 bytes" in last
    assert last.endswith("(in model)")


def test_a_run_whose_checkpoints_are_all_bad_does_not_begin_anew(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMOKE, "checkpoint.every.steps=4", "train.steps=8"]) == 0
    before = records(home / "r")
    for path in (home / "r" / "checkpoints").glob("step_*/state.json"):
        path.write_bytes(path.read_bytes()[:10])
    capsys.readouterr()
    assert main([*SMOKE, "checkpoint.every.steps=4", "train.steps=16"]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.out.count("is not a complete checkpoint: state.json has 10 bytes instead of") == 2
    assert "none of the 2 checkpoints in" in said.err
    assert "move them away to start anew" in said.err
    assert records(home / "r") == before
    assert len(list((home / "r" / "checkpoints").glob("step_*"))) == 2
