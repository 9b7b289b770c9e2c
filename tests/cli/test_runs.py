"""Runs from the command line: the folder, the numbers, going on, exit codes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

Cli = Callable[..., int]


def records(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if split in (None, record["split"])]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_leaves_the_folder_of_the_interface(cli: Cli, tmp_path: Path) -> None:
    assert cli("+recipe=smoke") == 0
    (run,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert (tmp_path / "runs" / "latest").resolve() == run
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "overrides.txt",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "summary.json",
        "logs",
        "tensorboard",
        "checkpoints",
    }
    assert (run / "overrides.txt").read_text() == "python -m runner +recipe=smoke\n"
    assert {path.name for path in (run / "logs").iterdir()} == {"main.log", "rank_0.log"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["batch"] == {"global_size": 32, "micro_size": 32}
    assert config["accumulation"] == {"steps": 1}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["world_size"] == 1
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("completed", 16)


def test_records_and_summary_have_the_keys_and_numbers_of_the_interface(cli: Cli, tmp_path: Path) -> None:
    assert cli("+recipe=smoke", "run_dir=r") == 0
    training = records(tmp_path / "r", "train")
    assert [record["step"] for record in training] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [record["samples"] for record in training] == [64 * n for n in range(1, 9)]
    assert [record["epoch"] for record in training] == [n / 4 for n in range(1, 9)]
    for record in training:
        assert {"split", "step", "epoch", "samples", "loss", "lr", "grad_norm", "time", "samples_per_second"} <= set(
            record
        )
    evaluations = records(tmp_path / "r", "eval")
    assert [(record["step"], record["samples"]) for record in evaluations] == [(8, 64), (16, 64)]
    told = summary(tmp_path / "r")
    assert told["status"] == "completed"
    assert (told["steps"], told["samples"], told["world_size"]) == (16, 512, 1)
    assert (told["backend"], told["precision"]) == ("single", "fp32")
    assert told["metrics"]["accuracy"] == evaluations[-1]["accuracy"]
    assert len(told["peak_memory_bytes"]) == 1
    assert told["peak_memory_bytes"][0] > 50e6
    assert Path(told["checkpoint"]).name == "step_00000016"
    assert {"train_seconds", "samples_per_second", "startup_seconds", "best"} <= set(told)


def test_the_same_command_goes_on_where_a_run_stopped(cli: Cli, tmp_path: Path) -> None:
    """A run in two parts is the run in one: weights, losses, and each step once."""
    assert cli("+recipe=smoke", "run_dir=parts", "train.steps=5", "log.every=1") == 0
    assert cli("+recipe=smoke", "run_dir=parts", "train.steps=13", "log.every=1") == 0
    assert cli("+recipe=smoke", "run_dir=whole", "train.steps=13", "log.every=1") == 0
    name = "checkpoints/step_00000013/rank_0.safetensors"
    parts, whole = load_file(tmp_path / "parts" / name), load_file(tmp_path / "whole" / name)
    for key in whole:
        if not key.startswith("random/"):
            assert parts[key].equal(whole[key]), key
    assert [r["step"] for r in records(tmp_path / "parts", "train")] == list(range(1, 14))
    losses = [[r["loss"] for r in records(tmp_path / name, "train")] for name in ("parts", "whole")]
    assert losses[0] == losses[1]
    assert summary(tmp_path / "parts")["samples"] == 13 * 32


def test_a_finished_run_says_so(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("+recipe=smoke", "run_dir=r") == 0
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    told = summary(tmp_path / "r")
    capsys.readouterr()
    assert cli("+recipe=smoke", "run_dir=r") == 0
    assert "already complete: 16 steps; a larger train.steps or train.epochs extends it" in capsys.readouterr().out
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before
    assert summary(tmp_path / "r") == told


def test_a_finished_run_is_not_taken_for_another_one(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is named twice by mistake: what is asked for would not run, and nobody would know."""
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=4", "checkpoint=none") == 0
    told = summary(tmp_path / "r")
    capsys.readouterr()
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=4", "checkpoint=none", "optimizer.lr=0.5", "seed=3") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "2 problems" in said
    assert "optimizer.lr = 0.5 was 0.001 in the run that is complete there fix: give back what it was, or" in said
    assert cli("+recipe=mlp_synthetic", "run_dir=r", "train.epochs=null", "train.steps=4") == 2
    assert "data.train._target_" in capsys.readouterr().err
    words = ["optimizer.lr=0.5", "resume_allow=[optimizer]", "precision=bf16", "log.every=1", "train.steps=3"]
    assert cli("+recipe=smoke", "run_dir=r", "checkpoint=none", *words) == 0
    said = capsys.readouterr().out
    assert "already complete: 4 steps" in said
    assert "optimizer.lr 0.001 -> 0.5" in said
    assert "precision.name fp32 -> bf16" in said
    assert "(without effect, because nothing is left to do)" in said
    assert summary(tmp_path / "r") == told


