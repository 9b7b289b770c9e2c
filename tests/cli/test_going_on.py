"""What a refused, failed, second or altered start does to a run that is there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

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


# --- links ------------------------------------------------------------------------------------------------------------

DIES = """
import os
from runner.train.hook import Hook
class Dies(Hook):
    def on_step_end(self, run):
        if run.progress.step == 2 and not os.path.exists("died"):
            open("died", "w").close()
            raise ValueError("once")
"""


def to_go_on(told: str) -> list[str]:
    """The words of the command that a run prints."""
    (line,) = [line for line in told.splitlines() if line.startswith("to go on: ")]
    return shlex.split(line.removeprefix("to go on: python -m runner "))


def latest(folder: Path) -> Path:
    return (folder / "runs" / "latest").resolve()


@pytest.mark.parametrize(
    "words",
    [
        ["init_from=runs/latest"],
        ["init_from={path: runs/latest, strict: false}"],
        ["init_from.path=runs/latest"],
        ["resume=runs/latest", "train.steps=6"],
    ],
)
def test_latest_is_never_the_new_run_itself(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "dies.py").write_text(DIES.replace("== 2", ">= 2"))
    given = ["+recipe=smoke", "train.steps=4", "checkpoint.every=null"]
    assert cli(*given) == 0
    old = latest(tmp_path)
    capsys.readouterr()
    command = [*given, *words, "hooks.dies={_target_: dies.Dies}"]
    if words[0].startswith("init_from.path"):
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes" / "mine.yaml").write_text("defaults: [smoke]\ninit_from: {path: gone/by/now}\n")
        command[0] = "+recipe=mine"
    assert cli(*command) == 1
    new = latest(tmp_path)
    assert new != old
    assert not (new / "checkpoints").exists() or not list((new / "checkpoints").iterdir())
    key = words[0].partition("=")[0].partition(".")[0]
    saved = yaml.safe_load((new / "config.yaml").read_text())[key]
    assert (saved["path"] if isinstance(saved, dict) else saved) == str(old)
    printed = to_go_on(capsys.readouterr().out)
    assert any(word in (f"{key}={old}", f"{key}.path={old}") for word in printed)
    assert cli(*printed) == 0
    told = capsys.readouterr().out
    assert ("init_from: 4 of 4 tensors" in told) == (key == "init_from")
    assert str(old.relative_to(tmp_path)) in told
    assert json.loads((new / "summary.json").read_text())["steps"] == (6 if key == "resume" else 4)


def test_latest_in_a_recipe(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("defaults: [smoke]\ninit_from: runs/latest\n")
    assert cli("+recipe=smoke", "train.steps=4") == 0
    old = latest(tmp_path)
    capsys.readouterr()
    assert cli("+recipe=mine", "train.steps=4", "hooks.dies={_target_: dies.Dies}") == 1
    printed = to_go_on(capsys.readouterr().out)
    assert f"init_from={old}" in printed
    assert cli(*printed) == 0
    assert f"from {old}" in capsys.readouterr().out


def test_a_restart_in_place_begins_from_what_latest_was(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    start = [sys.executable, "-m", "runner", "+recipe=smoke", "train.steps=4", "checkpoint.every=null"]
    subprocess.run(start, cwd=tmp_path, check=True, timeout=60)
    old = latest(tmp_path)
    words = ["init_from=runs/latest", "hooks.dies={_target_: dies.Dies}", "launch.max_restarts=2"]
    done = subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"from {old}") == 2


def test_the_jobs_of_a_sweep_begin_from_what_latest_was(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("+recipe=smoke", "train.steps=4") == 0
    old = latest(tmp_path)
    assert cli("-m", "+recipe=smoke", "train.steps=2", "init_from=runs/latest", "seed=1,2") == 0
    (new,) = {path.resolve() for path in (tmp_path / "runs").iterdir()} - {old}
    jobs = sorted(new.glob("*/config.yaml"))
    assert [yaml.safe_load(path.read_text())["init_from"] for path in jobs] == [str(old)] * 2
    assert f"init_from={old}" in (jobs[0].parent / "overrides.txt").read_text()


def test_the_command_that_was_typed_means_the_same_in_its_folder(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever `runs/latest` is by then, and whatever was typed in between."""
    first, typed = ["+recipe=smoke", "train.steps=4"], ["+recipe=smoke", "run_dir=r", "resume=runs/latest"]
    assert cli(*first) == 0
    old = latest(tmp_path)
    assert cli(*typed, "train.steps=6") == 0
    assert cli(*first, "seed=9") == 0
    assert latest(tmp_path) != old
    capsys.readouterr()
    assert cli(*typed, "train.steps=8") == 0
    assert "goes on  after step 6, from r/checkpoints/step_00000006" in capsys.readouterr().out
    assert cli(*first, "run_dir=r", f"resume={old}", "train.steps=10") == 0
    assert "goes on  after step 8" in capsys.readouterr().out
    assert cli(*typed, "train.steps=12") == 0
    assert "goes on  after step 10" in capsys.readouterr().out
    assert not list((tmp_path / "r" / "checkpoints").glob("left-*"))
    assert cli(*typed, "train.steps=12") == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_a_run_without_a_checkpoint_still_knows_what_was_meant(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    (tmp_path / "dies.py").write_text(DIES.replace("== 2", ">= 2"))
    assert cli("+recipe=smoke", "train.steps=2") == 0
    old = latest(tmp_path)
    words = ["+recipe=smoke", "run_dir=r", "train.steps=4", f"{key}=runs/latest", "checkpoint.every=null"]
    words += ["hooks.dies={_target_: dies.Dies}"]
    assert cli(*words) == 1
    assert cli("+recipe=smoke", "train.steps=2", "seed=9") == 0
    assert latest(tmp_path) != old
    capsys.readouterr()
    assert cli(*words) == 0
    assert str(old.relative_to(tmp_path)) in capsys.readouterr().out


def test_a_run_of_before_that_says_latest_goes_on(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.recipe import links

    typed = ["+recipe=smoke", "run_dir=r", "resume=runs/latest"]
    assert cli("+recipe=smoke", "train.steps=4") == 0
    with monkeypatch.context() as without:
        without.setattr(links, "follow", lambda *given: None)
        assert cli(*typed, "train.steps=6") == 0
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["resume"] == "runs/latest"
    assert cli("+recipe=smoke", "train.steps=4", "seed=9") == 0
    capsys.readouterr()
    assert cli(*typed, "train.steps=8") == 0
    assert "goes on  after step 6" in capsys.readouterr().out


def test_only_paths_with_links_are_changed(tmp_path: Path) -> None:
    from runner.recipe.links import command, follow

    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    (tmp_path / "it's, here").mkdir()
    (tmp_path / "link").symlink_to("it's, here")
    (tmp_path / "auto").symlink_to("model")
    for value in ("model", "./model", "model/model.safetensors", "gone", "org/name", "auto", "a\0b", "x" * 5000):
        config, written = {"resume": value, "init_from": None}, {"resume": value, "init_from": None}
        follow(config, written, tmp_path)
        assert config == written == {"resume": value, "init_from": None}
    config, written = {"resume": "auto", "init_from": "link"}, {"resume": "auto", "init_from": "${oc.env:PLACE}"}
    follow(config, written, tmp_path)
    there = str(tmp_path.resolve() / "it's, here")
    assert (config["init_from"], written["init_from"]) == (there, "link")
    from runner.recipe.overrides import parse

    assignments, problems = parse(command(["init_from=link", "seed=1"], config, written))
    assert ([one.value for one in assignments], problems) == ([there, 1], [])
    secret = {"resume": "auto", "init_from": "link"}
    follow(secret, hidden := {"resume": "auto", "init_from": "${oc.env:MY_TOKEN}"}, tmp_path)
    assert (secret["init_from"], hidden["init_from"]) == (there, "${oc.env:MY_TOKEN}")
