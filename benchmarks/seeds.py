"""Held-out accuracy and time of bert_sst2 for several seeds."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.processes import PYTHON, machine, timed


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds")


def main(options: argparse.Namespace) -> int:
    print(machine())
    print(f"{'seed':>4} {'accuracy':>9} {'loss':>7} {'training':>9} {'whole':>7}   (seconds)")
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            command = [PYTHON, "-m", "runner", "+recipe=bert_sst2", f"seed={seed}", f"run_dir=s{seed}"]
            whole = timed(command, folder)
            summary = json.loads(Path(folder, f"s{seed}", "summary.json").read_text())
            metrics = summary["metrics"]
            print(
                f"{seed:>4} {metrics['accuracy']:>9.3f} {metrics['loss']:>7.4f} "
                f"{summary['train_seconds']:>9.1f} {whole:>7.1f}",
                flush=True,
            )
    return 0
