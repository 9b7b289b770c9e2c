"""G6: damage in a checkpoint is found before anything of it is used, and survived."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from processes import run_ranks

from guarantees.cases_g06 import FILES, Box, Case, cases, harm, run
from runner import distributed
from runner.checkpoint import Checkpointer, store, verify
from runner.checkpoint.manifest import Manifest
from runner.errors import InputError, RunnerError


def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path) -> None:
    wrong = {}
    for case in cases(150, seed=0):
        folder = tmp_path / str(case.number)
        if (why := run(case, folder)) is not None:
            wrong[str(case)] = why
        shutil.rmtree(folder)
    assert wrong == {}


def test_every_bit_of_a_manifest(tmp_path: Path) -> None:
    """One in every byte, each in turn."""
    run(Case(0, "flip", "manifest.json", 0.0), tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000001"
    sound = (folder / "manifest.json").read_bytes()
    taken = []
    for byte in range(len(sound)):
        data = bytearray(sound)
        data[byte] ^= 1 << byte % 8
        (folder / "manifest.json").write_bytes(data)
        try:
            Manifest.read(folder)
        except RunnerError as error:
            if isinstance(error, InputError):
                taken.append(byte)
        else:
            taken.append(byte)
    assert taken == []


def test_all_bad_is_said_and_no_fresh_start(tmp_path: Path) -> None:
    run(Case(0, "flip", FILES[2], 0.5), tmp_path)
    harm(Case(0, "flip", FILES[3], 0.9), tmp_path / "checkpoints" / "step_00000001")
    with pytest.raises(RunnerError, match="none of the 2 checkpoints") as caught:
        store.latest(tmp_path / "checkpoints")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["notes.txt", "rank_2.safetensors", "data.pkl"])
def test_a_file_too_many(tmp_path: Path, name: str) -> None:
    run(Case(0, "flip", FILES[2], 0.5), tmp_path)
    good = tmp_path / "checkpoints" / "step_00000001"
    (good / ".nfs0001").write_text("what a file system leaves is nobody's")
    assert store.find(good) == good
    (good / name).write_text("x")
    with pytest.raises(InputError, match=f"'{name}' is not of it"):
        store.find(good)


def test_what_was_found_damaged_does_not_count_as_one_of_the_newest(tmp_path: Path) -> None:
    class Empty(Box):
        def state_dict(self) -> dict[str, int]:
            return {}

    run(Case(0, "flip", FILES[2], 0.5), tmp_path)
    folder = tmp_path / "checkpoints"
    assert store.latest(folder) == folder / "step_00000001"
    saver = Checkpointer(folder, {"box": Empty()})
    saver.save(3)
    assert {path.name for path in folder.iterdir()} == {f"step_{step:08d}" for step in (1, 2, 3)}
    saver.save(2)
    assert store.latest(folder) == folder / "step_00000003"
    assert {path.name for path in folder.iterdir()} == {f"step_{step:08d}" for step in (2, 3)}


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    run(Case(0, "flip", FILES[2], 0.5), tmp_path)
    good = tmp_path / "checkpoints" / "step_00000001"
    manifest = Manifest.read(good)
    for file in good.iterdir():
        os.utime(file, (1e9, 1e9))
    read = []
    hashed = verify._hash
    monkeypatch.setattr(verify, "_hash", lambda handle: read.append(handle) or hashed(handle))
    for _ in range(2):
        verify.verify(good, manifest)
    assert len(read) == 3
    # Even with the old time of change: the system keeps another one that nobody can set.
    data = bytearray((good / FILES[3]).read_bytes())
    data[-1] ^= 1
    (good / FILES[3]).write_bytes(data)
    os.utime(good / FILES[3], (1e9, 1e9))
    with pytest.raises(RunnerError, match=r"rank_1\.safetensors has the hash \w{32} instead of \w{32}"):
        verify.verify(good, manifest)


def loaded(folder: Path) -> str:
    try:
        Checkpointer(folder, {"box": Box()}).load(folder / "step_00000002")
    except InputError as error:
        return f"{distributed.rank()}: {error}"
    return "nothing"


def test_processes_share_the_files_out_and_agree(tmp_path: Path) -> None:
    run(Case(0, "flip", FILES[3], 0.5), tmp_path)
    first, second = run_ranks(loaded, 2, tmp_path / "checkpoints")
    assert first.removeprefix("0: ") == second.removeprefix("1: ")
    assert "rank_1.safetensors has the hash" in first
