"""Time per optimizer step of recipe mlp_synthetic beside a loop written by hand.

Each figure is the slope between a short and a long whole-process run, so start and end cancel out; the two programs
run in turn, and the median of the ratios of neighbours is the result.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

from benchmarks.processes import PYTHON, ROOT, machine, timed

HAND = [PYTHON, str(ROOT / "benchmarks" / "hand_loop.py")]
RUNNER = [PYTHON, "-m", "runner", "+recipe=mlp_synthetic", "eval.every=never", "checkpoint=none"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="pairs of slopes")
    parser.add_argument("--short", type=int, default=500, help="steps of a short run")
    parser.add_argument("--long", type=int, default=4500, help="steps of a long run")


def main(options: argparse.Namespace) -> int:
    print(machine())
    print(f"{'':>6} {'by hand':>12} {'runner':>12} {'ratio':>7}   (microseconds a step)")
    by_hand, by_runner = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            by_hand.append(_slope(lambda steps: [*HAND, str(steps)], options, folder))
            by_runner.append(_slope(lambda steps: [*RUNNER, f"train.steps={steps}"], options, folder))
            ratio = by_runner[-1] / by_hand[-1]
            print(f"{number + 1:>6} {by_hand[-1]:>12.1f} {by_runner[-1]:>12.1f} {ratio:>7.3f}", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(by_runner, by_hand, strict=True)]
    median = statistics.median
    print(f"{'median':>6} {median(by_hand):>12.1f} {median(by_runner):>12.1f} {median(ratios):>7.3f}")
    return 0


def _slope(command, options: argparse.Namespace, folder: str) -> float:
    short = timed(command(options.short), folder)
    long = timed(command(options.long), folder)
    return (long - short) / (options.long - options.short) * 1e6
