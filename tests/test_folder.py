"""A run's folder: a new one never exists yet, and files appear whole."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from runner import folder as room
from runner.errors import InputError
from runner.folder import RunFolder, finite


def no(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        RunFolder.named(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("run_dir", str(path))
    assert problem.fix
    return problem.why


def test_new_folders_are_named_by_date_time_and_name(tmp_path: Path) -> None:
    made = RunFolder.new(tmp_path / "runs", "my run/1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}-my_run_1-[0-9a-f]{4}", made.path.name)
    assert made.path.is_dir()


@pytest.mark.parametrize("name", ["", "..", "/", "ünïcode", "x" * 500, "漢" * 200, "a\nb", "-rf", "~"])
def test_any_name_makes_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    made = RunFolder.new(tmp_path / "runs", name)
    assert made.path.parent == tmp_path / "runs"
    assert "\n" not in made.path.name


def test_two_that_start_in_the_same_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr(room.secrets, "token_hex", lambda size: next(words))

    class Now(room.datetime):  # type: ignore[misc]
        @classmethod
        def now(cls, *zone: object) -> room.datetime:  # noqa: ARG003
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(room, "datetime", Now)
    names = [RunFolder.new(tmp_path, "x").path.name for _ in range(2)]
    assert names == ["2030-01-02-030405-x-aaaa", "2030-01-02-030405-x-bbbb"]


def test_a_named_folder_is_made_or_taken(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert RunFolder.named(path).path == path
    (path / "file").touch()
    assert RunFolder.named(path).path == path


def test_names_that_cannot_be_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert no(tmp_path / "file") == "is a file"
    assert no(tmp_path / "file" / "below").startswith("cannot be made")
    assert no(tmp_path / ("x" * 300)).startswith("cannot be made")


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.os, "access", lambda path, mode: False)
    assert no(tmp_path) == "is not writable"


def test_a_parent_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match="cannot be made"):
        RunFolder.new(tmp_path / "runs" / "below", "x")


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    made = RunFolder(tmp_path)
    made.write_json("a.json", {"x": [1, math.nan, {"y": math.inf}], "ü": 0.1})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"x": [1, None, {"y": None}], "ü": 0.1}
    assert made.read_json("a.json")["ü"] == 0.1
    made.write_json("a.json", 5)
    assert made.read_json("a.json") == 5
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = RunFolder(tmp_path)
    made.write_text("a.txt", "old")

    def full(self: Path, *words: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        made.write_text("a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_damaged_json_is_none(tmp_path: Path) -> None:
    made = RunFolder(tmp_path)
    assert made.read_json("none.json") is None
    (tmp_path / "bad.json").write_bytes(b"{\xff")
    assert made.read_json("bad.json") is None


def test_status_keeps_what_was_said_before(tmp_path: Path) -> None:
    made = RunFolder(tmp_path)
    made.state("starting", step=0)
    made.state("running", step=3)
    made.state("completed", reason="done")
    status = made.read_json("status.json")
    assert (status["state"], status["step"], status["reason"], status["pid"]) == ("completed", 3, "done", os.getpid())


def test_the_heartbeat_is_renewed_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(room.time, "time", lambda: now[0])
    made = RunFolder(tmp_path)
    made.state("running", step=1)
    for seconds, step, seen in [(0.5, 2, 1), (0.4, 3, 1), (0.2, 4, 4), (0.5, 5, 4)]:
        now[0] += seconds
        made.heartbeat(step=step)
        assert made.read_json("status.json")["step"] == seen
    assert made.read_json("status.json")["heartbeat"] == 1001.1
    made.state("completed")
    assert made.read_json("status.json")["step"] == 5


def test_latest_points_to_the_newest(tmp_path: Path) -> None:
    for _ in range(2):
        made = RunFolder.new(tmp_path, "x")
        made.link_latest()
        assert (tmp_path / "latest").resolve() == made.path.resolve()
        assert os.readlink(tmp_path / "latest") == made.path.name
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".latest")]


def test_a_folder_called_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    RunFolder.new(tmp_path, "x").link_latest()
    assert (tmp_path / "latest").is_dir()
    assert not (tmp_path / "latest").is_symlink()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".latest")]


def test_finite_copies_and_keeps_everything_else() -> None:
    given = {1: (1.5, -math.inf), "a": True, "b": None}
    assert finite(given) == {"1": [1.5, None], "a": True, "b": None}
    assert given[1] == (1.5, -math.inf)
