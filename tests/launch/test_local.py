"""The parent of one node's processes: codes, the first cause, signals, logs, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from parents import HERE, ROOT, Parent, alive, told

from runner.errors import RunnerError
from runner.launch import local, report
from runner.launch.report import Report
from runner.launch.worker import WorkPlan

Start = Callable[..., Parent]
HOST = socket.gethostname()


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def test_processes_know_their_place(start: Start) -> None:
    parent = start(3, do="describe", variables={"TORCHELASTIC_RUN_ID": "stale"})
    done = parent.end()
    assert (done.code, done.out, done.err) == (0, "", "")
    cores = len(os.sched_getaffinity(0))
    groups = set()
    for rank in range(3):
        found = told(parent.folder, rank)
        groups.add(found.pop("group"))
        assert found == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": str(max(1, cores // 3)),
            "ranks": [rank, 3, rank, 3],
            "torch": False,
        }
    assert len(groups) == 3
    assert list((parent.folder / "tmp").iterdir()) == []


@pytest.mark.parametrize(("config", "users", "expected"), [(None, "5", "5"), (3, "5", "3"), (3, None, "3")])
def test_threads(start: Start, config: int | None, users: str | None, expected: str) -> None:
    variables = {"OMP_NUM_THREADS": users} if users else {}
    parent = start(1, do="describe", launch={"threads": config}, variables=variables)
    assert parent.end().code == 0
    assert told(parent.folder, 0)["OMP_NUM_THREADS"] == expected


def test_the_first_error_is_told_last_and_once(start: Start) -> None:
    parent = start(3, **{"0": "lost", "1": "raise_", "2": "raise_late"})
    done = parent.end()
    assert done.code == 1
    assert last_line(done.err) == f"error: mlp failed: rank 1 on {HOST}: ValueError: boom in 1"
    assert done.err.count("Traceback") == 1
    assert "in raise_\n" in done.err
    assert "Connection closed" not in done.err
    assert parent.left() == []


def test_an_expected_error_has_no_traceback(start: Start) -> None:
    done = start(2, do="wait", **{"1": "stop_training"}).end()
    assert done.code == 1
    assert done.err == f"error: mlp failed after step 3: rank 1 on {HOST}: the loss is nan\n"
    assert done.out == "to go on: python -m runner run_dir=r\n"
    assert done.seconds < 10


def test_one_process_has_no_rank(start: Start) -> None:
    assert start(1, do="stop_training").end().err == "error: mlp failed after step 3: the loss is nan\n"


def test_wrong_input_is_shown_as_ever(start: Start) -> None:
    parent = start(2, do="wrong", plan={"marks": {"a.b": ["x.yaml", 3, 5]}})
    done = parent.end()
    assert (done.code, done.out) == (2, "")
    assert done.err == "1 problem in the configuration\n\nx.yaml:3:5: a.b = 3\n  is not right\n  fix: c would be\n"


def test_where_all_only_lost_each_other_the_first_is_told(start: Start) -> None:
    done = start(2, do="lost").end()
    assert done.code == 1
    assert "Connection closed by peer" in last_line(done.err)
    assert done.err.count("error: ") == 1


def test_a_killed_process_is_named(start: Start) -> None:
    parent = start(3, do="wait", **{"0": "lost", "2": "kill_oneself"})
    done = parent.end()
    assert done.code == 1
    assert last_line(done.err).startswith(
        f"error: mlp failed: rank 2 on {HOST}: killed (SIGKILL), likely out of memory"
    )
    assert done.seconds < 10
    assert parent.left() == []


def test_a_crash_shows_its_stack(start: Start) -> None:
    done = start(2, **{"1": "crash"}).end()
    assert last_line(done.err) == f"error: mlp failed: rank 1 on {HOST}: killed by SIGSEGV"
    assert "in crash" in done.err


def test_what_was_said_before_an_early_death(start: Start) -> None:
    done = start(2, do="wait", **{"1": "say_and_die"}).end()
    assert done.code == 1
    assert done.err == (
        f"rank 1 said:\nthe last words\nerror: mlp failed: rank 1 on {HOST}: ended with exit code 9 and no error\n"
    )


def test_what_was_said_in_the_log_before_a_death(start: Start) -> None:
    parent = start(2, **{"1": "say_in_log_and_die"})
    done = parent.end()
    assert "rank 1 said:\nbefore the log\ninto the log\nan error's words\nerror: " in done.err
    assert (parent.folder / "logs" / "rank_1.log").read_text() == "before the log\ninto the log\nan error's words\n"


def test_rank_0_speaks_and_the_others_have_logs(start: Start) -> None:
    parent = start(2, do="log")
    done = parent.end()
    assert (done.code, done.out, done.err) == (0, "early 0\nlate 0\nfrom below\n", "")
    assert {path.name for path in (parent.folder / "logs").iterdir()} == {"rank_1.log"}
    assert (parent.folder / "logs" / "rank_1.log").read_text() == "early 1\nlate 1\nfrom below\n"


def test_what_a_process_started_ends_with_it(start: Start) -> None:
    parent = start(2, do="with_a_child")
    assert parent.end().code == 0
    assert parent.left("child") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_reaches_all_and_they_end_in_order(start: Start, number: signal.Signals, code: int) -> None:
    parent = start(2, do="end_in_order")
    parent.wait_for("ready")
    parent.process.send_signal(number)
    done = parent.end()
    assert (done.code, done.out, done.err) == (code, "", "")
    assert [(parent.folder / f"saved_{rank}").read_text() for rank in range(2)] == [number.name] * 2
    assert parent.left() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_all_at_once(start: Start, number: signal.Signals, code: int) -> None:
    parent = start(2, do="deaf")
    parent.wait_for("ready")
    parent.process.send_signal(number)
    time.sleep(0.3)
    assert parent.process.poll() is None
    before = time.monotonic()
    parent.process.send_signal(number)
    done = parent.end()
    assert (done.code, done.err) == (code, "")
    assert time.monotonic() - before < 3
    assert parent.left() == []


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06, 0.1, 0.15])
def test_a_signal_at_the_start_is_not_lost(start: Start, delay: float) -> None:
    parent = start(3, do="wait")
    until = time.monotonic() + 20
    while not parent.children() and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(delay)
    parent.process.send_signal(signal.SIGTERM)
    done = parent.end()
    assert done.code == 75
    assert "Traceback" not in done.err
    assert parent.left() == []
    assert done.seconds < 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_to_a_process_that_cannot_hear_it(start: Start, number: signal.Signals, code: int) -> None:
    parent = start(2, do="deaf")
    parent.wait_for("ready")
    pids = [int((parent.folder / f"pid_{rank}").read_text()) for rank in range(2)]
    os.kill(pids[0], number)
    os.kill(pids[1], number)  # the same, as a scheduler sends it
    time.sleep(1)
    assert parent.process.poll() is None
    before = time.monotonic()
    os.kill(pids[1], number)
    done = parent.end()
    assert (done.code, done.err) == (code, "")
    assert time.monotonic() - before < 3
    assert parent.left() == []


def test_who_hears_no_signal_before_the_training_is_not_waited_for(start: Start) -> None:
    parent = start(2, **{"0": "deaf", "1": "end_in_order"})
    parent.wait_for("ready")
    before = time.monotonic()
    os.kill(int((parent.folder / "pid_1").read_text()), signal.SIGTERM)
    done = parent.end(60)
    assert (done.code, done.err) == (75, "")
    assert time.monotonic() - before < 5
    assert parent.left() == []


def test_those_that_save_get_time(start: Start) -> None:
    parent = start(2, **{"0": "save_slowly", "1": "preempted"})
    done = parent.end()
    assert (done.code, done.err) == (75, "")
    assert done.seconds > 4


#: A run with a folder, whose second attempt only starts. The parent's own `works`, in its folder.
AGAIN = """
import json, os, signal, time
from pathlib import Path
from runner.heartbeat import TRAIN, Heartbeat
from runner.launch.failure import tell_run
from runner.launch.report import BEAT, Report, file_of

