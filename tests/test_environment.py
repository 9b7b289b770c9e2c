"""What a run ran on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner import environment
from runner.environment import commit_of, describe, describe_later, own_code, version_of, versions_in_use


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


def test_a_commit(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(repository) == describe(repository)["git"]["commit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(repository) is None


def test_versions_in_use() -> None:
    found = versions_in_use()
    assert found["torch"] == __import__("torch").__version__
    assert "hydra-core" not in found
    assert version_of("no-such-package") is None


def test_a_checkout_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    (tmp_path / "a.py").write_text("one")
    first = version_of("runner")
    assert first is not None
    assert "+source." in first
    (tmp_path / "a.py").write_text("two")
    assert version_of("runner") != first
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "environment.py"))
    assert "+source." not in str(version_of("runner"))


def test_code_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("imported_here.py", "not_imported.py", ".hidden/h_here.py", "site-packages/s_here.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    for folder in (".hidden", "site-packages"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    for name in ("imported_here", "h_here", "s_here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        __import__(name)
    before = own_code(tmp_path)
    assert list(before) == ["imported_here.py"]
    (tmp_path / "imported_here.py").write_text("x = 2\n")
    assert own_code(tmp_path) != before
