"""Runs that are killed from outside at a chosen moment, and what must be equal to the run that nobody killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from guarantees.supervised import of_torch, parent

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

#: Words of a command line: how the rich run is trained.
BACKENDS = {
    "single": ("backend=single",),
    "ddp": ("backend=ddp", "launch.nproc_per_node=2"),
    "fsdp": ("backend=fsdp", "launch.nproc_per_node=2"),
}
PRECISIONS = {
    "fp32": (),
    "bf16": ("precision=bf16",),
    # Overflows on the way, and a scale that grows again.
    "fp16": (
        "precision=fp16",
        "precision.loss_scaling.init_scale=1e7",
        "precision.loss_scaling.growth_interval=5",
    ),
}
CELLS = [f"{backend}-{precision}" for backend in BACKENDS for precision in PRECISIONS]
#: From three processes on it matters where in a bucket a gradient lies.
BACKENDS["ddp3"] = ("backend=ddp", "launch.nproc_per_node=3", "batch.global_size=18")

#: The moments at which a run is killed, and whom a kill hits.
MOMENTS = ("start", "step", "save", "prune", "evaluation", "any")
TARGETS = ("rank", "all", "parent")

#: Seconds after a kill at which nothing may be left, in which a run must end, and that count as a hang: it tells of the
#: stacks then.
GONE, ENDED, HANGS = 10.0, 120.0, 60

#: What differs between two runs of the same: clocks.
_CLOCKS = {"time", "samples_per_second", "tokens_per_second", "seconds", "steps_per_second"}


@dataclass(frozen=True)
class Kill:
    """One kill: when (a moment of MOMENTS), at which `place` of what is left of the run, how far `within` the moment
    (both 0 to 1), how many seconds after it was reached, whom."""

    moment: str
    place: float
    delay: float
    target: str
    rank: int = 0
    within: float = 0.0


@dataclass(frozen=True)
class Start:
    """A command line for the rich run, beside `+recipe=rich run_dir=run`."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, cell: str, *words: str) -> Start:
        backend, precision = cell.split("-")
        return cls((*BACKENDS[backend], *PRECISIONS[precision], *words))

    @property
    def world(self) -> int:
        """How many ranks it starts."""
        found = [int(word.partition("=")[2]) for word in self.words if word.startswith("launch.nproc_per_node=")]
        return found[-1] if found else 1


class Violated(AssertionError):
    """What was promised and did not hold."""


class Missed(Exception):
    """A kill by the clock came when the run was over, or ended it well: `number` says which of the kills."""

    def __init__(self, number: int) -> None:
        super().__init__(f"the run was over before kill {number + 1}")
        self.number = number


# --- a place of its own ----------------------------------------------------------------------------------------------


class Home:
    """A folder with the rich recipe, and homes for everything that a program might leave anywhere else."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.run = folder / "run"
        self.mark = f"{os.getpid()}-{random.SystemRandom().getrandbits(64):x}"
        (folder / "recipes").mkdir(parents=True)
        for name in ("tmp", "home", "cache"):
            (folder / name).mkdir()
        self._halt, self._halted = folder / "halt", folder / "halted"
        shutil.copy(HERE / "rich.yaml", folder / "recipes")
        shutil.copy(HERE / "rich.py", folder)
        #: All processes that were ever seen: shared memory is named after them.
        self.seen: set[int] = set()
        self._known = self._outside()

    def begin(self, start: Start) -> subprocess.Popen[bytes]:
        """Starts the program. What it says is in the file `said`."""
        outside = {name: value for name, value in os.environ.items() if name not in _RANKS}
        variables = {
            **outside,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.path / "tmp"),
            "HOME": str(self.path / "home"),
            "XDG_CACHE_HOME": str(self.path / "cache"),
            "KILLED_RUN": self.mark,
        }
        words = ["+recipe=rich", "run_dir=run", "device=cpu", "launch.threads=1", f"launch.timeout={HANGS}"]
        with (self.path / "said").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "runner", *words, *start.words],
                cwd=self.path,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def said(self) -> str:
        path = self.path / "said"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def halt(self, order: Mapping[str, Any]) -> None:
        """Lets the program that is started next halt at a place; see rich.Halt."""
        self._halted.unlink(missing_ok=True)
        self._halt.write_text(json.dumps(order))

    def halted(self) -> str | None:
        """What a process has halted at, None as long as none has. Raises Violated where it has gone on."""
        said = self._halted.read_text() if self._halted.exists() else ""
        at, _, more = said.partition("\n")
        if more:
            raise Violated(f"went on although nobody had allowed it: {said!r}")
        return at if said else None

    def release(self) -> None:
        """Whoever has halted goes on."""
        self._halt.unlink(missing_ok=True)

    def living(self) -> dict[int, str]:
        """All processes that came from the programs started here, whatever session or parent they have now."""
        found = {}
        mark = f"KILLED_RUN={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def ranks(self, living: Mapping[int, str]) -> dict[int, int]:
        """The processes of this run's ranks: rank -> pid; one process without a parent of ours is rank 0."""
        workers = {pid: line for pid, line in living.items() if "runner.launch.worker" in line}
        if not workers:
            parents = {parent(pid) for pid in living}
            return {0: min(parents & set(living) or living)} if living else {}
        found = {}
        for pid in workers:
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)
                # A data worker is a fork of its rank and looks like it: the oldest is the rank.
                if rank is not None and parent(pid) not in workers:
                    found[rank] = pid
        return found

    def litter(self) -> set[str]:
        """Files that came to lie anywhere but in the run's folder."""
        return self._outside() - self._known

    def _outside(self) -> set[str]:
        found = set()
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if name != "__pycache__" and Path(folder, name) != self.run]
            folders[:] = [name for name in folders if not of_torch(Path(folder, name))]
            found |= {str(Path(folder, name).relative_to(self.path)) for name in (*files, *folders)}
        shared = Path("/dev/shm")
        pids = {str(pid) for pid in self.seen}
        if shared.is_dir() and pids:
            found |= {f"/dev/shm/{entry.name}" for entry in shared.iterdir() if pids & set(_numbers(entry.name))}
        return found - {"said", "halt", "halted"}

    def clean(self) -> None:
        """Ends whatever still lives, so that a test that fails leaves nothing."""
        for pid in self.living():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def _numbers(name: str) -> list[str]:
    return "".join(c if c.isdecimal() else " " for c in name).split()