def work(plan, ranks):
    run = Path("run")
    if ranks.attempt:
        Path(f"ready_{ranks.rank}").touch()
        time.sleep(60)
    (run / "logs").mkdir(parents=True)
    status = {"state": "running", "step": 6, "pid": os.getpid()}
    (run / "status.json").write_text(json.dumps(status))
    (run / "summary.json").write_text(json.dumps({"status": "completed", "steps": 4}))
    tell_run(plan, run, "python -m runner run_dir=run")
    Heartbeat(Report(plan.report).path(file_of(ranks.rank, BEAT))).beat(TRAIN, 7)
    if plan.config["do"] == "deaf":
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        Path(f"ready_{ranks.rank}").touch()
        for _ in range(600):
            time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run_again(tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    """Starts AGAIN in one process."""
    found: list[Parent] = []

    def begin(do: str, restarts: int, *, as_json: bool = False) -> Parent:
        (tmp_path / "works.py").write_text(AGAIN)
        (tmp_path / "tmp").mkdir()
        config = {"name": "mlp", "do": do, "launch": {"max_restarts": restarts}}
        plan = WorkPlan(config, {}, [], str(tmp_path), 0.0, json=as_json)
        found.append(Parent(tmp_path, 1, plan, {"PYTHONPATH": f"{tmp_path}:{HERE}:{ROOT}"}))
        return found[0]

    yield begin
    for parent in found:
        parent.process.kill()
        parent.process.communicate()


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_after_a_restart_says_how_to_go_on(run_again: Callable[..., Parent], as_json: bool) -> None:
    parent = run_again("kill", 2, as_json=as_json)
    parent.wait_for("ready")
    run = parent.folder / "run"
    status, summary = read(run / "status.json"), read(run / "summary.json")
    assert (status["state"], summary["status"]) == ("failed", "failed")  # a start that is killed has said nothing else
    assert "killed (SIGKILL)" in f"{status['reason']}"
    assert "killed (SIGKILL)" in f"{summary['error']}"
    parent.process.send_signal(signal.SIGTERM)
    done = parent.end()
    assert done.code == 75
    assert "to go on: python -m runner run_dir=run\n" in (done.err if as_json else done.out)
    assert as_json == (done.out == "")
    assert {"state": "interrupted", "reason": "SIGTERM", "step": 6}.items() <= read(run / "status.json").items()
    assert read(run / "summary.json") == {"status": "interrupted", "steps": 4}
    assert parent.left() == []


@pytest.mark.parametrize("refuses", [False, True])
def test_a_second_signal_says_how_to_go_on(run_again: Callable[..., Parent], refuses: bool) -> None:
    parent = run_again("deaf", 0)
    parent.wait_for("ready")
    run = parent.folder / "run"
    if refuses:
        (run / "status.json").unlink()
        (run / "status.json").mkdir()  # it cannot be replaced by a file
    for _ in range(2):
        parent.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    done = parent.end()
    assert (done.code, done.out, done.err) == (143, "to go on: python -m runner run_dir=run\n", "")
    if not refuses:
        assert {"state": "interrupted", "reason": "SIGTERM", "step": 6}.items() <= read(run / "status.json").items()
    assert read(run / "summary.json") == {"status": "completed", "steps": 4}


def test_a_restart_that_fails_in_its_start_says_how_to_go_on(run_again: Callable[..., Parent]) -> None:
    parent = run_again("kill", 1)
    parent.wait_for("ready")
    os.kill(parent.children()[0], signal.SIGKILL)
    done = parent.end()
    assert (done.code, done.out) == (1, "to go on: python -m runner run_dir=run\n")
    assert "(after restart 1)" in last_line(done.err)
    assert "(after restart 1)" in f"{read(parent.folder / 'run' / 'status.json')['reason']}"


def test_nobody_outlives_a_killed_parent(start: Start) -> None:
    parent = start(3, do="deaf")
    parent.wait_for("ready")
    pids = [int((parent.folder / f"pid_{rank}").read_text()) for rank in range(3)]
    assert all(alive(pid) for pid in pids)
    parent.process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 2
    while parent.left() and time.monotonic() < until:
        time.sleep(0.02)
    assert parent.left() == []


def test_ten_at_once(start: Start) -> None:
    parents = [start(2, do="describe") for _ in range(10)]
    assert [parent.end(60).code for parent in parents] == [0] * 10


def test_a_parent_that_cannot_start_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def limited(*words: object, **more: object) -> subprocess.Popen[bytes]:
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(real(["sleep", "60"], **more))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", limited)
    handlers = signal.getsignal(signal.SIGINT)
    with pytest.raises(RunnerError, match=r"process 3 of 4 cannot be started: .*temporarily unavailable"):
        local.supervise("works:work", WorkPlan({}, {}, [], str(tmp_path), 0.0), 4)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGINT) is handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


