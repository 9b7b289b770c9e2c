"""What a run ran on: versions, host, devices, git commit and difference of the working directory."""

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

_PACKAGES = (
    "runner", "torch", "hydra-core", "omegaconf", "safetensors", "tensorboard", "numpy", "transformers", "tokenizers",
    "datasets", "deepspeed", "torchao",
)  # fmt: skip
_DIFF_LIMIT = 1_000_000


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
        "difference": difference[:_DIFF_LIMIT],
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
