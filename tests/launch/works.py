"""Entry points for the tests of the launcher: what a process can do wrong, and right, without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runner.distributed import Ranks
from runner.errors import InputError as WrongInput
from runner.errors import Problem, TrainingStopped
from runner.heartbeat import SAVING, Heartbeat
from runner.launch.failure import record, redirect
from runner.launch.report import BEAT, Report, file_of
from runner.launch.worker import WorkPlan


def work(plan: WorkPlan, ranks: Ranks) -> int:
    """Does what the plan's configuration says: {"do": name for all, "1": name for rank 1 …}."""
    folder = Path(plan.directory)
    (folder / f"pid_{ranks.rank}").write_text(str(os.getpid()))
    name = plan.config.get(str(ranks.rank), plan.config.get("do", "nothing"))
    code = globals()[name](plan, ranks)
    return code if isinstance(code, int) else 0


def nothing(plan: WorkPlan, ranks: Ranks) -> None: ...


def describe(plan: WorkPlan, ranks: Ranks) -> None:
    variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    told: dict[str, Any] = {name: os.environ.get(name) for name in variables}
    told.update(ranks=[ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size], group=os.getpgrp())
    told["torch"] = "torch" in sys.modules
    Path(plan.directory, f"told_{ranks.rank}").write_text(json.dumps(told))


def seven(plan: WorkPlan, ranks: Ranks) -> int:
    return 7


def raise_(plan: WorkPlan, ranks: Ranks) -> None:
    raise ValueError(f"boom in {ranks.rank}")


def raise_late(plan: WorkPlan, ranks: Ranks) -> None:
    time.sleep(0.4)
    raise KeyError("a later one")


def lost(plan: WorkPlan, ranks: Ranks) -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def stop_training(plan: WorkPlan, ranks: Ranks) -> int:
    told, go_on = "mlp failed after step 3", "python -m runner run_dir=r"
    record(plan, ranks, TrainingStopped("the loss is nan"), 1, told=told, go_on=go_on)
    return 1


def wrong(plan: WorkPlan, ranks: Ranks) -> None:
    raise WrongInput(Problem("a.b", "is not right", "c would be", 3))


def wait(plan: WorkPlan, ranks: Ranks) -> None:
    time.sleep(60)


def kill_oneself(plan: WorkPlan, ranks: Ranks) -> None:
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def crash(plan: WorkPlan, ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def say_and_die(plan: WorkPlan, ranks: Ranks) -> None:
    print("the last words", flush=True)
    os._exit(9)


def say_in_log_and_die(plan: WorkPlan, ranks: Ranks) -> None:
    print("before the log")
    redirect(Path(plan.directory, "logs", f"rank_{ranks.rank}.log"))
    print("into the log")
    print("an error's words", file=sys.stderr)
    os._exit(9)


def log(plan: WorkPlan, ranks: Ranks) -> None:
    print(f"early {ranks.rank}")
    redirect(Path(plan.directory, "logs", f"rank_{ranks.rank}.log"))
    print(f"late {ranks.rank}")
    subprocess.run(["echo", "from below"], check=True)


def with_a_child(plan: WorkPlan, ranks: Ranks) -> None:
    child = subprocess.Popen(["sleep", "60"])
    Path(plan.directory, f"child_{ranks.rank}").write_text(str(child.pid))


def end_in_order(plan: WorkPlan, ranks: Ranks) -> int:
    """Like a training: the first signal ends it a moment later, with the code of an interrupted run."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    Path(plan.directory, f"ready_{ranks.rank}").touch()
    while not received:
        time.sleep(0.01)
    time.sleep(0.3 * (ranks.rank + 1))
    Path(plan.directory, f"saved_{ranks.rank}").write_text(signal.Signals(received[0]).name)
    return 130 if received[0] == signal.SIGINT else 75


def deaf(plan: WorkPlan, ranks: Ranks) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: None)
    Path(plan.directory, f"ready_{ranks.rank}").touch()
    for _ in range(600):
        time.sleep(0.1)


def save_slowly(plan: WorkPlan, ranks: Ranks) -> int:
    Heartbeat(Report(plan.report or "").path(file_of(ranks.rank, BEAT))).beat(SAVING, 1)
    Path(plan.directory, "saves").touch()
    time.sleep(4)
    return 75


def preempted(plan: WorkPlan, ranks: Ranks) -> int:
    while not Path(plan.directory, "saves").exists():
        time.sleep(0.01)
    return 75
