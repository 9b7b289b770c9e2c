"""Runs the smoke recipe many times in a row, in one process or several, and counts the exit codes."""

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
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="processes of a run, one after another"
    )


def main(options: argparse.Namespace) -> int:
    print(machine())
    found = [_repeat(options.runs, count) for count in options.processes]
    return 0 if all(set(codes) == {0} for codes in found) else 1


def _repeat(runs: int, count: int) -> collections.Counter[int]:
    codes: collections.Counter[int] = collections.Counter()
    words = [] if count == 1 else ["device=cpu", f"launch.nproc_per_node={count}"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(runs):
            done = subprocess.run(
                [PYTHON, "-m", "runner", "+recipe=smoke", *words],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
            )
            codes[done.returncode] += 1
    each = (time.perf_counter() - started) / runs
    what = "one process" if count == 1 else f"{count} processes"
    print(f"{runs} runs in {what}, {each:.2f} s each; exit codes: {dict(codes)}")
    return codes
