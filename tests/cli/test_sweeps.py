"""Sweeps: their folder, going on in it, what is written down, and JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Cli = Callable[..., int]

MINE = """\
import torch
from runner.train.hook import Hook


class Unlucky(torch.nn.Linear):
    def forward(self, x):
        raise RuntimeError("unlucky")


def net(width, api_key=None, options=None):
    if width == 13:
        return Unlucky(16, 4)
    return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Linear(width, 4))


class Slow(Hook):
    def on_step_end(self, run):
        import time
        time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def _module_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)


def sweep_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def test_a_sweep_whose_reader_goes_away_goes_on(tmp_path: Path) -> None:
    """`runner -m … | head -1`: the files have everything."""
    words = [sys.executable, "-m", "runner", "-m", "+recipe=smoke", "run_dir=sw", "seed=1,2", "train.steps=2"]
    process = subprocess.Popen([*words, "device=cpu"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("sweep of 2 jobs")
    process.stdout.close()
    assert process.wait(120) == 0
    assert [row["exit_code"] for row in sweep_json(tmp_path / "sw")["jobs"]] == [0, 0]


def test_the_command_of_a_job_that_failed_goes_on_with_that_job(
    cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = "model={_target_: mine.net, width: 13},{_target_: mine.net, width: 8}"
    assert cli("-m", "+recipe=smoke", "run_dir=sw", "train.steps=2", "checkpoint=none", model) == 1
    told = capfd.readouterr().out
    failed, done = sorted(path for path in (tmp_path / "sw").iterdir() if path.is_dir())
    (line,) = [line for line in told.splitlines() if line.startswith("to go on: ")]
    assert line.endswith(f" run_dir=sw/{failed.name}")
    assert line.count("run_dir=") == 1
    for folder in (failed, done):
        assert f" run_dir=sw/{folder.name}\n" in (folder / "overrides.txt").read_text()
        assert yaml.safe_load((folder / "config.yaml").read_text())["run_dir"] == f"sw/{folder.name}"
    command = (done / "overrides.txt").read_text().replace("python", sys.executable, 1)
    again = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "already complete" in again.stdout, again.stderr


@pytest.mark.parametrize("words", [["run_dir=a,b"], ["run_dir=x${seed}", "seed=1,2"], ["+recipe=one,two"]])
def test_a_sweep_has_one_folder(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / "recipes").mkdir(exist_ok=True)
        (tmp_path / "recipes" / f"{name}.yaml").write_text(f"defaults: [smoke]\nrun_dir: {name}\n")
    recipe = [] if words[0].startswith("+recipe") else ["+recipe=smoke"]
    before = {path.name for path in tmp_path.iterdir()}
    assert cli("-m", *recipe, *words) == 2
    assert "a sweep has one folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on(cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int) -> None:
    words = [
        "-m",
        "+recipe=smoke",
        "seed=1,2",
        "train.steps=40",
        "eval.every=never",
        "hooks.slow={_target_: mine.Slow}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + 60
        running: list[Path] = []
        while not running and time.monotonic() < deadline:
            found = (tmp_path / "runs").glob("*/1_seed=2/status.json")
            running = [path for path in found if json.loads(path.read_text())["step"] > 0]
            time.sleep(0.05)
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    folder = (tmp_path / "runs" / "latest").resolve()
    assert [job["status"] for job in sweep_json(folder)["jobs"]] == ["completed", "interrupted"]
    line = [line for line in told.splitlines() if line.startswith("to go on: python -m runner -m ")][-1]
    assert line.endswith(f" run_dir=runs/{folder.name}")

    command = line.removeprefix("to go on: ").replace("python", sys.executable, 1)
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "0_seed=1 is already complete" in done.stdout
    assert "goes on" in done.stdout
    assert [(job["status"], job["steps"]) for job in sweep_json(folder)["jobs"]] == [("completed", 40)] * 2


def test_secrets_of_a_sweep_are_not_written_down(cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = "model={_target_: mine.net, width: 8, options: {db_password: HUSH1234}}"
    words = ["+recipe=smoke", "train.steps=1", "checkpoint=none", "~trackers", model, "+model.api_key=HUSHA,HUSHB"]
    assert cli("-m", *words, "run_dir=sw") == 0
    found = sweep_json(tmp_path / "sw")
    assert found["command"][:2] == ["-m", "+recipe=smoke"]
    assert "+model.api_key=<redacted>" in found["command"]
    assert [job["overrides"] for job in found["jobs"]] == [["+model.api_key=<redacted>"]] * 2
    assert len({job["job"] for job in found["jobs"]}) == 2
    for path in [tmp_path / "sw" / "sweep.json", tmp_path / "sw" / "sweep.csv", *(tmp_path / "sw").iterdir()]:
        assert "HUSH" not in path.name
        assert path.is_dir() or "HUSH" not in path.read_text()
    told = capfd.readouterr()
    assert "HUSH" not in told.out + told.err


def test_notes_are_printed_once_and_json_comes_last(
    cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "precision").mkdir(parents=True)
    (tmp_path / "conf" / "precision" / "fp32.yaml").write_text("name: fp32\n")
    words = ["+recipe=smoke", "train.steps=1", "seed=1,2", "precision=fp32", "run_dir=sw"]
    assert cli("-m", "--json", *words) == 0
    told = capfd.readouterr().out
    assert told.count("precision fp32 is ./conf/precision/fp32.yaml, which replaces the built-in one") == 1
    assert json.loads(told[told.rindex("\n{") :]) == sweep_json(tmp_path / "sw")
    assert "samples/s  " not in told.splitlines()[-1]


def test_a_sweep_of_one(cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli("-m", "+recipe=smoke", "precision=fp32", "train.steps=1", "run_dir=sw") == 0
    assert [path.name for path in (tmp_path / "sw").iterdir() if path.is_dir()] == ["0"]
    told = capfd.readouterr().out
    assert "sweep of 1 job: sw\n" in told
    assert told.splitlines()[-1].split()[:2] == ["0", "completed"]


def test_a_sweep_of_words_beyond_ascii(cli: Cli, tmp_path: Path) -> None:
    assert cli("-m", "+recipe=smoke", "name=größe", "train.steps=1,2", "checkpoint=none", "run_dir=a;b") == 0
    assert [job["steps"] for job in sweep_json(tmp_path / "a;b")["jobs"]] == [1, 2]


def test_the_configuration_as_json(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("+recipe=smoke", "--cfg", "job", "--json", "--resolve") == 0
    found = json.loads(capsys.readouterr().out)
    assert cli("+recipe=smoke", "--cfg", "job", "--resolve") == 0
    assert found == yaml.safe_load(capsys.readouterr().out)


def test_info_has_no_json(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("+recipe=smoke", "--info", "--json") == 2
    assert "--cfg job --json" in capsys.readouterr().err


def test_a_word_that_is_no_verb(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("evaluate") == 2
    told = capsys.readouterr().err
    assert "1 problem" in told
    assert "there is no such verb" in told
    assert "verbs: recipes" in told