# --- the moment ------------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """What a reference run tells of its kind: seconds until its training begins and until its end, its steps."""

    starts: float
    ends: float
    steps: int


def possible(kill: Kill, done: int, known: Known) -> Kill:
    """The kill, or, where its moment cannot come any more after `done` steps, another."""
    if done >= known.steps:
        return replace(kill, moment="start", place=kill.place * 0.3)  # what is finished says so and ends
    if kill.moment == "prune" and done > known.steps - _SAVES:
        return replace(kill, moment="step")  # no two saves are left, and the first of them may remove nothing
    return kill


#: Steps that hold two saves, the last one among them.
_SAVES = 4

#: The small things that belong to a moment, after which a process halts: those of a step are told by events of hooks,
#: those of a save or a prune are files that are opened, renamed and removed, those of an evaluation batches.
_PARTS = {"start": 1, "step": 3, "save": 5, "prune": 6, "evaluation": 3}


def order(kill: Kill, done: int, known: Known, world: int) -> dict[str, Any] | None:
    """Where a process is to halt for a kill, in the words of rich.Halt; None where only a clock says when it comes."""
    if kill.moment == "any":
        return None
    last = known.steps - _SAVES if kill.moment == "prune" else known.steps
    # Only the first process prunes, and of a save any other does one thing only: it writes its file.
    rank = 0 if kill.moment == "prune" else kill.rank % world
    parts = 1 if kill.moment == "save" and rank else _PARTS[kill.moment]
    return {
        "moment": kill.moment,
        "step": 0 if kill.moment == "start" else done + 1 + int(kill.place * (last - done)),
        "skip": int(kill.within * parts),
        "rank": None if kill.moment == "start" else rank,
    }


def wait_for(
    kill: Kill, home: Home, process: subprocess.Popen[bytes], known: Known, done: int, rank: int | None
) -> str | None:
    """Waits for the moment of a kill; in words what the run is at now. None where it ended before the time came.

    But for kills by the clock, process `rank` has halted in this very moment and stays there, so the kill lands in it.
    Raises Violated where none has, and where the run's files do not say so too.
    """
    began = time.monotonic()
    if kill.moment in ("start", "any"):
        # Of a start the end is a halt, however long it takes today; of a run it may come earlier than the reference's.
        left = 0.9 * (known.starts + (known.ends - known.starts) * (1 - done / known.steps))
        alive = _still(process, began + kill.place * (known.starts if kill.moment == "start" else left))
        if kill.moment == "start":
            home.halted()
        return _state(home.run) if alive else None
    while (at := home.halted()) is None or not _shows(kill.moment, at, home.run, rank):
        if process.poll() is not None or time.monotonic() > began + ENDED:
            raise Violated(f"no {kill.moment} was seen: halted at {at!r}, {_state(home.run)}\n{home.said()}")
        time.sleep(0.002)
    _still(process, time.monotonic() + kill.delay)
    if home.halted() != at or not _shows(kill.moment, at, home.run, rank):
        raise Violated(f"the {kill.moment} went on although a process had halted in it: {_state(home.run)}")
    return at or _state(home.run)