def test_a_signal_before_the_first_step_is_no_wrong_input(cli: Cli, tmp_path: Path) -> None:
    """While one step is evaluated beforehand, to see whether there is the metric that is waited for."""
    (tmp_path / "called_off.py").write_text(
        "import signal\n"
        "from runner.data.synthetic import separable_classification\n"
        "class Data:\n"
        "    of = separable_classification(64, 16, 4, seed=1)\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, index):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        return self.of[index]\n"
    )
    early = "hooks.early_stop={_target_: runner.hooks.early_stop.EarlyStop}"
    assert cli("+recipe=smoke", "run_dir=r", "data.eval={_target_: called_off.Data}", early) == 75


def test_wrong_input_leaves_a_folder_that_was_there_as_it_was(cli: Cli, tmp_path: Path) -> None:
    """One with hidden files only counts as empty; what is in it is the user's."""
    (tmp_path / "mine" / ".git").mkdir(parents=True)
    (tmp_path / "mine" / ".git" / "HEAD").write_text("ref")
    assert cli("+recipe=smoke", "run_dir=mine", "optimizer.betas=[2.0,0.9]") == 2
    model = "{_target_: torch.nn.Linear, in_features: 15, out_features: 4}"
    assert cli("+recipe=smoke", "run_dir=mine", f"model={model}", "device=cpu") in (1, 2)
    early = "hooks.early_stop={_target_: runner.hooks.early_stop.EarlyStop, metric: nothing}"
    assert cli("+recipe=smoke", "run_dir=other", early) == 2
    assert not (tmp_path / "other").exists()
    (tmp_path / "third" / ".git").mkdir(parents=True)
    assert cli("+recipe=smoke", "run_dir=third", early) == 2
    assert [path.name for path in (tmp_path / "third").iterdir()] == [".git"]
    assert (tmp_path / "mine" / ".git" / "HEAD").read_text() == "ref"


