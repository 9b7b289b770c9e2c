"""A signal ends a run after its step, with a checkpoint; the same command then goes on to the same end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORDS = [
    "+recipe=smoke",
    "train.epochs=null",
    "train.steps=3000",
    "log.every=1",
    "launch.threads=1",
    "eval.every=never",
]


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "runner", *WORDS, *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for_steps(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} steps: {process.communicate(timeout=10)[0]}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_command_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = _start(tmp_path, "run_dir=r")
    _wait_for_steps(tmp_path / "r", 20, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"to go on: python -m runner {' '.join(WORDS)} run_dir=r" in output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    stopped = summary["steps"]
    assert 20 <= stopped < 3000
    assert Path(summary["checkpoint"]).name == f"step_{stopped:08d}"
    assert json.loads((tmp_path / "r" / "status.json").read_text())["reason"] == number.name

    for folder in ("r", "whole"):
        again = _start(tmp_path, f"run_dir={folder}", f"train.steps={stopped + 10}")
        output, _ = again.communicate(timeout=120)
        assert again.returncode == 0, output
    saved = f"checkpoints/step_{stopped + 10:08d}/rank_0.safetensors"
    resumed, whole = load_file(tmp_path / "r" / saved), load_file(tmp_path / "whole" / saved)
    for name in whole:
        if not name.startswith("random/"):
            assert resumed[name].equal(whole[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps[:-1] == list(range(1, stopped + 11))


SLOW = """
import time
from runner.train.hook import Hook
class Slow(Hook):
    def on_step_end(self, run):
        if run.progress.step == 3:
            for _ in range(600):
                time.sleep(0.1)
"""


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = _start(tmp_path, "run_dir=r", "hooks.slow={_target_: slow.Slow}")
    _wait_for_steps(tmp_path / "r", 3, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143, output
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("to go on: python -m runner +recipe=smoke"), output
    assert "run_dir=r" in last


RESTARTS = """
import os, signal, time
from runner.train.hook import Hook
if os.path.exists("died") and not os.path.exists("imports"):
    open("imports", "w").close()
    time.sleep(30)
class Dies(Hook):
    def on_step_end(self, run):
        if run.progress.step == 7 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_signal_in_the_start_of_a_restart_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(RESTARTS)
    words = ["launch.max_restarts=2", "checkpoint={every: {steps: 2}, async: false}", "train.steps=20"]
    process = _start(tmp_path, "hooks.dies={_target_: dies.Dies}", *words)
    until = time.monotonic() + 60
    while not (tmp_path / "imports").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    (run,) = {path.resolve() for path in (tmp_path / "runs").iterdir()}
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], "killed (SIGKILL)" in status["reason"]) == ("failed", True)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert "nothing to save" not in output
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    (line,) = [line for line in output.splitlines() if line.startswith("to go on: ")]
    command = shlex.split(line.removeprefix("to go on: python "))
    again = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert again.returncode == 0, again.stderr
    assert "goes on  after step 6" in again.stdout
    assert {path.resolve() for path in (tmp_path / "runs").iterdir()} == {run}


def test_a_second_signal_under_a_parent_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = _start(tmp_path, "run_dir=r", "hooks.slow={_target_: slow.Slow}", "launch.max_restarts=1")
    _wait_for_steps(tmp_path / "r", 3, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143, output
    assert output.count("to go on: python -m runner ") == 1
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_that_comes_on_two_ways_is_one(tmp_path: Path, processes: int) -> None:
    """As of a scheduler that sends it to all processes of a job, of which a script hands it on."""
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from runner import distributed\n"
        "from runner.train.hook import Hook\n"
        "class Slow(Hook):\n"
        "    def on_step_end(self, run):\n"
        "        with open(f'pid_{distributed.rank()}', 'w') as file:\n"
        "            file.write(str(os.getpid()))\n"
        "        for _ in range(100):\n"
        "            time.sleep(0.01)\n"
    )
    words = ["backend=ddp", f"launch.nproc_per_node={processes}"] if processes > 1 else []
    process = _start(tmp_path, "run_dir=r", "hooks.slow={_target_: slow.Slow}", *words)
    _wait_for_steps(tmp_path / "r", 2, process)
    pids = {process.pid, *(int((tmp_path / f"pid_{rank}").read_text()) for rank in range(processes))}
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert Path(summary["checkpoint"]).name == f"step_{summary['steps']:08d}"
