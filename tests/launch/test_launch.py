"""The environment that is read, plans that travel to a worker, and how many processes are asked for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.data.main import NotRead
from runner.distributed import Ranks
from runner.errors import Elsewhere, InputError, Problem, RunnerError
from runner.launch import processes
from runner.launch.devices import cuda_count
from runner.launch.elastic import interface_of, own_address
from runner.launch.environment import Environment, first_host, tasks_per_node
from runner.launch.failure import failures, is_secondary, record, worded
from runner.launch.worker import WorkPlan, entry


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        words = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SLURM_", "TORCHELASTIC_", "ENVIRONMENT")
        if name.startswith((*words, "HYDRA_FULL_ERROR", "TERM")):
            monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, **variables: object) -> Environment:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return Environment.read()


def test_an_empty_environment() -> None:
    assert Environment.read() == Environment()


@pytest.mark.parametrize(("text", "full"), [("", False), ("0", False), ("1", True), ("true", True)])
def test_full_errors(monkeypatch: pytest.MonkeyPatch, text: str, full: bool) -> None:
    assert read(monkeypatch, HYDRA_FULL_ERROR=text).full_error is full


TORCHRUN = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": 29}


def test_the_ranks_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(monkeypatch, **TORCHRUN)
    assert found == Environment(Ranks(3, 4, 1, 2, ("h", 29)), "torchrun")
    found = read(monkeypatch, TORCHELASTIC_USE_AGENT_STORE="True")
    assert found.ranks is not None
    assert found.ranks.keep_store
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    found = Environment.read()
    assert found.ranks is not None
    assert found.ranks.local_world_size == 4


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": 1}, {"MASTER_ADDR": "h", "MASTER_PORT": 29}, {"WORLD_SIZE": " "}])
def test_one_process_is_no_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, object]) -> None:
    assert read(monkeypatch, **variables) == Environment()


def test_one_process_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, RANK=0, WORLD_SIZE=1) == Environment(Ranks(), "torchrun")


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"RANK": 0}, "LOCAL_RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR"),
        ({"WORLD_SIZE": 2}, "RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR"),
        ({"LOCAL_RANK": 1}, "RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR"),
        ({"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "h"}, "MASTER_PORT"),
    ],
)
def test_ranks_by_halves(monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], missing: str) -> None:
    found = read(monkeypatch, **variables)
    (problem,) = found.problems
    assert problem.why.endswith(f"without {missing}")
    assert all(f"{name}={value}" in problem.why for name, value in variables.items())
    assert found.ranks is None
    assert processes.check({}, found) == [problem]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("RANK", "x", "RANK=x in the environment is not a number"),
        ("RANK", 4, "RANK=4 in the environment is not below WORLD_SIZE=4"),
        ("LOCAL_RANK", 2, "LOCAL_RANK=2 in the environment is not below 2"),
        ("LOCAL_WORLD_SIZE", "two", "LOCAL_WORLD_SIZE=two in the environment is not a number"),
        ("MASTER_PORT", 0, "MASTER_PORT=0 in the environment is no port"),
        ("WORLD_SIZE", -1, "WORLD_SIZE=-1 in the environment is not a number"),
    ],
)
def test_ranks_that_cannot_be(monkeypatch: pytest.MonkeyPatch, name: str, value: object, why: str) -> None:
    found = read(monkeypatch, **{**TORCHRUN, name: value})
    assert [problem.why for problem in found.problems] == [why]
    assert found.ranks is None


# --- srun -----------------------------------------------------------------------------------------------------------

SRUN = {
    "SLURM_PROCID": 3,
    "SLURM_LOCALID": 1,
    "SLURM_NODEID": 1,
    "SLURM_NTASKS": 5,
    "SLURM_JOB_ID": 100,
    "SLURM_STEP_ID": 7,
    "SLURM_NODELIST": "n[07-08,11]",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}


def test_the_ranks_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **SRUN) == Environment(Ranks(3, 5, 1, 2, ("n07", 13107)), "srun")
    found = read(monkeypatch, MASTER_ADDR="other", MASTER_PORT=29)
    assert found.ranks is not None
    assert found.ranks.master == ("other", 29)


def test_srun_on_one_node_needs_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(monkeypatch, **{**SRUN, "SLURM_NODEID": 0, "SLURM_TASKS_PER_NODE": 5, "SLURM_LOCALID": 3})
    assert found.ranks == Ranks(3, 5, 3, 5, ("127.0.0.1", 13107))


@pytest.mark.parametrize("step", [4294967290, 4294967291, 4294967295, "batch"])
def test_a_batch_script_is_no_task_of_srun(monkeypatch: pytest.MonkeyPatch, step: object) -> None:
    assert read(monkeypatch, **{**SRUN, "SLURM_STEP_ID": step}) == Environment()


def test_a_single_task_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **{**SRUN, "SLURM_NTASKS": 1, "SLURM_PROCID": 0}) == Environment()


def test_torchrun_inside_of_srun_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **SRUN, **TORCHRUN).launcher == "torchrun"


def test_lists_of_slurm() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("x") == []
    hosts = {"a": "a", "a,b": "a", "n[1-3]": "n1", "n[007,9]": "n007", "n[1-2]-ib,x": "n1-ib", "gpu-2,gpu-1": "gpu-2"}
    assert {text: first_host(text) for text in hosts} == hosts


# --- how many -------------------------------------------------------------------------------------------------------


def config(**more: Any) -> dict[str, Any]:
    launch = {"nproc_per_node": None, "nnodes": 1, "node_rank": None, "rdzv_endpoint": None}
    top = {key: more.pop(key) for key in ("device", "backend") if key in more}
    return {"device": "auto", "backend": {"name": "auto"}, **top, "launch": {**launch, **more}}


@pytest.mark.parametrize(
    ("gpus", "given", "expected"),
    [
        (0, {}, 1),
        (4, {}, 4),
        (4, {"device": "cpu"}, 1),
        (4, {"backend": {"name": "single"}}, 1),
        (4, {"nproc_per_node": 2}, 2),
        (4, {"nproc_per_node": 2, "nnodes": 3}, 6),
        (0, {"nproc_per_node": "two", "nnodes": None}, 1),
    ],
)
def test_how_many(monkeypatch: pytest.MonkeyPatch, gpus: int, given: dict[str, Any], expected: int) -> None:
    monkeypatch.setattr(processes, "cuda_count", lambda: gpus)
    assert processes.processes(config(**given), Environment()) == expected
    under = Environment(Ranks(0, 8, 0, 4), "torchrun")
    assert processes.processes(config(**given), under) == 8


@pytest.mark.parametrize(
    ("gpus", "given", "why"),
    [
        (2, {"nproc_per_node": 4}, "4 processes want a GPU each, and there are 2 GPUs"),
        (1, {"nproc_per_node": 4, "device": "cuda"}, "4 processes want a GPU each, and there is one GPU"),
        (0, {"nproc_per_node": 4, "device": "cuda"}, "4 processes want a GPU each, and there is no GPU"),
        (0, {"nnodes": 2}, "2 nodes have to meet somewhere"),
        (0, {"nnodes": 2, "rdzv_endpoint": "host"}, "is not HOST:PORT"),
        (0, {"nnodes": 2, "rdzv_endpoint": "h:1", "node_rank": 2}, "nodes are numbered from 0, and launch.nnodes is 2"),
    ],
)
def test_what_cannot_be_launched(monkeypatch: pytest.MonkeyPatch, gpus: int, given: dict[str, Any], why: str) -> None:
    monkeypatch.setattr(processes, "cuda_count", lambda: gpus)
    assert [problem.why for problem in processes.check(config(**given), Environment())] == [why]


@pytest.mark.parametrize("given", [{"nproc_per_node": 4}, {"nproc_per_node": 4, "device": "cpu"}, {}])
def test_what_can_be_launched(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cuda_count", lambda: 0)
    assert processes.check(config(**given), Environment()) == []


def test_a_launcher_that_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cuda_count", lambda: 0)
    two = Environment(Ranks(0, 2, 0, 2), "torchrun")
    (problem,) = processes.check(config(nproc_per_node=4), two)
    assert problem.why == "the launcher started 2, and launch.nproc_per_node says 4"
    assert processes.check(config(nproc_per_node=2), two) == []


@pytest.mark.parametrize(
    ("launcher", "world", "restarts", "said"),
    [
        ("torchrun", 2, 3, "under torchrun, which starts the processes again itself: torchrun --max-restarts=3"),
        ("srun", 2, 3, "under srun: the scheduler starts the job again (sbatch --requeue)"),
        ("torchrun", 2, 0, None),
        ("torchrun", 1, 3, None),  # one process gets a parent of its own
        (None, 1, 3, None),
    ],
)
def test_restarts_that_have_no_effect(launcher: str | None, world: int, restarts: int, said: str | None) -> None:
    ranks = None if launcher is None else Ranks(0, world, 0, world)
    expected = [] if said is None else [f"launch.max_restarts=3 has no effect {said}"]
    assert processes.notes(config(max_restarts=restarts), Environment(ranks, launcher)) == expected


def test_gpus_are_counted_without_torch() -> None:
    program = "import sys; from runner.launch.devices import cuda_count; print(cuda_count(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{cuda_count()} False\n"


# --- plans and workers ----------------------------------------------------------------------------------------------


def plan(**more: Any) -> WorkPlan:
    values: dict[str, Any] = {
        "config": {"a": [1, 2.5, None, True], "ü": {"b": "c"}},
        "written": {"a": "${b}"},
        "command": ["+recipe=x", "a='b c'"],
        "directory": "/tmp/x y",
        "started": 1234.5678,
    }
    return WorkPlan(**{**values, **more})


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    made = plan(marks={"a.b": ["f.yaml", 1, 2]}, run_dir="r", terminal="xterm", full_error=True, report="/r")
    made.save(tmp_path / "plan.json")
    assert WorkPlan.load(tmp_path / "plan.json") == made


def test_an_entry_point_is_found_by_name() -> None:
    assert entry("runner.launch.worker:entry") is entry


def worker(folder: Path, source: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(source)
    plan(config={"x": "seen"}).save(folder / "plan.json")
    return subprocess.run(
        [sys.executable, "-m", "runner.launch.worker", "mine:work", "plan.json", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **variables},
    )


def test_a_worker_calls_its_entry_and_exits_with_its_code(tmp_path: Path) -> None:
    done = worker(tmp_path, "def work(plan, ranks):\n    print(plan.config['x'], ranks.world_size)\n    return 7\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "seen 1\n", "")


def test_a_worker_without_a_parent_tells_itself(tmp_path: Path) -> None:
    done = worker(tmp_path, "def work(plan, ranks):\n    raise ValueError('boom')\n")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("error: the run failed: ValueError: boom\n")


def test_a_worker_whose_parent_has_gone_does_nothing(tmp_path: Path) -> None:
    done = worker(tmp_path, "def work(plan, ranks):\n    print('here')\n    return 0\n", "--parent", "1234567")
    assert (done.returncode, done.stdout) == (1, "")


def test_a_worker_of_half_a_launcher(tmp_path: Path) -> None:
    done = worker(tmp_path, "def work(plan, ranks): return 0\n", RANK="1")
    assert done.returncode == 2
    assert "without LOCAL_RANK, WORLD_SIZE" in " ".join(done.stderr.split())


def test_a_worker_starts_without_torch_and_hydra(tmp_path: Path) -> None:
    program = (
        "import runner.launch.worker, runner.launch.local, runner.launch.elastic, sys, json\n"
        "print(json.dumps([m for m in ('torch', 'hydra', 'omegaconf') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == []


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_record_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ranks = Ranks(2, 4, 0, 2)
    record(plan(report=str(tmp_path)), ranks, InputError(Problem("a", "why", "fix", {1})), 2, told="x", go_on="y")
    record(plan(report=str(tmp_path)), ranks, ValueError("later"), 1)
    (found,) = failures(tmp_path)
    assert (found.rank, found.host, found.code, found.error) == (2, socket.gethostname(), 2, "a: why (fix: fix)")
    assert (found.told, found.go_on, found.secondary, found.traceback) == ("x", "y", False, None)
    assert found.problems == [{"key": "a", "why": "why", "fix": "fix", "value": "{1}"}]
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "ValueError: later"
    record(plan(report=str(tmp_path / "gone")), ranks, ValueError("x"), 1)  # nowhere to write: no second error


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GONE = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("error", "secondary"),
    [
        (GONE, True),
        (because(RunnerError("stopped"), because(RunnerError("could not be saved"), GONE)), True),
        (because(RunnerError("stopped"), ValueError("boom")), False),
        (because(InputError(Problem("a", "why", "fix")), GONE), False),
        (RunnerError("stopped"), False),
        (RuntimeError("[1] is setting up NCCL communicator … Socket Timeout"), True),
        (RuntimeError("wait timeout after 300000ms, keys: /x"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (Elsewhere("told by another"), True),
        (NotRead("the first process could not read the data"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("boom"), False),
    ],
)
def test_errors_that_follow_from_others(error: BaseException, secondary: bool) -> None:
    assert is_secondary(error) is secondary


@pytest.mark.parametrize(
    ("said", "how_sure"),
    [
        ("is killed by signal: Killed. ", "likely"),
        ("exited unexpectedly", "perhaps"),
        ("is killed by signal: Hangup. ", ""),
    ],
)
def test_a_data_worker_that_has_gone(said: str, how_sure: str) -> None:
    error = worded(RuntimeError(f"DataLoader worker (pid 7) {said}"), "data.train")
    if not how_sure:
        assert error == f"RuntimeError: DataLoader worker (pid 7) {said} (in data.train)"
        return
    advice = f"{how_sure} out of memory, try a smaller data.num_workers (in data.train)"
    assert error == f"RuntimeError: DataLoader worker (pid 7) {said.rstrip('. ')}: {advice}"


def test_a_data_worker_whose_end_is_the_cause() -> None:
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    error = because(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), killed)
    assert worded(error).endswith(" exited unexpectedly: likely out of memory, try a smaller data.num_workers")


def test_own_address() -> None:
    assert own_address("127.0.0.1:29400") == "127.0.0.1"
    assert own_address("no.such.host.invalid:29400") is None
    if Path("/sys/class/net/lo").exists():
        assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
