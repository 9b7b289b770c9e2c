"""Seconds from the shell to the first optimizer step of mlp_synthetic, beside the loop written by hand."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.overhead import HAND, RUNNER
from benchmarks.processes import machine, timed


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="runs of each")


CLOCK = """import time
from runner.train.hook import Hook


class Clock(Hook):
    def on_step_end(self, run):
        if run.progress.step == 1:
            with open("clock.txt", "w") as file:
                file.write(repr(time.time()))
"""


def main(options: argparse.Namespace) -> int:
    print(machine())
    print(f"{'':>6} {'by hand':>9} {'runner':>9} {'ratio':>7}   (seconds)")
    by_hand, by_runner = [], []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "clock.py").write_text(CLOCK)
        for number in range(options.rounds):
            output = Path(folder, "output")
            started = time.time()
            timed([*HAND, "1"], folder, output=output)
            line = next(line for line in output.read_text().splitlines() if line.startswith("first step"))
            by_hand.append(float(line.split()[-1]) - started)
            started = time.time()
            timed([*RUNNER, "train.steps=1", "hooks.clock={_target_: clock.Clock}"], folder)
            by_runner.append(float(Path(folder, "clock.txt").read_text()) - started)
            ratio = by_runner[-1] / by_hand[-1]
            print(f"{number + 1:>6} {by_hand[-1]:>9.2f} {by_runner[-1]:>9.2f} {ratio:>7.2f}", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(by_runner, by_hand, strict=True)]
    median = statistics.median
    print(f"{'median':>6} {median(by_hand):>9.2f} {median(by_runner):>9.2f} {median(ratios):>7.2f}")
    return 0