def _shows(moment: str, at: str, run: Path, rank: int | None) -> bool:
    """Whether the files of a run say that it is at a moment: a folder that is not whole, or its state."""
    if moment in ("save", "prune"):
        return (run / "checkpoints" / at).is_dir()
    states = {"step": {"running"}, "evaluation": {"evaluating"}}[moment]
    if moment == "step" and rank:
        states |= {"evaluating", "saving"}  # the state is the first process's, which may be at the end of this step
    return _state(run) in states


def _state(run: Path) -> str:
    try:
        return str(json.loads((run / "status.json").read_text())["state"])
    except (OSError, ValueError, KeyError):
        return "no state"


def _still(process: subprocess.Popen[bytes], until: float) -> bool:
    """Whether the process still runs at a time of time.monotonic()."""
    if (left := until - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            process.wait(left)
    return process.poll() is None


def _done(run: Path) -> int:
    """Finished steps of which a checkpoint tells."""
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    return max((int(name[5:]) for name in names), default=0)


# --- the kill and what it leaves -------------------------------------------------------------------------------------


def hit(kill: Kill, home: Home, process: subprocess.Popen[bytes]) -> str:
    """Kills, and returns whom, once those are dead; without a parent its ranks are, in this moment."""
    living = home.living()
    home.seen.update(living)
    ranks = home.ranks(living)
    if kill.target == "parent" or not ranks:
        victims = {"parent": process.pid}
    elif kill.target == "rank":
        rank = kill.rank % len(ranks)
        victims = {f"rank {rank}": ranks.get(rank, process.pid)}
    else:
        victims = {f"rank {rank}": pid for rank, pid in ranks.items()}
    for pid in victims.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    dying = {*victims.values(), *(ranks.values() if kill.target == "parent" else ())}
    until = time.monotonic() + 1.0
    while any(_lives(pid) for pid in dying) and time.monotonic() < until:
        time.sleep(0.001)
    return ", ".join(victims)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(home: Home, process: subprocess.Popen[bytes], whom: str) -> float:
    """Waits until no process is left; seconds. Raises Violated where one is, or a file outside of the run's folder."""
    began = time.monotonic()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GONE)
    while (left := home.living()) and time.monotonic() < began + GONE:
        time.sleep(0.05)
    if left:
        home.clean()
        raise Violated(f"{GONE:.0f} s after SIGKILL of {whom} still alive: {list(left.values())}")
    if litter := home.litter():
        raise Violated(f"after SIGKILL of {whom} outside of the run's folder: {sorted(litter)}")
    return time.monotonic() - began


# --- what a run came to ----------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Everything of a finished run that must be the same, whatever happened on the way."""

    checkpoint: str
    tensors: dict[str, str]
    state: dict[str, Any]
    records: list[dict[str, Any]]
    scalars: dict[str, list[tuple[int, float]]]
    folders: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, run: Path) -> Outcome:
        """Raises Violated where the files of the run do not say that it is complete."""
        last = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if (status := json.loads((run / "summary.json").read_text())["status"]) != "completed":
            raise Violated(f"summary.json says {status}")
        return cls(
            last.name,
            tensors(last),
            _leaves(json.loads((last / "state.json").read_text())["state"]),
            [{key: value for key, value in record.items() if key not in _CLOCKS} for record in records],
            scalars(run / "tensorboard"),
            sorted(path.name for path in (run / "checkpoints").iterdir()),
        )


