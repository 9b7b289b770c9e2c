"""The list of bad inputs, while a program runs: processes and data workers stopped or gone, files cut, no memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guarantees.supervised import WORDS, Program, Seen, slack
from runner.__main__ import main
from runner.launch.watch import stopped, workers_of
from runner.signals import awaited, handled

SLOW = "hooks.slow={_target_: trouble.Slow}"


def run(folder: Path, *words: str) -> Seen:
    program = Program(folder, (*WORDS, *words))
    try:
        return program.end()
    finally:
        program.kill()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(mask, 16) >> number - 1 & 1)


def test_a_process_alone_is_stopped_for_longer_than_the_timeout(tmp_path: Path) -> None:
    """As by Ctrl-Z and fg. Its data workers, to which the shell sends the same, stop like any other process."""
    words = ("launch.timeout=4", "train.steps=12", "data.num_workers=1", "eval.every=never", SLOW)
    program = Program(tmp_path, (*WORDS, *words))
    pid = program.process.pid
    try:
        program.wait_for(lambda: program.records() > 2)
        assert catches(pid, signal.SIGTSTP)
        workers = workers_of(pid)
        assert workers
        assert not any(catches(worker, number) for worker in workers for number in (signal.SIGTSTP, signal.SIGCONT))
        os.kill(pid, signal.SIGTSTP)
        program.wait_for(lambda: stopped(pid), 10)
        time.sleep(5.0)
        os.kill(pid, signal.SIGCONT)
        seen = program.end()
    finally:
        program.kill()
    assert (seen.code, seen.err) == (0, "")
    assert seen.steps == list(range(1, 13))
    assert not (seen.run / "logs" / "stacks.txt").exists()


def test_a_data_worker_is_killed(tmp_path: Path) -> None:
    seen = run(tmp_path, "train.steps=40", "data.num_workers=1", "data.train={_target_: trouble.Data, what: kill}")
    assert seen.code == 1
    advice = (
        r"DataLoader worker .*: (likely|perhaps) out of memory, try a smaller data\.num_workers \(in data\.train\)$"
    )
    assert seen.last.startswith("error: smoke failed after step ")
    assert re.search(advice, seen.last)
    assert re.search(advice, seen.json("summary.json")["error"])
    assert seen.json("status.json")["state"] == "failed"


def test_the_end_of_a_data_worker_is_the_error_and_not_its_connection() -> None:
    """The connection breaks first; torch's handler, which knows why, must not come while that is being told."""
    ended: list[subprocess.Popen[bytes]] = []

    def breaks() -> None:
        ended.append(subprocess.Popen(["sleep", "0.2"]))
        raise ConnectionResetError("Connection reset by peer")

    def tells(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGCHLD, tells)
    try:
        with handled(), pytest.raises(RuntimeError, match="is killed by signal"):
            awaited(breaks)
    finally:
        signal.signal(signal.SIGCHLD, before)
        ended[0].wait(10)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_data_worker_is_stopped(nproc: int, tmp_path: Path) -> None:
    words = ("launch.timeout=2", "data.num_workers=1", "data.train={_target_: trouble.Data, what: stop}")
    seen = run(tmp_path, f"launch.nproc_per_node={nproc}", "train.steps=40", *words)
    took = time.time() - (tmp_path / "began").stat().st_mtime
    assert seen.code == 1, seen
    assert 2.0 <= took < 10.0 * slack()
    told = r"hang: no progress for 2 s \(launch\.timeout\): waiting for data \(step \d+\), data worker (\d+) is stopped"
    found = re.search(told, seen.last)
    assert found, seen.err
    assert f"data worker {found[1]}: stopped (SIGSTOP)\n" in (seen.run / "logs" / "stacks.txt").read_text()
    assert found[0] in seen.json("summary.json")["error"]


def test_a_process_alone_leaves_by_os_exit(tmp_path: Path) -> None:
    """Nothing can catch that: the code is what it says, and nothing is told. The same command goes on."""
    words = ["train.steps=8", "checkpoint.every.steps=2", "checkpoint.async=false", "eval.every=never"]
    words += ["hooks.bad={_target_: trouble.Trouble, what: exit_7, rank: 0, step: 5, times: 1}"]
    seen = run(tmp_path, *words)
    assert (seen.code, seen.err) == (7, "")
    assert seen.json("status.json")["state"] == "running"
    assert seen.json("summary.json") == {}
    seen = run(tmp_path, *words)
    assert (seen.code, seen.err) == (0, "")
    assert "goes on  after step 4" in seen.out
    assert seen.steps == list(range(1, 9))
    assert seen.json("summary.json")["status"] == "completed"


# --- files and memory -------------------------------------------------------------------------------------------------

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
