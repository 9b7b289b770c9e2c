"""Runs in several processes, from the command line: one folder, one story, one exit code."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from programs import begin, living

from runner.cli.train import composed
from runner.distributed import Ranks
from runner.launch.environment import Environment
from runner.recipe.overrides import parse_arguments

HOST = socket.gethostname()
MINE = """\
import os
import time
from runner import distributed
from runner.train.hook import Hook


class Bad(Hook):
    def __init__(self, kill=False):
        self.kill = kill

    def on_step_end(self, run):
        if distributed.rank() == 1 and run.progress.step == 3:
            if self.kill:
                os.kill(os.getpid(), 9)
            raise ValueError("boom")


class Slow(Hook):
    def on_step_end(self, run):
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def _module_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)


@pytest.fixture
def ended() -> Iterator[Any]:
    """Waits for a process, and gives its exit code and what it said; nothing of its session is left."""

    def end(process: subprocess.Popen[str], timeout: float = 90.0) -> tuple[int, str, str]:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert living(process.pid) == {}
        return process.returncode, out, err

    return end


TWO = ("+recipe=smoke", "device=cpu", "launch.nproc_per_node=2", "run_dir=r")


def test_two_processes_make_one_run(tmp_path: Path, ended: Any) -> None:
    code, out, err = ended(begin(tmp_path, *TWO))
    assert (code, err) == (0, "")
    assert out.count("completed: step 16") == 1
    assert "2 processes" in out
    run = tmp_path / "r"
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert {path.name for path in (run / "logs").iterdir()} == {"main.log", "rank_0.log", "rank_1.log"}
    assert "completed: step 16" in (run / "logs" / "rank_1.log").read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert len(steps) == 10


def test_the_first_failing_rank_is_told_last_and_once(tmp_path: Path, ended: Any) -> None:
    code, out, err = ended(begin(tmp_path, *TWO, "hooks.bad._target_=mine.Bad"))
    assert code == 1
    assert (
        err.rstrip().splitlines()[-1]
        == f"error: smoke failed after step 3: rank 1 on {HOST}: ValueError: boom (in hooks.bad)"
    )
    assert err.count("Traceback") == 1
    assert out.count("to go on: python -m runner +recipe=smoke") == 1


def test_a_rank_that_is_killed(tmp_path: Path, ended: Any) -> None:
    code, _, err = ended(begin(tmp_path, *TWO, "hooks.bad={_target_: mine.Bad, kill: true}"))
    assert code == 1
    assert f"rank 1 on {HOST}: killed (SIGKILL), likely out of memory" in err.rstrip().splitlines()[-1]


def test_wrong_input_of_several_processes_is_told_once(tmp_path: Path, ended: Any) -> None:
    code, out, err = ended(begin(tmp_path, *TWO, "+model.nonsense=3"))
    assert (code, out) == (2, ""), err
    assert err.startswith("1 problem in the configuration\n")
    assert err.count("nonsense") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_saves_and_the_command_goes_on(tmp_path: Path, ended: Any, number: int, code: int) -> None:
    words = (*TWO, "train.epochs=null", "log.every=1", "eval.every=never")
    process = begin(tmp_path, *words, "train.steps=1000", "hooks.slow._target_=mine.Slow")
    metrics = tmp_path / "r" / "metrics.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(number)
    asked = time.monotonic()
    found, out, err = ended(process)
    assert found == code, err
    assert time.monotonic() - asked < 10  # five seconds, on a computer that does nothing else
    assert out.count("to go on: ") == 1
    stopped = json.loads((tmp_path / "r" / "summary.json").read_text())["steps"]
    assert (tmp_path / "r" / "checkpoints" / f"step_{stopped:08d}" / "manifest.json").exists()
    found, out, err = ended(begin(tmp_path, *words, f"train.steps={stopped + 3}"))
    assert found == 0, err
    assert f"after step {stopped}" in out


