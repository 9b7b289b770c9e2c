"""A job in this process: its folder, its end, and what must not get into its files."""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import Result, config, run_job, spec

from runner import distributed
from runner.errors import InputError

Job = Callable[..., Result]


def status(result: Result) -> dict[str, Any]:
    return json.loads((result.path / "status.json").read_text())


def hooks(name: str, **arguments: Any) -> dict[str, Any]:
    return {**config()["hooks"], "more": spec(f"small.{name}", **arguments)}


def test_a_finished_job(job: Job) -> None:
    result = job(train__epochs=1)
    summary = result.summary
    assert result.code == 0
    assert (summary["status"], summary["steps"], summary["samples"], summary["world_size"]) == ("completed", 7, 50, 1)
    assert (summary["backend"], summary["precision"], summary["device"]) == ("single", "fp32", "cpu")
    assert summary["metrics"] == result.eval[-1]
    assert summary["checkpoint"].endswith("checkpoints/step_00000007")
    assert len(summary["peak_memory_bytes"]) == 1
    assert 0 < summary["train_seconds"] < 60
    assert (status(result)["state"], status(result)["step"]) == ("completed", 7)
    written = yaml.safe_load((result.path / "config.yaml").read_text())
    assert written["optimizer"] == config()["optimizer"]
    assert (result.path / "overrides.txt").read_text() == "python -m runner +recipe=small\n"
    environment = json.loads((result.path / "environment.json").read_text())
    assert (environment["world_size"], environment["threads"]) == (1, torch.get_num_threads())


def test_samples_a_second_count_this_process_only(job: Job) -> None:
    job(hooks=hooks("Interrupt", step=4))
    result = job()
    summary = result.summary
    assert summary["samples"] == 100
    assert summary["samples_per_second"] > 0
    assert result.train[-1]["time"] <= summary["train_seconds"]
    times = [record["time"] for record in result.train]
    assert times == sorted(times)


