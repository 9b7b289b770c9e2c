"""Whole processes, timed from outside."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], folder: str, *, output: Path | None = None) -> float:
    """Seconds of a command that must succeed, run in `folder`; what it prints goes to a file."""
    with output.open("w") if output else tempfile.TemporaryFile("w+") as file:
        started = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {done.returncode}")
    return seconds


def machine() -> str:
    """One line on what this was measured with."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cpus} CPUs, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
    )


PYTHON = sys.executable