def torchrun() -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_under_torchrun(tmp_path: Path, ended: Any) -> None:
    words = ("+recipe=smoke", "device=cpu", "run_dir=r", "launch.max_restarts=2")
    code, out, err = ended(begin(tmp_path, *words, program=torchrun()))
    assert code == 0, err
    assert out.count("launch.max_restarts=2 has no effect under torchrun, which starts the processes again itself") == 1
    assert out.count("completed: step 16") == 1
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["world_size"] == 2


def test_a_note_that_nobody_reads_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    invocation = parse_arguments(["+recipe=smoke", "device=cpu", "launch.max_restarts=2"])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        plan = composed(invocation, Environment(Ranks(0, 2, 0, 2), "torchrun"), 0.0)
    assert plan.config["launch"]["max_restarts"] == 2


def test_wrong_input_under_torchrun_is_told_once(tmp_path: Path, ended: Any) -> None:
    words = ("+recipe=smoke", "device=cpu", "optimizr.lr=1", "launch.nproc_per_node=4")
    code, out, err = ended(begin(tmp_path, *words, program=torchrun()))
    assert code == 1  # torchrun's own
    assert err.count("did you mean optimizer.lr?") == 1
    assert err.count("the launcher started 2, and launch.nproc_per_node says 4") == 1
    assert out == ""


def test_under_srun(tmp_path: Path, ended: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
    step |= {"SLURM_NODELIST": "node[1-1]", "MASTER_PORT": str(port)}
    tasks = [
        begin(
            tmp_path,
            *("+recipe=smoke", "device=cpu", "run_dir=r", "launch.max_restarts=2", "--json"),
            **{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    told = [ended(task) for task in tasks]
    assert [code for code, _, _ in told] == [0, 0], told
    assert json.loads(told[0][1])["steps"] == 16  # nothing else stands there
    assert told[0][2].startswith("launch.max_restarts=2 has no effect under srun: the scheduler starts the job again")
    assert "completed: step 16" in told[0][2]
    assert told[1][1:] == ("", "")


def test_a_port_in_use_under_a_launcher(tmp_path: Path, ended: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = begin(tmp_path, "+recipe=smoke", "device=cpu", **ranks, RANK="0", LOCAL_RANK="0")
        code, _, err = ended(process)
    assert code == 2
    assert f"port {port} of 127.0.0.1 is in use by another program" in err


def test_ranks_by_halves_are_told_to_runs_only(tmp_path: Path, ended: Any) -> None:
    code, _, err = ended(begin(tmp_path, "+recipe=smoke", RANK="0"))
    assert code == 2
    assert "RANK=0" in err
    assert ended(begin(tmp_path, "recipes", RANK="0"))[0] == 0


def test_a_sweep_of_jobs_in_two_processes(tmp_path: Path, ended: Any) -> None:
    words = (
        "+recipe=smoke",
        "device=cpu",
        "launch.nproc_per_node=2",
        "run_dir=s",
        "train.steps=2",
        "train.epochs=null",
    )
    code, _, err = ended(begin(tmp_path, "-m", *words, "seed=1,2"), 150)
    assert code == 0, err
    assert [job["status"] for job in json.loads((tmp_path / "s" / "sweep.json").read_text())["jobs"]] == [
        "completed"
    ] * 2
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "s").glob("*/summary.json")]
    assert [summary["world_size"] for summary in summaries] == [2, 2]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("device=cuda", "launch.nproc_per_node=64"), "64 processes want a GPU each"),
        (("device=cpu", "launch.nproc_per_node=2", "batch.global_size=33"), "33 = ? x ? x 2"),
        (("device=cpu", "launch.nnodes=2"), "2 nodes have to meet somewhere"),
    ],
)
def test_what_cannot_be_launched_is_told_before(tmp_path: Path, ended: Any, words: tuple[str, ...], why: str) -> None:
    code, out, err = ended(begin(tmp_path, "+recipe=smoke", *words, "run_dir=r"))
    assert (code, out) == (2, "")
    assert why in " ".join(err.split())
    assert not (tmp_path / "r").exists()
