"""Runs the smoke recipe many times in a row and counts the exit codes."""

from __future__ import annotations

import argparse
import collections
import os
import subprocess
import tempfile
import time

from benchmarks.processes import PYTHON, ROOT, machine


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=100, help="how many")


def main(options: argparse.Namespace) -> int:
    print(machine())
    codes: collections.Counter[int] = collections.Counter()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            done = subprocess.run(
                [PYTHON, "-m", "runner", "+recipe=smoke"],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
            )
            codes[done.returncode] += 1
    each = (time.perf_counter() - started) / options.runs
    print(f"{options.runs} runs, {each:.2f} s each; exit codes: {dict(codes)}")
    return 0 if set(codes) == {0} else 1
