"""What determinism=canonical costs: its time per optimizer step beside the default's, on one and two processes.

Whole runs in turn, short and long ones of each kind; the slope between a short and a long one is the time per step. A
round gives one ratio of each kind, and the median of the rounds is told. All train with one thread a process; what
the other cores would have brought is a kind of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.processes import PYTHON, machine, timed

#: Name -> (width of the layers, samples a step, steps of a short and of a long run).
_MODELS = {"small": (128, 64, 200, 1200), "wide": (1024, 512, 10, 60)}

_RECIPE = """
name: {name}
model:
  _target_: torch.nn.Sequential
  _args_:
    - {{_target_: torch.nn.Linear, in_features: 128, out_features: {width}}}
    - {{_target_: torch.nn.ReLU}}
    - {{_target_: torch.nn.Dropout, p: 0.1}}
    - {{_target_: torch.nn.Linear, in_features: {width}, out_features: {width}}}
    - {{_target_: torch.nn.ReLU}}
    - {{_target_: torch.nn.Linear, in_features: {width}, out_features: 10}}
task: {{_target_: runner.tasks.classification.Classification, num_classes: 10}}
data: random
batch: {{global_size: {size}}}
train: {{steps: 10}}
grad_clip: 1.0
eval: {{every: never}}
checkpoint: null
log: {{every: 50}}
"""

_KINDS = {
    "default": ("determinism=default", "launch.threads=1"),
    "canonical": ("determinism=canonical",),
    "default, all cores": ("determinism=default",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="runs of each kind")
    parser.add_argument("--models", nargs="+", choices=list(_MODELS), default=list(_MODELS))


def main(options: argparse.Namespace) -> int:
    print(machine())
    print(f"{'model':>8} {'processes':>9} {'kind':>20} {'us a step':>10} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        recipes = Path(folder, "recipes")
        recipes.mkdir()
        for model in options.models:
            width, size, short, long = _MODELS[model]
            (recipes / f"{model}.yaml").write_text(_RECIPE.format(name=model, width=width, size=size))
            for processes in (1, 2):
                _compare(model, processes, short, long, options.rounds, folder)
    return 0


def _compare(model: str, processes: int, short: int, long: int, rounds: int, folder: str) -> None:
    """Prints the time a step of each kind, and its ratio to the default's of the same round."""
    slopes: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    for _ in range(rounds):
        for kind, words in _KINDS.items():
            command = [PYTHON, "-m", "runner", f"+recipe={model}", f"launch.nproc_per_node={processes}", *words]
            seconds = [timed([*command, f"train.steps={steps}"], folder) for steps in (short, long)]
            slopes[kind].append((seconds[1] - seconds[0]) / (long - short) * 1e6)
    for kind, found in slopes.items():
        ratio = statistics.median(one / default for one, default in zip(found, slopes["default"], strict=True))
        print(f"{model:>8} {processes:>9} {kind:>20} {statistics.median(found):>10.0f} {ratio:>7.2f}", flush=True)
