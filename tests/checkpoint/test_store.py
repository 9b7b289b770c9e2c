"""The folder of checkpoints: what is one, how it appears and goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.checkpoint import store
from runner.checkpoint.manifest import Manifest
from runner.errors import InputError, RunnerError


def make(folder: Path, step: int, **metrics: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = store.path_of(folder, step)
    staging = store.begin(path)
    Manifest(step, metrics).write(staging)
    store.publish(staging, path)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_step_folders_in_the_order_of_numbers(tmp_path: Path) -> None:
    for name in (
        "step_10",
        "step_00000009",
        "step_100000000",
        "step_x",
        "step_",
        "astep_1",
        ".tmp-step_1-a",
        "step_5.bak",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_7").write_text("a file")
    assert [path.name for path in store.candidates(tmp_path)] == ["step_00000009", "step_10", "step_100000000"]
    assert store.candidates(tmp_path / "nowhere") == []


def test_latest_passes_over_what_is_not_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert store.latest(tmp_path) is None
    good = make(tmp_path, 9)
    (tmp_path / "step_00000010").mkdir()
    (tmp_path / ".tmp-step_00000011-abcd").mkdir()
    assert store.latest(tmp_path) == good
    assert "step_00000010 is not a complete checkpoint: it has no manifest.json" in caplog.text


def test_none_complete_is_no_silent_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "step_00000010").mkdir()
    with pytest.raises(RunnerError, match="none of the 1 checkpoints") as caught:
        store.latest(tmp_path)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("swaps", [True, False])
def test_the_same_step_again_replaces(tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swaps:
        monkeypatch.setattr(store, "exchange", lambda one, two: False)
    make(tmp_path, 1)
    make(tmp_path, 1, loss=2.0)
    assert names(tmp_path) == {"step_00000001"}
    assert Manifest.read(tmp_path / "step_00000001").metrics == {"loss": 2.0}


def test_two_names_are_exchanged_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    assert store.exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == ({"b"}, {"a"})
    assert not store.exchange(tmp_path / "a", tmp_path / "nothing")


def test_latest_brings_back_what_was_being_replaced(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2).rename(tmp_path / ".old-step_00000002")
    assert store.latest(tmp_path) == tmp_path / "step_00000002"


def test_links_are_foreign(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", 5)
    (tmp_path / "step_00000005").symlink_to(tmp_path / "elsewhere" / "step_00000005")
    assert store.candidates(tmp_path) == []


def test_sweep_takes_leftovers_and_brings_back_what_was_being_replaced(tmp_path: Path) -> None:
    store.sweep(tmp_path / "nowhere")
    for name in (".tmp-step_00000003-ab", ".trash-step_00000001-cd"):
        (tmp_path / name / "inner").mkdir(parents=True)
    make(tmp_path, 2).rename(tmp_path / ".old-step_00000002")
    make(tmp_path, 4)
    (tmp_path / ".old-step_00000004").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".trash-old-step_00000002-ef01").mkdir()
    others = {".tmp-mine", ".old-notes", ".trash-can", ".tmp-step_of_mine-1"}
    for name in others:
        (tmp_path / name).mkdir()
    store.sweep(tmp_path)
    assert names(tmp_path) == {"step_00000002", "step_00000004", "notes.txt", *others}
    assert store.latest(tmp_path) == tmp_path / "step_00000004"


def test_find_takes_a_checkpoint_a_run_or_its_folder_of_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    first, second = make(folder, 9), make(folder, 10)
    assert store.find(first) == first
    assert store.find(folder) == second == store.find(tmp_path / "run")
    renamed = second.rename(tmp_path / "the good one")
    assert store.find(renamed) == renamed


@pytest.mark.parametrize(
    "kind", ["nowhere", "too long", "file", "empty", "run without any", "step folder", "damaged", "all damaged"]
)
def test_find_says_what_is_wrong(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "file":
        path.write_text("")
    elif kind == "run without any":
        (path / "checkpoints").mkdir(parents=True)
    elif kind == "step folder":
        path = tmp_path / "step_00000001"
        path.mkdir()
    elif kind == "damaged":
        path = make(tmp_path, 1)
        (path / "manifest.json").write_text("{")
    elif kind == "all damaged":
        (path / "checkpoints" / "step_3").mkdir(parents=True)
    elif kind == "empty":
        path.mkdir()
    elif kind == "too long":
        path = tmp_path / ("x" * 300)
    with pytest.raises(InputError) as caught:
        store.find(path)
    (problem,) = caught.value.problems
    assert problem.key == "resume"
    assert problem.value == str(path)
    assert str(path) in problem.why
    assert problem.fix
