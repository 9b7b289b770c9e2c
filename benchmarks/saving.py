"""What never losing a run costs: saves, hashes, signals, restarts, heartbeats.

The parts: `slowdown` of training by saving every 10 steps (32 M parameters), `hashing` as a share of a save, seconds
from `sigterm` to the end of bert_sst2, seconds from a killed rank to the next new step (`restart`), and the time of a
`heartbeat` with the look at the flags.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.processes import PYTHON, ROOT, machine, timed

#: Four layers of 2,828 x 2,828: 32 M parameters, 384 MB with AdamW's two moments.
WIDTH, LAYERS = 2828, 4
#: Steps between two saves, half of them timed with the save and half without one; such pairs in a run.
EVERY, PAIRS = 20, 10

CLOCK = """import json, time
from runner.train.hook import Hook


class Clock(Hook):
    def __init__(self, steps):
        self.steps, self.times, self.latest = steps, [], 0

    def on_checkpoint_saved(self, run, path):
        self.latest = max(self.latest, run.progress.step - int(path.name[5:]))

    def on_step_end(self, run):
        if run.progress.step in self.steps:
            self.times.append(time.perf_counter())
            with open("clock.json", "w") as file:
                json.dump([self.times, self.latest], file)
"""


#: Writes checkpoints through the page cache, to compare.
CACHED = """
from runner.checkpoint import synced
synced._bypass = lambda handle, wanted: None
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", dest="parts", choices=list(PARTS), help="a part")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind, signals, kills")
    parser.add_argument("--batch", type=int, default=256, help="samples a step of the 32 M perceptron")
    parser.add_argument("--cached", action="store_true", help="slowdown: write through the page cache, to compare")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")


def main(options: argparse.Namespace) -> int:
    print(machine(), flush=True)
    for name in options.parts or PARTS:
        print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        PARTS[name](options)
    return 0


# --- saves -----------------------------------------------------------------------------------------------------------


def slowdown(options: argparse.Namespace) -> None:
    """Training time with a checkpoint every 10 steps over that without, 32 M parameters; to reach: 1.10.

    Ten steps from the beginning of a save on, over the ten steps that follow in the same run: neighbours in time have
    the same computer.
    """
    kinds = {"async": "checkpoint.async=true", "sync": "checkpoint.async=false"}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind, word in kinds.items():
            first, *pairs = _pairs_of_blocks(options, word)
            found[kind] += pairs
            without = statistics.median(b for _, b in pairs)
            print(
                f"round {number + 1}: {kind} {statistics.median(a / b for a, b in pairs):.3f}, {without / 10:.3f} s a "
                f"step without; the first save, which makes the buffers, costs {first[0] - without:.2f} s",
                flush=True,
            )
    for kind, pairs in found.items():
        low, middle, high = statistics.quantiles(a / b for a, b in pairs)
        print(
            f"{kind}: {middle:.3f} (median of {len(pairs)} pairs; a half of them from {low:.3f} to {high:.3f}), "
            f"{sum(a for a, _ in pairs) / sum(b for _, b in pairs):.3f} by the sums"
        )


def _pairs_of_blocks(options: argparse.Namespace, word: str) -> list[tuple[float, float]]:
    """Seconds of ten steps from a save on, and of the ten after them, in which none may go on."""
    batch = options.batch
    layers = [f"{{_target_:torch.nn.Linear,in_features:{WIDTH},out_features:{WIDTH}}}"] * LAYERS
    model = f"model={{_target_:torch.nn.Sequential,_args_:[{','.join(layers)}]}}"
    data = f"{{_target_:runner.data.synthetic.random_classification,samples:{batch * 4},features:{WIDTH},classes:10}}"
    last, half = EVERY * (PAIRS + 2), EVERY // 2
    with tempfile.TemporaryDirectory(dir=".") as folder:
        Path(folder, "clock.py").write_text(CLOCK + (CACHED if options.cached else ""))
        command = [
            *[PYTHON, "-m", "runner", "+recipe=mlp_synthetic", model, f"data={{train:{data},eval:null}}"],
            *[f"task.num_classes={WIDTH}", f"train.steps={last}", f"batch.global_size={batch}", "eval.every=never"],
            *["device=cpu", "run_dir=run", f"checkpoint.every={{steps: {EVERY}}}", word],
            f"hooks.clock={{_target_:clock.Clock,steps:{list(range(EVERY, last + 1, half))}}}",
        ]
        timed(command, folder, output=Path(folder, "output"))
        times, latest = json.loads(Path(folder, "clock.json").read_text())
    if latest >= half:
        raise SystemExit(f"a save took {latest} steps: the steps without one are none; give a larger --batch")
    spans = [b - a for a, b in itertools.pairwise(times)]
    return list(zip(spans[0::2], spans[1::2], strict=True))


