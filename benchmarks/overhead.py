"""Time per optimizer step of recipe mlp_synthetic beside a loop written by hand.

Short and long whole-process runs of both, in turn; the slope between the medians of the short and of the long ones is
the time per step, start and end cancel out. The slope between the quickest runs is shown too: it is what a machine
without neighbours would give.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile

from benchmarks.processes import PYTHON, ROOT, machine, timed

HAND = [PYTHON, str(ROOT / "benchmarks" / "hand_loop.py")]
RUNNER = [PYTHON, "-m", "runner", "+recipe=mlp_synthetic", "eval.every=never", "checkpoint=none"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="runs of each kind")
    parser.add_argument("--short", type=int, default=500, help="steps of a short run")
    parser.add_argument("--long", type=int, default=4500, help="steps of a long run")


def main(options: argparse.Namespace) -> int:
    print(machine())
    programs = {"by hand": lambda steps: [*HAND, str(steps)], "runner": lambda steps: [*RUNNER, f"train.steps={steps}"]}
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for steps in (options.short, options.long):
                for name, command in programs.items():
                    seconds.setdefault((name, steps), []).append(timed(command(steps), folder))
            shown = "  ".join(f"{name} {steps} {times[-1]:.2f}" for (name, steps), times in seconds.items())
            print(f"round {number + 1}: {shown}", flush=True)
    print(f"{'':>16} {'by hand':>9} {'runner':>9} {'ratio':>7}   (microseconds a step)")
    for name, pick in (("median runs", statistics.median), ("quickest runs", min)):
        hand, ours = (
            (pick(seconds[program, options.long]) - pick(seconds[program, options.short]))
            / (options.long - options.short)
            * 1e6
            for program in programs
        )
        print(f"{name:>16} {hand:>9.1f} {ours:>9.1f} {ours / hand:>7.3f}")
    return 0
