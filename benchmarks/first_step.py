"""Seconds from the shell to the first optimizer step of mlp_synthetic, beside the loop written by hand."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.overhead import HAND, RUNNER
from benchmarks.processes import machine, timed


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="runs of each")


def main(options: argparse.Namespace) -> int:
    print(machine())
    print(f"{'':>6} {'by hand':>9} {'runner':>9}   (seconds)")
    by_hand, by_runner = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            output = Path(folder, "output")
            started = time.time()
            timed([*HAND, "1"], folder, output=output)
            line = next(line for line in output.read_text().splitlines() if line.startswith("first step"))
            by_hand.append(float(line.split()[-1]) - started)
            started = time.time()
            timed([*RUNNER, "train.steps=1", "log.every=1", f"run_dir=r{number}"], folder)
            records = Path(folder, f"r{number}", "metrics.jsonl").read_text().splitlines()
            status = json.loads(Path(folder, f"r{number}", "summary.json").read_text())
            first = status["startup_at"] - started + json.loads(records[0])["time"]
            by_runner.append(first)
            print(f"{number + 1:>6} {by_hand[-1]:>9.2f} {by_runner[-1]:>9.2f}", flush=True)
    print(f"{'median':>6} {statistics.median(by_hand):>9.2f} {statistics.median(by_runner):>9.2f}")
    return 0