def hashing(options: argparse.Namespace) -> None:
    """Share of a save's time that goes into hashes, 32 M parameters with AdamW; to reach: 5%."""
    import torch
    import xxhash

    from runner.checkpoint import Checkpointer, synced

    spent = [0.0]

    class Timed:
        def __init__(self) -> None:
            self.hash = xxhash.xxh3_128()

        def update(self, data: Any) -> None:
            began = time.perf_counter()
            self.hash.update(data)
            spent[0] += time.perf_counter() - began

        def hexdigest(self) -> str:
            return self.hash.hexdigest()

    class State:
        def __init__(self) -> None:
            self.tensors = {f"{kind}{i}": torch.randn(WIDTH, WIDTH) for kind in "wmv" for i in range(LAYERS)}

        def state_dict(self) -> dict[str, Any]:
            return self.tensors

        def load_state_dict(self, state: Any) -> None: ...

    shares = []
    original, synced.xxh3_128 = synced.xxh3_128, Timed  # type: ignore[misc, assignment]
    try:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            checkpointer = Checkpointer(Path(folder), {"model": State()})
            for step in range(1, options.rounds + 2):
                spent[0] = 0.0
                began = time.perf_counter()
                checkpointer.save(step)
                seconds = time.perf_counter() - began
                if step > 1:  # the first one imports
                    shares.append(spent[0] / seconds)
                    print(f"save {step}: {seconds:.3f} s, hashes {spent[0]:.3f} s", flush=True)
    finally:
        synced.xxh3_128 = original  # type: ignore[misc]
    print(f"hashes: {statistics.median(shares):.1%} (median), {max(shares):.1%} at most")


# --- signals and restarts --------------------------------------------------------------------------------------------


@contextmanager
def _program(folder: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with Path(folder, "output").open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, "-m", "runner", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def sigterm(options: argparse.Namespace) -> None:
    """Seconds from SIGTERM to exit code 75 of bert_sst2, at random moments after its start; to reach: 5."""
    draw, found = random.Random(options.seed), []
    for number in range(options.rounds * 2):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            # Every other run evaluates and saves often, so that these moments are met as well.
            words = ["+recipe=bert_sst2", "run_dir=run"]
            if number % 2:
                words += ["eval.every=5", "checkpoint.every={steps: 5}"]
            with _program(folder, *words) as process:
                _until(lambda folder=folder: _status(folder) not in (None, "starting"), process, 300.0)  # type: ignore[misc]
                with suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0.0, 30.0))
                doing, began = _status(folder), time.monotonic()
                process.send_signal(signal.SIGTERM)
                code = process.wait(120)
                found.append(time.monotonic() - began)
            print(f"while {doing}: {found[-1]:.2f} s, exit code {code}", flush=True)
            if code != 75:
                print(Path(folder, "output").read_text()[-2000:])
                raise SystemExit(f"exit code {code} instead of 75")
    print(f"SIGTERM to exit: {statistics.median(found):.2f} s (median), {max(found):.2f} s at most, of {len(found)}")


def restart(options: argparse.Namespace) -> None:
    """Seconds from SIGKILL of a rank to the next new step, two processes, launch.max_restarts=1; to reach: 10."""
    draw, found = random.Random(options.seed), []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            words = [
                *["+recipe=mlp_synthetic", "run_dir=run", "device=cpu", "launch.nproc_per_node=2"],
                *["launch.max_restarts=1", "log.every=1", "train.epochs=10000", "eval.every=never"],
                *["checkpoint.every={steps: 100}"],
            ]
            with _program(folder, *words) as process:
                _until(lambda folder=folder: _step(folder) > 100, process, 120.0)  # type: ignore[misc]
                time.sleep(draw.uniform(0.0, 3.0))
                victim = _rank(process.pid, number % 2)
                os.kill(victim, signal.SIGKILL)
                began, before = time.monotonic(), _step(folder)
                # Seen by the records: those after the checkpoint go, and come again before a new one.
                _until(lambda folder=folder, before=before: _step(folder) > before + 2, process, 120.0)  # type: ignore[misc]
                found.append(time.monotonic() - began)
            print(f"rank {number % 2} killed after step {before}: {found[-1]:.2f} s", flush=True)
    print(f"to the next new step: {statistics.median(found):.2f} s (median), {max(found):.2f} s at most")


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the run ended (exit code {process.poll()}) or took more than {seconds:.0f} s")
        time.sleep(0.02)


def _status(folder: str) -> str | None:
    try:
        return json.loads(Path(folder, "run", "status.json").read_text())["state"]
    except (OSError, ValueError):
        return None


def _step(folder: str) -> int:
    """The step of the last whole record."""
    try:
        with Path(folder, "run", "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().split(b"\n")
        return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


def _rank(session: int, rank: int) -> int:
    """The process of a rank, in a session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                same = int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == session
                if same and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    return int(entry.name)
    raise SystemExit(f"no process of rank {rank}")


# --- heartbeat -------------------------------------------------------------------------------------------------------


def heartbeat(options: argparse.Namespace) -> None:
    """Microseconds a step for two heartbeats and a look at the flags, one process; to reach: 1."""
    from runner.engine.mesh import Mesh
    from runner.heartbeat import DATA, TRAIN, Heartbeat
    from runner.train.run import Run

    class Engine:
        mesh = Mesh()

    run = Run.__new__(Run)
    run.engine, run.signal, run.stop_reason = Engine(), None, None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        beat = Heartbeat(Path(folder, "beat")).beat
        steps, found = 200_000, []
        for _ in range(max(options.rounds, 5)):
            began = time.perf_counter()
            for step in range(steps):
                beat(DATA, step)
                beat(TRAIN, step)
                if run.stop_reason or run.ending:
                    break
            with_it = time.perf_counter() - began
            began = time.perf_counter()
            for _step in range(steps):
                pass
            found.append((with_it - (time.perf_counter() - began)) / steps * 1e6)
    print(f"a step: {statistics.median(found):.3f} µs (median), {min(found):.3f} µs at best")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "slowdown": slowdown,
    "hashing": hashing,
    "sigterm": sigterm,
    "restart": restart,
    "heartbeat": heartbeat,
}