def tensors(checkpoint: Path) -> dict[str, str]:
    """Name -> hash of each tensor, put together from the chunks of all processes."""
    import torch
    from safetensors.torch import load_file

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: load_file(checkpoint / name) for name in manifest["files"] if name.endswith(".safetensors")}
    found = {}
    for name, entry in manifest["tensors"].items():
        whole = None
        for chunk in entry["chunks"]:
            part = files[chunk["file"]][chunk["key"]]
            if whole is None:
                whole = part.new_zeros(entry["shape"])
            place = tuple(
                slice(start, start + size) for start, size in zip(chunk["offsets"], chunk["sizes"], strict=True)
            )
            whole[place] = part
        assert whole is not None, name
        data = whole.contiguous().flatten().view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        found[name] = f"{entry['dtype']} {entry['shape']} {hashlib.sha256(data).hexdigest()}"
    return found


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The plain values of a nested document by their path, without clocks."""
    if isinstance(value, Mapping):
        inner = ((f"{name}/{key}", item) for key, item in value.items() if key not in _CLOCKS)
    elif isinstance(value, list):
        inner = ((f"{name}/{number}", item) for number, item in enumerate(value))
    else:
        return {name: value}
    return {key: leaf for place, item in inner for key, leaf in _leaves(item, place).items()}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value), without clocks."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    found.Reload()
    tags = [tag for tag in found.Tags()["scalars"] if tag.partition("/")[2] not in _CLOCKS]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in sorted(tags)}


def compare(reference: Outcome, found: Outcome) -> None:
    """Raises Violated with the first things that differ."""
    told = [(record["split"], record["step"]) for record in found.records]
    if again := sorted({each for each in told if told.count(each) > 1}):
        raise Violated(f"more than once in metrics.jsonl: {again[:5]}")
    for what in ("checkpoint", "folders"):
        ours, theirs = getattr(found, what), getattr(reference, what)
        if ours != theirs:
            raise Violated(f"{what}: {ours} instead of {theirs}")
    for one, two in zip(found.records, reference.records, strict=False):
        # Text, so that nan equals itself and 0.1 only itself.
        if json.dumps(one, sort_keys=True) != json.dumps(two, sort_keys=True):
            raise Violated(f"metrics.jsonl: {one} instead of {two}")
    if len(found.records) != len(reference.records):
        raise Violated(f"metrics.jsonl has {len(found.records)} records instead of {len(reference.records)}")
    for what in ("tensors", "state"):
        ours, theirs = getattr(found, what), getattr(reference, what)
        differ = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if differ:
            shown = [f"{name}: {ours.get(name)} instead of {theirs.get(name)}" for name in differ[:4]]
            raise Violated(f"{what} of {found.checkpoint}, {len(differ)} of {len(theirs)} differ: " + "; ".join(shown))
    for tag in sorted(found.scalars.keys() | reference.scalars.keys()):
        ours, theirs = found.scalars.get(tag, []), reference.scalars.get(tag, [])
        if repr(ours) != repr(theirs):
            missing = sorted({step for step, _ in theirs} - {step for step, _ in ours})
            steps = [step for step, _ in ours]
            twice = sorted({step for step in steps if steps.count(step) > 1})
            raise Violated(f"TensorBoard, {tag}: steps missing {missing}, twice {twice}, {len(ours)} of {len(theirs)}")


# --- whole runs ------------------------------------------------------------------------------------------------------


@contextmanager
def home_in(folder: Path) -> Iterator[Home]:
    home = Home(folder)
    try:
        yield home
    finally:
        home.clean()


def finish(home: Home, start: Start) -> float:
    """Runs the command to its end; seconds. Raises Violated where it does not end well."""
    began = time.monotonic()
    process = home.begin(start)
    try:
        code = process.wait(ENDED)
    except subprocess.TimeoutExpired:
        raise Violated(f"not finished in {ENDED:.0f} s\n{home.said()}") from None
    if code != 0:
        raise Violated(f"exit code {code}\n{home.said()}")
    seconds = time.monotonic() - began
    gone(home, process, "nobody")
    return seconds


def reference(start: Start, folder: Path) -> tuple[Outcome, Known]:
    """The run that nobody kills."""
    with home_in(folder) as home:
        seconds = finish(home, start)
        outcome = Outcome.of(home.run)
        summary = json.loads((home.run / "summary.json").read_text())
        evaluations = sum(record["split"] == "eval" for record in outcome.records)
        steps = len(outcome.records) - evaluations
        return outcome, Known(summary["startup_seconds"], seconds, steps)


def survive(start: Start, kills: Sequence[Kill], folder: Path, expected: Outcome, known: Known) -> list[str]:
    """Runs the command, kills it at each of the moments, and at last lets it end; what each kill hit, and at what.

    Raises Violated where something was left after a kill, or where the outcome is not the expected one, and Missed
    where a kill came too late.
    """
    told: list[str] = []
    with home_in(folder) as home:
        try:
            for number, kill in enumerate(kills):
                done = _done(home.run)
                kill = possible(kill, done, known)
                if (place := order(kill, done, known, start.world)) is not None:
                    home.halt(place)
                process = home.begin(start)
                if (at := wait_for(kill, home, process, known, done, place and place["rank"])) is None:
                    if (code := process.wait(ENDED)) != 0:
                        raise Violated(f"exit code {code} without a kill\n{home.said()}")
                    raise Missed(number)
                told.append(f"{hit(kill, home, process)} at {kill.moment} ({at})")
                home.release()
                gone(home, process, told[-1])
                if process.returncode == 0 and kill.moment in ("start", "any"):
                    raise Missed(number)  # what was killed had done its part
                if process.returncode == 0:
                    raise Violated(f"exit code 0 after a kill\n{home.said()}")
            finish(home, start)
            compare(expected, Outcome.of(home.run))
        except Violated as error:
            raise Violated(f"killed: {'; '.join(told) or 'nobody'}: {error}") from None
    return told