def test_a_failed_job(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    result = job(hooks=hooks("Crash", step=3))
    assert result.code == 1
    assert (result.summary["status"], result.summary["error"]) == (
        "failed",
        "RuntimeError: crash on purpose (in hooks.more)",
    )
    assert (status(result)["state"], status(result)["step"]) == ("failed", 3)
    assert "Traceback" in (result.path / "logs" / "error.txt").read_text()
    assert "crash on purpose" in capsys.readouterr().err
    assert isinstance(result.watch.error, RuntimeError)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_real_signal(job: Job, number: signal.Signals, code: int) -> None:
    result = job(hooks=hooks("Raise", step=3, number=int(number)))
    assert result.code == code
    assert (result.summary["status"], result.summary["steps"]) == ("interrupted", 3)
    assert (status(result)["state"], status(result)["reason"]) == ("interrupted", number.name)
    assert result.eval == []


@pytest.mark.parametrize("where", ["check", "assemble"])
def test_a_signal_in_a_start_that_comes_out_as_another_error(
    job: Job, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Late:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGTERM)

    # As in the import of a library; Python 3.11 makes a RuntimeError of it.
    monkeypatch.setattr(f"runner.job.{where}", lambda *arguments, **more: type("Owner", (), {"late": Late()}))
    assert job().code == 75


def test_a_signal_at_the_very_end_changes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    leave, came = distributed.leave, []

    def late(**how: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        came.append(True)
        leave(**how)

    monkeypatch.setattr(distributed, "leave", late)
    result = job(train__epochs=1)
    assert came
    assert result.code == 0
    assert result.summary["status"] == "completed"


def test_signals_are_put_back(job: Job) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    job(train__epochs=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert not any(isinstance(handler, logging.FileHandler) for handler in logging.getLogger("runner").handlers)


def test_a_job_in_another_thread(job: Job) -> None:
    """As in a notebook: signals belong to somebody else."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(job(train__epochs=1).code))
    thread.start()
    thread.join(60)
    assert codes == [0]


def test_resume_never_refuses_a_folder_that_is_used(job: Job) -> None:
    job(train__epochs=1)
    with pytest.raises(InputError) as caught:
        job(train__epochs=2, resume="never")
    assert caught.value.problems[0].key == "resume"


def test_another_run_goes_on_from_a_checkpoint_that_is_named(job: Job, tmp_path: Path) -> None:
    whole = job("whole")
    job("first", hooks=hooks("Interrupt", step=4))
    second = job("second", resume=str(tmp_path / "first"))
    assert second.watch.losses == whole.watch.losses[4:]
    assert [record["step"] for record in second.train] == list(range(5, 15))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"optimizer": spec("torch.optim.AdamW", lr=0.5, weight_decay=0.01, no_decay=["bias"])}, "optimizer.lr"),
        ({"batch__global_size": 4}, "batch.global_size"),
        ({"model": spec("small.mlp", dropout=0.5)}, "model.dropout"),
    ],
)
def test_what_would_be_another_training_is_refused(job: Job, change: dict[str, Any], key: str) -> None:
    job(hooks=hooks("Interrupt", step=4))
    with pytest.raises(InputError) as caught:
        job(**change)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert job(**change, resume_allow=[key.partition(".")[0] if key != "batch.global_size" else key]).code == 0


def test_no_secret_gets_into_any_file(tmp_path: Path, quiet: None) -> None:
    """Nor into the checkpoints, which hold the configuration as well."""
    from runner.job import work
    from runner.launch.worker import WorkPlan

    canary = "canary-5f1d"
    settings = config(train__epochs=1)
    settings["hooks"] = {
        **settings["hooks"],
        "mine": spec("test_job.Keeps", api_token=canary, url=f"https://{canary}@host"),
    }
    written = config(train__epochs=1)
    written["hooks"] = {
        **written["hooks"],
        "mine": spec("test_job.Keeps", api_token=canary, url="https://${oc.env:MY_TOKEN}@host"),
    }
    plan = WorkPlan(settings, written, [f"hooks.mine.api_token={canary}"], str(tmp_path), 0.0, run_dir="run")
    assert work(plan) == 0
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]
    assert [str(path.relative_to(tmp_path)) for path in found] == []


class Keeps:
    """A hook that is given secrets."""

    def __init__(self, api_token: str, url: str) -> None:
        self.api_token, self.url = api_token, url


def test_a_folder_that_is_no_run(tmp_path: Path, quiet: None) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds no run"):
        run_job(tmp_path, config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_the_best_checkpoint_may_be_the_last(job: Job) -> None:
    """Saved every 7 steps, evaluated only at the end: the last checkpoint has the metrics of the last evaluation."""
    best = {"metric": "accuracy", "mode": "max"}
    saving = {**config()["checkpoint"], "every": {"steps": 7}, "best": best}
    result = job(checkpoint=saving, eval__every="never")
    found = result.summary["best"]
    assert (found["metric"], found["value"], found["step"]) == ("accuracy", result.eval[-1]["accuracy"], 14)


def saved(result: Result) -> list[int]:
    return sorted(int(path.name[5:]) for path in (result.path / "checkpoints").glob("step_*"))


def test_going_back_in_a_folder_sets_the_later_checkpoints_aside(job: Job, tmp_path: Path) -> None:
    every: dict[str, Any] = {"checkpoint__every": {"steps": 2}, "checkpoint__keep": 2}
    whole = job(**every, checkpoint__milestones=2)
    assert saved(whole) == [2, 4, 6, 8, 10, 12, 14]
    back = tmp_path / "run" / "checkpoints" / "step_00000004"
    cut = job(**every, resume=str(back), hooks=hooks("Interrupt", step=7))
    assert cut.code == 75
    assert cut.watch.losses == whole.watch.losses[4:7]
    assert saved(cut) == [4, 6, 7]  # what is named stays
    (left,) = (tmp_path / "run" / "checkpoints").glob("left-*")
    assert sorted(path.name[-2:] for path in left.iterdir()) == ["06", "08", "10", "12", "14"]
    # A scheduler repeats the command: it goes on, and does not go back again.
    rest = job(**every, resume=str(back))
    assert rest.code == 0
    assert rest.watch.losses == whole.watch.losses[7:]
    assert [record["step"] for record in rest.train] == list(range(1, 15))
    assert job(**every, resume=str(back)).watch.losses == []
    assert len(list((tmp_path / "run" / "checkpoints").glob("left-*"))) == 1


def test_a_command_that_names_another_runs_checkpoint_can_be_repeated(job: Job, tmp_path: Path) -> None:
    whole = job("whole")
    job("first", hooks=hooks("Interrupt", step=4))
    cut = job("second", resume=str(tmp_path / "first"), hooks=hooks("Interrupt", step=9))
    assert cut.watch.losses == whole.watch.losses[4:9]
    assert job("second", resume=str(tmp_path / "first")).watch.losses == whole.watch.losses[9:]


def test_another_runs_checkpoint_in_a_folder_with_its_own_sets_those_aside(job: Job, tmp_path: Path) -> None:
    whole = job("whole")
    job("first", hooks=hooks("Interrupt", step=4))
    assert job("whole", resume=str(tmp_path / "first")).watch.losses == whole.watch.losses[4:]
    assert saved(whole) == [14]
    assert len(list((tmp_path / "whole" / "checkpoints").glob("left-*/step_*"))) == 1
