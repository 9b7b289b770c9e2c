"""What a refused, failed, second or altered start does to a run that is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., int]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its logs."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "environment.json"}


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer=sgd", "resume_allow=[optimizer]"],
        ["hooks.ema={_target_: runner.hooks.ema.EMA, decay: 2}"],
        ["checkpoint.best={metric: accurcy, mode: max}"],
    ],
)
def test_a_refused_start_leaves_the_run_as_it_was(cli: Cli, tmp_path: Path, words: list[str]) -> None:
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=4") == 0
    before = contents(tmp_path / "r")
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=8", *words) == 2
    assert contents(tmp_path / "r") == before
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=8") == 0


def test_a_run_killed_between_its_last_save_and_what_that_removes(cli: Cli, tmp_path: Path) -> None:
    words = ["+recipe=smoke", "run_dir=r", "checkpoint={every: {steps: 2}, keep: 2}"]
    checkpoints = tmp_path / "r" / "checkpoints"
    assert cli(*words, "train.steps=4") == 0
    shutil.copytree(checkpoints / "step_00000002", tmp_path / "kept")
    assert cli(*words, "train.steps=6") == 0
    told = json.loads((tmp_path / "r" / "summary.json").read_text())["metrics"]
    (tmp_path / "kept").rename(checkpoints / "step_00000002")
    (tmp_path / "r" / "summary.json").unlink()
    assert cli(*words, "train.steps=6") == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000004", "step_00000006"]
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["metrics"] == told


@pytest.mark.parametrize(
    "words",
    [
        ["checkpoint.best={metric: accurcy, mode: max}"],
        ["hooks=[default,early_stop]", "hooks.early_stop.metric=foo"],
        ["hooks=[default,early_stop]", "data.eval=null"],
        ["model._args_.2.out_features=3"],
        ["data.train.classes=9"],
        ["hooks.progress.per_second=0", "hooks.ema={_target_: runner.hooks.ema.EMA, decay: 2}"],
    ],
)
def test_a_refused_start_leaves_no_folder(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli("+recipe=smoke", *words) == 2
    assert list((tmp_path / "runs").iterdir() if (tmp_path / "runs").exists() else []) == []
    assert "Traceback" not in capsys.readouterr().err


def test_all_that_cannot_be_built_is_told_at_once(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hooks.progress.per_second=0", "hooks.x={_target_: runner.hooks.ema.EMA, decay: 2}"]
    assert cli("+recipe=smoke", *words, "optimizer.weight_decay=-1", "scheduler=linear", "scheduler.warmup=99") == 2
    told = capsys.readouterr().err
    for key in ("hooks.x.decay = 2", "optimizer.weight_decay = -1", "scheduler.warmup = 99"):
        assert f"command line: {key}" in told
    assert "hooks.progress" in told
    assert told.startswith("4 problems")


def test_a_checkpoint_of_another_training_is_refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=4") == 0
    assert cli("+recipe=smoke", "run_dir=b", "resume=a", "train.steps=8", "seed=9") == 2
    assert "was 0 in the run that goes on" in capsys.readouterr().err


def test_another_precision_is_warned_of(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=4") == 0
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=8", "precision=bf16") == 0
    assert "warning: precision was fp32 and is bf16" in capsys.readouterr().out


def test_hooks_with_state_come_and_go(cli: Cli, tmp_path: Path) -> None:
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=4", "hooks=[default,early_stop]") == 0
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=8", "hooks=[default,ema]") == 0
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=12") == 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["steps"] == 12


def test_a_program_that_ends_itself_is_a_failure(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ends.py").write_text(
        "import sys\n"
        "from runner.train.hook import Hook\n"
        "class Ends(Hook):\n"
        "    def on_step_end(self, run):\n"
        "        sys.exit(0)\n"
    )
    assert cli("+recipe=smoke", "run_dir=r", "hooks.ends={_target_: ends.Ends}") == 1
    assert "SystemExit" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "failed"


def test_a_tracker_that_cannot_be_built_does_not_lose_the_run(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.py").write_text("class Odd:\n    def __init__(self):\n        raise RuntimeError('no service')\n")
    assert cli("+recipe=smoke", "run_dir=r", "trackers.odd={_target_: odd.Odd}") == 0
    assert "warning: tracker odd is left out; the run goes on: RuntimeError: no service" in capsys.readouterr().out


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "runner", "+recipe=smoke", "train.steps=100000", "run_dir=r"]
    first = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "r" / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        second = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert f"another process trains there (host {os.uname().nodename}, process {first.pid}" in " ".join(
            second.stderr.split()
        )
    finally:
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=60)
    assert first.returncode == 130, output
    assert not (tmp_path / "r" / ".lock").exists()


def test_a_signal_before_the_first_step_has_nothing_to_save(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(30)\n")
    words = [sys.executable, "-m", "runner", "+recipe=smoke", "model={_target_: slow.Net}"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert "before the first step: nothing to save" in output
