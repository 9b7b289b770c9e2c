"""Bad surroundings: where a run writes, what the shell gives it, and what the machine does meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, begin, living

from guarantees.supervised import WORDS, Program, of_torch
from runner.__main__ import main

HOOKS = """
import shutil, time
from runner.train.hook import Hook

class Delete(Hook):
    def on_step_end(self, run):
        if run.progress.step == 2:
            shutil.rmtree(run.folder.path)

class Fail(Hook):
    def on_step_end(self, run):
        raise ValueError("boom")

class Back(Hook):
    def on_step_end(self, run):
        if run.progress.step == 2:
            before = time.time
            time.time = lambda: before() - 86_400.0
"""

SMALL = "+recipe=smoke device=cpu train.steps=4 log.every=1 launch.threads=1 trackers.tensorboard=null"


def shell(folder: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash; `RUN` in it is the program with a small recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wicked.py").write_text(HOOKS)
    line = command.replace("RUN", f"{sys.executable} -m runner {SMALL}")
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, errors="replace", timeout=100,
    )  # fmt: skip


def completed(folder: Path) -> dict:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records][:4] == [1, 2, 3, 4]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    return summary


@pytest.mark.parametrize(
    ("place", "said"),
    [("/proc/nosuch/run", "cannot be made"), ("file", "is a file"), ("file/run", "cannot be made"),
     ("full", "holds no run")],
)  # fmt: skip
def test_a_place_that_cannot_be_written(place, said, tmp_path, monkeypatch, capsys, quiet):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/other.txt").touch()
    assert main([*SMALL.split(), f"run_dir={place}"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "command line: run_dir" in told
    assert "Traceback" not in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    told = shell(tmp_path, "RUN run_dir=locked/run")
    assert (told.returncode, "Traceback" in told.stderr) == (2, False)


def test_the_folder_goes_away_during_the_run(tmp_path):
    told = shell(tmp_path, "RUN run_dir=run '+hooks.wicked={_target_: wicked.Delete}'")
    assert told.returncode == 1, told.stderr
    last = told.stderr.strip().splitlines()[-1]
    assert "smoke failed" in last
    assert "run" in last


def test_strange_names_no_home_no_input_and_few_files(tmp_path):
    """A path with spaces and letters beyond ASCII under LANG=C, stdin closed, nothing to write at home, 64 files."""
    folder = tmp_path / "mit Leerzeichen = é ☃ 'x'"
    surroundings = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "HOME": "/proc/nosuch", "TERM": "dumb"}
    told = shell(folder, "ulimit -n 64; RUN 'run_dir=läufe/ein lauf' <&-", **surroundings)
    assert told.returncode == 0, told.stderr
    completed(folder / "läufe/ein lauf")
    again = shell(folder, "RUN 'run_dir=läufe/ein lauf' <&-", **surroundings)
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stdout


def test_a_temporary_folder_with_a_long_name(tmp_path):
    """As clusters give them: no socket of a data worker could have a name in it."""
    place = tmp_path / ("long" * 30)
    place.mkdir()
    done = shell(tmp_path, "RUN run_dir=r data.num_workers=2", TMPDIR=str(place))
    assert done.returncode == 0, done.stderr
    completed(tmp_path / "r")
    assert [path for path in place.iterdir() if not of_torch(path)] == []


@pytest.mark.parametrize("ending", ["| head -1", ">&-", ">&- 2>&-", "> /dev/full"])
def test_nobody_listens(ending, tmp_path):
    told = shell(tmp_path, f"set -o pipefail; RUN run_dir=run {ending}")
    assert told.returncode == 0, told.stderr
    completed(tmp_path / "run")


def test_a_failure_that_nobody_hears_is_one(tmp_path):
    told = shell(tmp_path, "set -o pipefail; RUN run_dir=run '+hooks.wicked={_target_: wicked.Fail}' 2>&1 | head -1")
    assert (told.returncode, told.stdout.count("\n")) == (1, 1)
    assert "boom" in json.loads((tmp_path / "run/summary.json").read_text())["error"]


def test_wrong_input_where_nobody_listens(tmp_path):
    assert shell(tmp_path, "RUN run_dir=run nonsense=1 2> /dev/full").returncode == 2


def test_two_processes_where_little_is_as_usual(tmp_path):
    """Letters beyond ASCII in a path under LANG=C, stdin closed, a reader that goes, and no more files than needed."""
    surroundings = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "TERM": "dumb"}
    words = "'run_dir=läufe/ein lauf' launch.nproc_per_node=2"
    told = shell(tmp_path, f"set -o pipefail; ulimit -n 36; RUN {words} <&- | head -1", **surroundings)
    assert (told.returncode, told.stdout.count("\n")) == (0, 1), told.stderr
    assert completed(tmp_path / "läufe/ein lauf")["world_size"] == 2


def test_more_processes_than_the_system_allows_files_for(tmp_path):
    (tmp_path / "tmp").mkdir()
    words = "run_dir=run launch.nproc_per_node=32 batch.global_size=32"
    told = shell(tmp_path, f"ulimit -n 64; RUN {words}", TMPDIR=str(tmp_path / "tmp"))
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == (
        "runner: 32 processes cannot be started: the first keeps about 96 files and connections open, and the system "
        "allows 64: allow more, for example `ulimit -n 4096`\n"
    )
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("number", "nproc"), [(signal.SIGHUP, 1), (signal.SIGTERM, 2)])
def test_the_reader_goes_with_the_signal(number, nproc, tmp_path):
    """As a terminal that is closed, or the `tee` behind a pipe at Ctrl-C: there is a checkpoint all the same."""
    words = (*WORDS, f"launch.nproc_per_node={nproc}", "train.steps=400", "hooks.slow={_target_: trouble.Slow}")
    program = Program(tmp_path, words)
    try:
        program.wait_for(lambda: program.records() > 2)
        for stream in (program.process.stdout, program.process.stderr):
            stream.close()
        program.process.stdout = program.process.stderr = None
        program.send(number, "parent")
        seen = program.end(60)
    finally:
        program.kill()
    assert seen.code == 75
    assert [path.name for path in (seen.run / "checkpoints").glob("step_*")] == [f"step_{seen.steps[-1]:08d}"]
    assert seen.json("summary.json")["status"] == "interrupted"


def test_eight_at_once_without_a_folder_of_their_own(tmp_path):
    words = (*SMALL.split(), "data.eval=null")
    started = [begin(tmp_path, *words, OMP_NUM_THREADS="1") for _ in range(8)]
    try:
        told = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            for pid in living(process.pid):
                os.kill(pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0] * 8, told
    folders = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert len(folders) == 8
    assert [completed(folder)["steps"] for folder in folders] == [4] * 8
    assert (tmp_path / "runs/latest").resolve() in folders


def test_the_clock_jumps_back(tmp_path):
    told = shell(tmp_path, "RUN run_dir=run '+hooks.wicked={_target_: wicked.Back}'")
    assert told.returncode == 0, told.stderr
    summary = completed(tmp_path / "run")
    assert summary["train_seconds"] >= 0
    assert summary["samples_per_second"] > 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    times = [record["time"] for record in records if record["split"] == "train"]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
    ],
)
def test_half_of_a_launchers_words(variables, said, tmp_path):
    told = shell(tmp_path, "RUN run_dir=run", **variables)
    assert told.returncode == 2, (told.stdout, told.stderr)
    assert said in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs a host name of its own")
def test_a_host_name_that_nobody_knows(tmp_path):
    line = f"hostname nosuch.invalid && {sys.executable} -m runner {SMALL} run_dir=run launch.nproc_per_node=2"
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("no namespace may be made")
    told = shell(tmp_path, f"unshare --uts bash -c '{line}'")
    assert told.returncode == 0, told.stderr
    completed(tmp_path / "run")
