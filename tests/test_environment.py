"""What a run ran on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner import environment
from runner.environment import describe, describe_later


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_outside_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe(tmp_path)
    assert found["git"] is None
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"]
    assert found["versions"]["runner"]
    assert found["cpus"] >= 1
    assert found["directory"] == str(tmp_path)
    json.dumps(found)


def test_a_clean_and_a_changed_working_directory(repository: Path) -> None:
    found = describe(repository)["git"]
    assert len(found["commit"]) == 40
    assert (found["dirty"], found["difference"]) == (False, "")
    (repository / "a.py").write_text("two\n")
    found = describe(repository)["git"]
    assert found["dirty"] is True
    assert "-one\n+two\n" in found["difference"]


def test_a_new_file_makes_it_dirty(repository: Path) -> None:
    (repository / "b.py").touch()
    found = describe(repository)["git"]
    assert (found["dirty"], found["difference"]) == (True, "")


def test_a_huge_difference_is_cut(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_DIFF_LIMIT", 100)
    (repository / "a.py").write_text("x\n" * 1000)
    assert len(describe(repository)["git"]["difference"]) == 100


def test_the_repository_is_not_written_to(repository: Path) -> None:
    """Somebody may be committing while a run starts."""
    (repository / "a.py").write_text("one\n")  # the same, with another time: a status would refresh the index
    before = (repository / ".git" / "index").stat().st_mtime_ns
    describe(repository)
    assert (repository / ".git" / "index").stat().st_mtime_ns == before


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe(tmp_path)["git"] is None


def test_later_is_the_same(repository: Path) -> None:
    assert describe_later(repository).result(timeout=20) == describe(repository)
