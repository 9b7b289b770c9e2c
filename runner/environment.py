"""What a run ran on: versions, host, devices, git commit and difference of the working directory, its own code."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from runner.recipe.redact import redact_text

_PACKAGES = (
    "runner", "torch", "hydra-core", "omegaconf", "safetensors", "tensorboard", "numpy", "transformers", "tokenizers",
    "datasets", "deepspeed", "torchao",
)  # fmt: skip
_DIFF_LIMIT = 1_000_000
#: Packages whose version can change a number, where they are imported, beside torch and the program itself.
_COUNTING = ("numpy", "transformers", "tokenizers", "datasets", "torchvision", "deepspeed", "torchao", "peft", "timm")
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def describe_later(directory: Path) -> Future[dict[str, Any]]:
    """The description, gathered in a thread: git may take its time and nobody needs to wait."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="environment")
    future = pool.submit(describe, directory)
    pool.shutdown(wait=False)
    return future


def describe(directory: Path) -> dict[str, Any]:
    """Everything that can be told without torch."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "directory": str(directory),
        "git": _git(directory),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions_in_use() -> dict[str, str]:
    """Versions of what is imported and can change a number; of this program with a hash, where it is a checkout."""
    found = {name: version_of(name) for name in ("runner", "torch", *_COUNTING) if name in sys.modules}
    return {name: version for name, version in found.items() if version is not None}


def version_of(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    if name == "runner":
        return _own_version()
    loaded = getattr(sys.modules.get(name), "__version__", None)
    return str(loaded) if isinstance(loaded, str) else _version(name)


def _own_version() -> str | None:
    package = Path(__file__).parent
    if not _INSTALLED.isdisjoint(package.parts):
        return _version("runner")
    digest = xxhash.xxh3_64()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return f"{_version('runner') or 'none'}+source.{digest.hexdigest()[:8]}"


def own_code(directory: Path) -> dict[str, str]:
    """Hashes of the Python files below a directory that are imported here, by their path in it; none of packages."""
    package = Path(__file__).parent
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    found = {}
    for name in sorted(name for name in files if isinstance(name, str) and name.startswith(f"{directory}{os.sep}")):
        path = Path(name)
        inside = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.suffix == ".py" and not hidden and _INSTALLED.isdisjoint(inside.parts) and package not in path.parents:
            digest = hash_of(path)
            if digest is not None:
                found[inside.as_posix()] = digest
    return found


def hash_of(path: Path) -> str | None:
    """A file's hash, None where it cannot be read."""
    try:
        return str(xxhash.xxh3_64(path.read_bytes()).hexdigest())
    except OSError:
        return None


def commit_of(directory: Path) -> str | None:
    """The git commit of a directory, None outside of a repository."""
    commit = _run(directory, "rev-parse", "HEAD")
    return None if commit is None else commit.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit and uncommitted difference, None outside of a repository."""
    commit = _run(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    difference = _run(directory, "diff", "HEAD", "--no-ext-diff", "--no-color") or ""
    return {
        "commit": commit.strip(),
        "dirty": bool(_run(directory, "status", "--porcelain")),
        "difference": redact_text(difference[:_DIFF_LIMIT]),
    }


def _run(directory: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *command],
            capture_output=True,
            timeout=20,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