def test_a_run_that_is_named_and_has_nothing_left_says_so(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("+recipe=smoke", "run_dir=a") == 0
    for words in (["resume=a"], ["resume=a/checkpoints/step_00000016", "run_dir=b"]):
        capsys.readouterr()
        assert cli("+recipe=smoke", *words) == 0
        assert "a is already complete: 16 steps; a larger" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    # Nor is another run's folder emptied for it.
    assert cli("+recipe=smoke", "run_dir=b", "train.steps=4") == 0
    assert cli("+recipe=smoke", "run_dir=b", "resume=a") == 0
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["step_00000004"]
    assert summary(tmp_path / "b")["steps"] == 4


@pytest.mark.parametrize("more", [[], ["checkpoint=none"]])
def test_a_command_is_repeated_though_what_it_begins_from_has_gone(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """A scheduler repeats a command; the other run has gone on meanwhile, and pruned its checkpoint."""
    assert cli("+recipe=smoke", "run_dir=a", "train.steps=4") == 0
    source = tmp_path / "a" / "checkpoints" / "step_00000004"
    words = ["+recipe=smoke", "run_dir=b", f"resume={source}", "train.steps=8", *more]
    if not more:
        crash = "hooks.crash={_target_: small.Crash, step: 7}"
        assert cli(*words, "checkpoint.every.steps=2", crash) == 1
        shutil.rmtree(source)
        capsys.readouterr()
    assert cli(*words) == 0
    assert ("goes on  after step 6" if not more else "goes on  after step 4") in capsys.readouterr().out
    if more:
        shutil.rmtree(source)
    assert cli(*words) == 0
    assert "already complete: 8 steps" in capsys.readouterr().out


def test_going_back_without_checkpoints_sets_aside_what_came_later(cli: Cli, tmp_path: Path) -> None:
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=8", "checkpoint.every.steps=4") == 0
    first = "resume=r/checkpoints/step_00000004"
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=6", "checkpoint=none", first) == 0
    assert [path.name for path in (tmp_path / "r" / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert len(list((tmp_path / "r" / "checkpoints").glob("left-*/step_00000008"))) == 1


def test_a_run_without_a_checkpoint_begins_anew_and_says_so(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=4", "checkpoint=none") == 0
    assert "begins   anew" not in capsys.readouterr().out
    assert cli("+recipe=smoke", "run_dir=r", "train.steps=6") == 0
    assert "begins   anew: what ran in this folder before has left no checkpoint" in capsys.readouterr().out
    assert [r["step"] for r in records(tmp_path / "r", "train")] == [2, 4, 6]


def test_another_run_goes_on_from_a_checkpoint(cli: Cli, tmp_path: Path) -> None:
    assert cli("+recipe=smoke", "run_dir=a", "train.epochs=1") == 0
    assert cli("+recipe=smoke", "run_dir=b", "train.epochs=2", "resume=a") == 0
    assert [r["step"] for r in records(tmp_path / "b", "train")] == [10, 12, 14, 16]
    assert cli("+recipe=smoke", "run_dir=c", "train.epochs=2") == 0
    assert records(tmp_path / "b", "eval")[-1] == records(tmp_path / "c", "eval")[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resume=never"], "is not empty"),
        (["train.epochs=3", "optimizer.lr=0.5"], "was 0.001 in the run that goes on"),
        (["train.epochs=3", "seed=1"], "was 0 in the run that goes on"),
        (["train.epochs=3", "batch.global_size=16"], "was 32 in the run that goes on"),
    ],
)
def test_what_would_make_it_another_training_is_refused(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli("+recipe=smoke", "run_dir=r") == 0
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    assert cli("+recipe=smoke", "run_dir=r", *words) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_a_change_that_is_allowed_applies(cli: Cli, tmp_path: Path) -> None:
    assert cli("+recipe=smoke", "run_dir=r") == 0
    assert cli("+recipe=smoke", "run_dir=r", "train.epochs=3", "optimizer.lr=0.5", "resume_allow=[optimizer.lr]") == 0
    rates = [r["lr"] for r in records(tmp_path / "r", "train")]
    assert rates == [0.001] * 8 + [0.5] * 4


def test_a_folder_that_is_no_run_is_left_alone(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    assert cli("+recipe=smoke", "run_dir=mine") == 2
    assert "holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_wrong_input_leaves_no_folder(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("+recipe=smoke", "optimizer.lrr=1", "task.nope=2") == 2
    told = capsys.readouterr().err
    assert "2 problems" in told
    assert "did you mean lr?" in told
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train.samples=0"], "data.train is empty"),
        (["task.num_classes=3"], "is outside the 3 classes 0 to 2"),
        (["precision=tf32", "device=cpu"], "cpu has no TF32"),
        (["optimizer._target_=torch.optim.AdamV"], "did you mean torch.optim.Adam"),
        (["optimizer._target_=torch.optim"], "is a module, which cannot be called"),
        (["model={_target_: no_such_package.Net}"], "no_such_package"),
        (["model._args_.0.in_features=abc"], "must be a whole number"),
        (["data.drop_last=true", "batch.global_size=512"], "256 samples are fewer than batch.global_size=512"),
        (["data.group_by_length=true"], "has no `lengths`"),
        (["scheduler=linear", "scheduler.warmup=99"], "the warm-up of 99 steps is longer than the run of 16"),
        (["optimizer.betas=[2.0,0.9]"], "torch.optim.AdamW refused: ValueError: Invalid beta parameter"),
        (["hooks.mine={_target_: builtins.dict, on_step: 1}", "hooks.early_stop={_target_: nowhere.Stop}"], "nowhere"),
        (["data.train={_target_: torch.load, f: missing.pt}"], "data.train missing.pt No such file"),
    ],
)
def test_what_only_building_shows(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli("+recipe=smoke", *words) == 2
    told = " ".join(capsys.readouterr().err.replace(" = ", " ").split())
    assert said in told
    assert "Traceback" not in told


def test_a_failing_hook_fails_the_run_and_says_how_to_go_on(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from runner.train.hook import Hook\n"
        "class Bad(Hook):\n"
        "    def on_step_end(self, run):\n"
        "        if run.progress.step == 3:\n"
        "            raise ValueError('my own mistake')\n"
    )
    assert cli("+recipe=smoke", "run_dir=r", "hooks.bad={_target_: mine.Bad}") == 1
    told = capsys.readouterr()
    assert "my own mistake" in told.err
    assert told.err.splitlines()[-1] == "error: smoke failed after step 3: ValueError: my own mistake (in hooks.bad)"
    assert "to go on: python -m runner +recipe=smoke run_dir=r 'hooks.bad=" in told.out
    failed = summary(tmp_path / "r")
    assert (failed["status"], failed["error"]) == ("failed", "ValueError: my own mistake (in hooks.bad)")
    assert "on_step_end" in (tmp_path / "r" / "logs" / "error.txt").read_text()


def test_a_sweep_goes_on_past_a_bad_job_and_compares(
    cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net(width):\n"
        "    if width == 13:\n"
        "        raise RuntimeError('unlucky')\n"
        "    return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Linear(width, 4))\n"
    )
    words = ["+recipe=smoke", "-m", "model={_target_: mine.net, width: 13},{_target_: mine.net, width: 8}"]
    assert cli(*words, "run_dir=s", "train.steps=4", "precision=fp32") == 1
    told = capfd.readouterr()
    jobs = json.loads((tmp_path / "s" / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["failed", "completed"]
    assert "unlucky" in jobs[0]["error"]
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    assert float(rows[1]["accuracy"]) == jobs[1]["metrics"]["accuracy"]
    assert "1 of 2 jobs failed" in told.err
    assert not list((tmp_path / "s").glob(".*"))


def test_a_sweep_over_precisions_has_a_folder_a_job_and_a_table(
    cli: Cli, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli("-m", "+recipe=smoke", "precision=fp32,bf16,fp16", "checkpoint=none") == 0
    folder = (tmp_path / "runs" / "latest").resolve()
    names = [f"{n}_precision={word}" for n, word in enumerate(("fp32", "bf16", "fp16"))]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names
    table = capfd.readouterr().out.splitlines()[-4:]
    assert table[0].split() == ["job", "status", "loss", "accuracy", "samples/s", "seconds", "MiB"]
    for name, line in zip(names, table[1:], strict=True):
        told = summary(folder / name)
        assert told["precision"] == name.partition("=")[2]
        assert line.split()[:2] == [name.partition("_")[2], "completed"]
        assert f"{told['metrics']['loss']:.4f}" in line


def test_a_bad_job_stops_a_sweep_before_it_starts(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("-m", "+recipe=smoke", "precision=fp32,fp17") == 2
    assert "fp17" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_ten_runs_in_a_row_end_well(tmp_path: Path) -> None:
    """As whole processes: what goes wrong at exit shows only there."""
    codes = [_process(tmp_path, "+recipe=smoke", "train.steps=2").returncode for _ in range(10)]
    assert codes == [0] * 10
    assert len([path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]) == 10


def test_help_and_recipes_do_not_import_torch(tmp_path: Path) -> None:
    for words in (["--help"], ["recipes"], ["recipes", "smoke"], ["--version"], ["+recipe=smoke", "--cfg", "job"]):
        code = (
            f"import sys; from runner.__main__ import main; code = main({words!r}); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    command = f"{sys.executable} -m runner +recipe=smoke run_dir=r | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "smoke: r\n"
    assert "Traceback" not in done.stderr
    assert summary(tmp_path / "r")["status"] == "completed"


def _process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runner", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_json_leaves_stdout_to_the_summary(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--json", "+recipe=smoke", "run_dir=r", "train.steps=4") == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == summary(tmp_path / "r")
    assert "evaluation at step 4" in told.err
