"""G5: a full or broken disk costs the checkpoint that was being written, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from guarantees.cases_g05 import CALLS, MANIFEST, STATE, TENSORS, Case, cases, run
from runner.__main__ import main
from runner.checkpoint import Checkpointer, SaveFailed

_ALL = cases(208, seed=0)
#: In which file bytes run out, by the kind.
_FILE = {"limit": STATE, "EIO": MANIFEST, "EROFS": STATE}
#: One of each kind that counts bytes, waiting and beside the training, and of each call of which most depends on.
_BYTES = {(case.kind, case.waits): case for case in reversed(_ALL) if case.file == _FILE.get(case.kind, TENSORS)}
_CALLS = {(case.kind, case.again, case.exchanges): case for case in _ALL if case.kind in CALLS and case.call != 0}
_MKDIR = next(case for case in _ALL if case.kind == "mkdir")
_SHORT = [*(case for case in _BYTES.values() if case.kind not in CALLS), *_CALLS.values(), _MKDIR]


@pytest.mark.parametrize("case", _SHORT, ids=str)
def test_a_disk_that_does_not_take_it(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


TROUBLE = """\
import shutil
from contextlib import suppress
from pathlib import Path

from runner.train.hook import Hook


class Disk(Hook):
    def __init__(self, what, at, until=None, spoil=()):
        self.what, self.at, self.until, self.spoil = what, at, until, spoil

    def on_gradients_ready(self, run):
        if run.progress.step + 1 in self.spoil:
            next(run.engine.model.parameters()).grad.fill_(float("nan"))

    def on_step_end(self, run):
        if run.progress.step == self.at and self.what == "vanished":
            shutil.rmtree(run.folder.path)
        elif run.progress.step == self.at:
            fill()
        if run.progress.step == self.until:
            Path("other").unlink()

    def on_run_end(self, run):
        if self.what == "full at the end":
            fill()


def fill():
    with suppress(OSError), Path("other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "runner-test", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class Box:
    def __init__(self, size: int) -> None:
        self.state = {"w": torch.ones(size, dtype=torch.uint8)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state


def _saved(saver: Checkpointer, waits: bool) -> None:
    saver.save(2, wait=waits)
    saver.finish()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("lies", [True, False])
def test_a_small_disk(small_disk: Path, waits: bool, lies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if lies:
        from runner.checkpoint import storage

        monkeypatch.setattr(storage, "_check_space", lambda folder, needed: None)
    folder = small_disk / "checkpoints"
    saver = Checkpointer(folder, {"box": (box := Box(600_000))})
    first = saver.save(1)
    with pytest.raises(SaveFailed, match="No space left on device") as caught:
        _saved(saver, waits)
    assert caught.value.needed is not None
    assert caught.value.free is not None
    assert 600_000 < caught.value.needed < 610_000
    assert 300_000 < caught.value.free < 448_000
    assert [path.name for path in folder.iterdir()] == [first.name]
    assert saver.latest() == first
    box.state["w"] = torch.ones(300_000, dtype=torch.uint8)
    saver.save(3, wait=waits)
    assert saver.finish() == ([] if waits else [folder / "step_00000003"])
    assert saver.latest() == folder / "step_00000003"


def train(disk: Path, monkeypatch: pytest.MonkeyPatch, *words: str, what: str = "full", **about: Any) -> int:
    """A run of 16 steps with a checkpoint every 4 of them, to whose disk something happens."""
    (disk / "trouble_g05.py").write_text(TROUBLE)
    monkeypatch.chdir(disk)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "trouble_g05", raising=False)
    hook = ", ".join(["_target_: trouble_g05.Disk", f"what: {what}", *(f"{key}: {at}" for key, at in about.items())])
    smoke = ["+recipe=smoke", "run_dir=r", "device=cpu", "log.every=1", "trackers.tensorboard=null"]
    return main([*smoke, "checkpoint.every.steps=4", "checkpoint.async=false", *words, f"hooks.disk={{{hook}}}"])


def steps(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record["split"] == "train"]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_run_bears_a_disk_that_is_full_for_a_while(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither status.json nor a record ends it; what could not be written of the records is written later."""
    assert train(small_disk, monkeypatch, "checkpoint.on_error=continue", at=5, until=10) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.out.count("step_00000008 could not be saved: No space left on device") == 1
    assert "the last good checkpoint is" in said.out
    run = small_disk / "r"
    assert checkpoints(run) == ["step_00000012", "step_00000016"]
    assert steps(run) == list(range(1, 17))
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


def test_steps_that_were_left_out_while_the_disk_was_full_are_in_the_journal(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("checkpoint.on_error=continue", "nan=skip")
    assert train(small_disk, monkeypatch, *words, at=5, until=10, spoil=[6, 7, 12]) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.out.count("not_finite.jsonl cannot be written, and is tried again: No space left on device") == 2
    lines = [json.loads(line) for line in (small_disk / "r" / "not_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 7, 12]
    assert all(line["samples"] for line in lines)


def test_a_disk_that_is_full_at_the_end_costs_the_summary(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which the same command makes up for, once there is room: its start is told what lacks as well."""
    words = ("checkpoint.on_error=continue",)
    for name in ("summary.json", "config.yaml"):
        assert train(small_disk, monkeypatch, *words, what="full at the end", at=99) == 1
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        last = said.err.strip().splitlines()[-1]
        why = f"{small_disk}/r/{name} cannot be written: No space left on device"
        assert last == f"error: smoke failed after step 16: {why}"
        assert checkpoints(small_disk / "r") == ["step_00000012", "step_00000016"]
    (small_disk / "other").unlink()
    assert train(small_disk, monkeypatch, *words, at=99) == 0
    assert steps(small_disk / "r") == list(range(1, 17))
    assert json.loads((small_disk / "r" / "summary.json").read_text())["status"] == "completed"


def test_a_full_disk_stops_a_run_which_then_goes_on(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_disk, monkeypatch, "checkpoint.on_error=stop", at=5) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert re.search(
        r"^error: smoke failed after step 8: \S+step_00000008 could not be saved: No space left on device "
        r"\(it takes [0-9,]+ bytes, [0-9,]+ are free\); the last good checkpoint is \S+step_00000004$",
        said.err,
        re.MULTILINE,
    )
    assert checkpoints(small_disk / "r") == ["step_00000004"]
    (small_disk / "other").unlink()
    assert train(small_disk, monkeypatch, at=99) == 0
    assert steps(small_disk / "r") == list(range(1, 17))


def test_a_run_whose_folder_vanishes_says_so(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_disk, monkeypatch, "checkpoint.on_error=continue", what="vanished", at=5) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.out.count("status.json cannot be written, and stays as it was: No such file or directory") == 1
    assert "step_00000016 could not be saved: No such file or directory" in said.err


def test_a_run_does_not_begin_on_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert main(["+recipe=smoke", f"run_dir={small_disk / 'r'}", "device=cpu"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be written: No space left on device" in said
    assert not (small_disk / "r").exists()


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    saver = Checkpointer(small_disk, {"box": Box(1000)})
    first = saver.save(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveFailed, match="Read-only file system"):
        saver.save(2)
    assert saver.latest() == first
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert saver.save(3) == saver.latest()
