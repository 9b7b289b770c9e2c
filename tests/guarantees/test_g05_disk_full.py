"""G5: a full or broken disk costs the checkpoint that was being written, and nothing else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from guarantees.cases_g05 import Case, cases, run
from runner.checkpoint import Checkpointer, SaveFailed

#: One of each way to refuse, waiting and beside the training, and one more.
_SHORT = list({(case.kind, case.waits): case for case in reversed(cases(160, seed=0))}.values())


@pytest.mark.parametrize("case", [*_SHORT, cases(160, seed=1)[0]], ids=str)
def test_a_disk_that_does_not_take_it(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


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


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    saver = Checkpointer(small_disk, {"box": Box(1000)})
    first = saver.save(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveFailed, match="Read-only file system"):
        saver.save(2)
    assert saver.latest() == first
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert saver.save(3) == saver.latest()