#: A parent whose system takes files away once so many are open; it says how many it has left open.
LIMITED = """
import os, resource, sys
from pathlib import Path
from runner.errors import RunnerError
from runner.launch import local
from runner.launch.worker import WorkPlan

local._FILES = -1000  # else it would not even try
before = os.listdir("/proc/self/fd")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
try:
    local.supervise("works:work", WorkPlan({"do": "wait"}, {}, [], os.getcwd(), 0.0), 8)
except RunnerError as error:
    print(error)
print(os.listdir("/proc/self/fd") == before)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux")
def test_a_parent_that_may_open_no_more_files(tmp_path: Path) -> None:
    """Wherever in the start it happens: one sentence, and nothing stays open, or behind."""
    (tmp_path / "tmp").mkdir()
    variables = {**os.environ, "PYTHONPATH": f"{HERE}:{ROOT}", "TMPDIR": str(tmp_path / "tmp")}
    told = set()
    for limit in range(5, 14):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit)],
            cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        said, nothing_left = done.stdout.splitlines()
        told.add(said)
        assert (nothing_left, done.stderr) == ("True", "")
        assert list((tmp_path / "tmp").iterdir()) == []
    assert any(said.startswith("process 3 of 8 cannot be started: ") for said in told), told
    assert all("`ulimit -n 4096`" in said for said in told if "Too many open files" in said)
    assert not [pid for path in tmp_path.glob("pid_*") if alive(pid := int(path.read_text()))]


def test_too_few_files_are_told_before_anything_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "files_allowed", lambda: 64.0)
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: pytest.fail("started"))
    with pytest.raises(RunnerError, match=r"^17 processes cannot be started: .* 66 files .* allows 64: .*ulimit -n"):
        local.supervise("works:work", WorkPlan({}, {}, [], str(tmp_path), 0.0), 17)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_files_in_memory_are_closed_where_not_all_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    create = os.memfd_create

    def limited(name: str) -> int:
        if len(made) == 5:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(create(name))
        return made[-1]

    monkeypatch.setattr(os, "memfd_create", limited)
    assert Report.in_memory(2) is None
    assert len(made) == 5
    for descriptor in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_files_in_memory_leave_some_for_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "files_allowed", lambda: 64.0)
    assert Report.in_memory(16) is None
    small = Report.in_memory(4)
    assert small is None or small.close() is None


def test_no_place_for_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*words: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    monkeypatch.setattr(Report, "in_memory", lambda nproc: None)
    with pytest.raises(RunnerError, match=r"no folder can be made .*No space left on device"):
        local.supervise("works:work", WorkPlan({}, {}, [], str(tmp_path), 0.0), 2)
