"""The long form of every guarantee: cases are killed, damaged and refused by the hundred, and counted.

Each guarantee with a module `tests/guarantees/cases_gNN.py` takes part. Results are appended to a JSON-lines file case
by case; a second start goes on where the first one stopped, as long as the code is the same. A row of the table holds
results of one state of the code, which it names: of the state that most cases were run with.

Cases that are run at once and fail as a whole are run again one by one. Where none of them fails then, what failed
before stays in the row as a result of its own that did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# Not those of benchmarks.processes: its torch would be imported by each process that only waits or counts.
PYTHON, ROOT = sys.executable, Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
TABLE = ROOT / "docs" / "guarantees.md"
BEGIN, END = "<!-- table: python -m benchmarks survive --write -->", "<!-- end of the table -->"

#: What `cases` is asked for in the long form, and the figure to reach in words. What a case is, its module says: one of
#: G15 is asked for once for each backend, and those with a fixed list give all of it.
FIGURES: dict[str, tuple[int, str, str]] = {
    "g01": (450, "Kill anywhere", "450/450"),
    "g02": (28, "Elastic bits", "20/20, and 1e-6 without"),
    "g03": (200, "Torn never taken", "0 of 200 taken"),
    "g04": (10_000, "Never in place", "0 violations"),
    "g05": (208, "Disk full", "160/160, and 48 refused calls"),
    "g06": (1_450, "Damage is found", "100% found"),
    "g07": (40, "No code in a checkpoint", "0 executions"),
    "g08": (93, "No code from a recipe", "all refused (60 or more)"),
    "g09": (10_000, "Configuration errors", "100%"),
    "g10": (240, "Not finite", "240/240"),
    "g11": (50, "Preemption", "all exit right"),
    "g12": (42, "Hangs", "30/30, 0 false alarms"),
    "g13": (220, "Restart in place", "200/200 within 10 s"),
    "g14": (32, "First cause", "32/32"),
    "g15": (500, "Clean exits", "0 of 1,500 bad"),
    "g16": (2_000, "Exactly once", "0 violations"),
    "g17": (40, "Augmentation", "40/40 bitwise"),
    "g18": (100, "One writer", "100/100"),
    "g19": (59, "Resume drift", "all fields"),
    "g20": (60, "Honest asynchronous saves", "0 violations"),
    "g21": (20, "Sweeps", "20/20"),
    "g22": (2_025, "Portable", "100%"),
    "g23": (100, "No litter", "0 left"),
    "g24": (20, "Secrets", "0 found"),
    "g25": (88, "Bounded input", "all within 2 s, 300 MB"),
}

#: Seconds after which a case is given up.
PATIENCE = 900.0

#: What the cases use: the program with all that it finds by itself, the cases, and what they share with the tests.
SOURCES = (
    *("runner", "conf", "recipes", "plugins", "tests/guarantees", "tests/contract"),
    *("tests/small.py", "tests/programs.py", "tests/processes.py"),
)

#: Exit codes beside 0 and 1: --minutes ended before all cases were run, or Ctrl-C did.
UNFINISHED, INTERRUPTED = 75, 130
EXIT_CODES = (
    "exit codes: 0 where every chosen case has a result, and every result of the code as it is now held; 1 where one "
    "did not, or where a chosen guarantee cannot say what its cases are or has none; else "
    f"{UNFINISHED} where --minutes ended before all were run, {INTERRUPTED} after Ctrl-C (the same command goes on). "
    "--table runs nothing: 0 or 1 by the results that are there."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXIT_CODES
    parser.add_argument("--only", help="such as g01,g03; default: all that have a module")
    parser.add_argument("--count", type=int, help="cases of each guarantee; default: those of the long form")
    parser.add_argument("--seed", type=int, default=0, help="from which the cases are drawn")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, 1 or more")
    parser.add_argument("--minutes", type=float, help="begin no case after so many minutes")
    parser.add_argument("--results", type=Path, default=Path("survive.jsonl"), help="file that results are added to")
    parser.add_argument("--any-code", action="store_true", help="go on with results of other code; do not ask which")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--write", action="store_true", help="renew the rows of docs/guarantees.md")


def main(options: argparse.Namespace) -> int:
    results = Results(options.results, None if options.any_code else code())
    ran = 0 if options.table else run_all(options, results)
    rows = results.rows()
    lines = list(table(rows))
    now = _counted(results.found.get(results.code or "", {}).values())
    for name in sorted({result["guarantee"] for result in now if not result["held"]}):
        held = [result["held"] for result in now if result["guarantee"] == name]
        print(f"{name}: {held.count(False)} of {len(held)} cases did not hold with the code as it is now")
    print("\n".join(["", *lines]))
    if options.write:
        write(lines)
        print(f"\nwritten into {TABLE.relative_to(ROOT)}")
    return 1 if any(not result["held"] for result in now) else ran


def modules() -> list[str]:
    """The guarantees that have cases: g01, g02, …"""
    return sorted(path.stem.removeprefix("cases_") for path in (TESTS / "guarantees").glob("cases_g[0-9][0-9].py"))


def code() -> str:
    """A name of the program as it is: a hash of its sources and of all that the cases use."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def sources() -> list[Path]:
    """The files that a result may depend on; the short forms, which the long one does not use, are not among them."""
    given = [ROOT / name for name in SOURCES]
    found = [path for one in given for path in (sorted(one.rglob("*")) if one.is_dir() else [one])]
    return [path for path in found if path.suffix in (".py", ".yaml", ".json") and not path.name.startswith("test_")]


# --- results ---------------------------------------------------------------------------------------------------------


class Results:
    """The file of results, the newest of each case; `code` None: of any code, as if it were one."""

    def __init__(self, path: Path, code: str | None) -> None:
        self.path, self.code = path, code
        self.found: dict[str, dict[tuple[str, int, int, str], dict[str, Any]]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                result = json.loads(line)
            except ValueError:
                continue  # cut off when the last start was ended
            self._take(result)

    def _take(self, result: dict[str, Any]) -> None:
        state = "" if self.code is None else result["code"]
        # Moved to the end: the newest comes last.
        results = self.found[state] = self.found.pop(state, {})
        results[self._key(result)] = result

    def rows(self) -> list[list[dict[str, Any]]]:
        """For each guarantee the results of the state of the code that has most of them; of two, the newer one.

        A state in which something did not hold gives way only to a newer one.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        for state in self.found.values():
            for name in {result["guarantee"] for result in state.values()}:
                row = _counted(result for result in state.values() if result["guarantee"] == name)
                bad = [one for one in (rows.get(name, ()), row) if not all(result["held"] for result in one)]
                if bad or len(row) >= len(rows.get(name, ())):
                    rows[name] = row
        return [rows[name] for name in sorted(rows)]

    @staticmethod
    def _key(result: dict[str, Any]) -> tuple[str, int, int, str]:
        return result["guarantee"], result["seed"], result["index"], result["case"]

    def has(self, guarantee: str, seed: int, index: int, case: str) -> bool:
        return (guarantee, seed, index, case) in self.found.get(self.code or "", ())

    def add(self, result: dict[str, Any]) -> None:
        result["code"] = self.code or code()
        self._take(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A line that was cut off must not swallow the next one.
            if file.tell() and not _ends_with_newline(self.path):
                file.write(b"\n")
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _counted(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All results, but for the failures of cases at once that one of these cases carries itself."""
    found = list(results)
    carried = {
        (one["guarantee"], one["seed"], one["index"]) for one in found if not one["held"] and "at_once" not in one
    }
    return [
        one
        for one in found
        if not any((one["guarantee"], one["seed"], place) in carried for place in one.get("at_once", ()))
    ]


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Cases by their places in their module's list: one, or as many as the module takes at once."""

    guarantee: str
    count: int
    seed: int
    places: list[int]
    cases: list[str]


class Worker:
    """A process that runs one case after another; another one takes its place when it dies or hangs."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.began = 0.0
        self.folder: Path | None = None
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [PYTHON, "-m", "benchmarks.survive", "--serve"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def begin(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix=f"survive-{task.guarantee}-"))
        words = [task.guarantee, task.count, task.seed, task.places, str(self.folder)]
        self._pipe(self.process.stdin).write(json.dumps(words).encode() + b"\n")
        self._pipe(self.process.stdin).flush()

    def end(self) -> list[dict[str, Any]]:
        """The results of the cases, to be called when something can be read or the time is up.

        Several that failed as a whole have one result, with their places under `at_once`: which of them did it, only
        one by one can tell.
        """
        assert self.task is not None
        assert self.folder is not None
        task = self.task
        seconds = time.monotonic() - self.began
        whys: list[str | None] | str
        if seconds > PATIENCE:
            whys = f"not finished in {PATIENCE:.0f} s"
            self._replace()
        elif line := self.output.readline():
            whys = json.loads(line)
        else:
            whys = f"the process that ran it ended with {self.process.wait()}"
            self._replace()
        self.task = None  # only now: a process that is replaced in the middle of a case is ended in order
        if isinstance(whys, str) and len(task.cases) > 1:
            name = f"{len(task.cases)} at once, from {task.places[0]} to {task.places[-1]}"
            why = f"{whys} (files: {self.folder})"
            return [{**self._result(task, task.places[0], name, why, seconds), "at_once": task.places}]
        each = [whys] if isinstance(whys, str) else whys
        if any(each):
            each = [why and f"{why} (files: {self.folder})" for why in each]
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        return [
            self._result(task, place, case, why, seconds / len(task.cases))
            for place, case, why in zip(task.places, task.cases, each, strict=True)
        ]

    @staticmethod
    def _result(task: Task, place: int, case: str, why: str | None, seconds: float) -> dict[str, Any]:
        return {
            "guarantee": task.guarantee,
            "seed": task.seed,
            "index": place,
            "case": case,
            "held": why is None,
            "why": why,
            "seconds": round(seconds, 3),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "torch": versions(),
        }

    def _replace(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        """Ends the process; what its case has started ends with the case, so it gets a moment for that."""
        with suppress(OSError):
            self._pipe(self.process.stdin).close()
        if self.task is not None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()

    @property
    def output(self) -> IO[bytes]:
        return self._pipe(self.process.stdout)

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


def run_all(options: argparse.Namespace, results: Results) -> int:
    """Runs all cases that have no result yet, and gives an exit code that says whether that was done.

    An interruption loses the cases that run, no more.
    """
    chosen = modules()
    if options.only:
        wanted = options.only.split(",")
        if missing := sorted(set(wanted) - set(chosen)):
            raise SystemExit(
                f"no tests/guarantees/cases_NAME.py for {', '.join(missing)}; there are: {' '.join(chosen)}"
            )
        chosen = [name for name in chosen if name in wanted]
    if options.jobs < 1:
        raise SystemExit(f"--jobs is {options.jobs}: give 1 or more")
    print(f"{machine()}, {versions()}; results in {options.results}")
    until = float("inf") if options.minutes is None else time.monotonic() + options.minutes * 60
    without: list[str] = []
    waiting = _tasks(chosen, options, results, without)
    alone: list[Task] = []
    left: list[Task] = []
    interrupted = False
    workers = [Worker() for _ in range(options.jobs)]
    try:
        while True:
            for worker in workers:
                if worker.task is None and time.monotonic() <= until:
                    task = alone.pop() if alone else next(waiting, None)
                    if task is not None:
                        worker.begin(task)
            busy = [worker for worker in workers if worker.task]
            if not busy:
                break
            ready, _, _ = select.select([worker.output for worker in busy], [], [], 1.0)
            for worker in busy:
                if worker.output in ready or time.monotonic() - worker.began > PATIENCE:
                    alone += _tell(worker, results)
        # Nothing, unless there was no time: of what is asked for only here, nothing has begun.
        left = [*alone, *waiting]
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
        interrupted = True
    finally:
        for worker in workers:
            worker.close()
            if worker.folder is not None and worker.task is not None:
                shutil.rmtree(worker.folder, ignore_errors=True)
    if left:
        names = ", ".join(dict.fromkeys(task.guarantee for task in left))
        print(f"--minutes ended with {sum(len(task.places) for task in left)} cases not begun, of {names}")
    if without:
        print(f"without a result, and no figure is reached: {', '.join(without)}")
        return 1
    return INTERRUPTED if interrupted else UNFINISHED if left else 0


def _tasks(chosen: list[str], options: argparse.Namespace, results: Results, without: list[str]) -> Iterator[Task]:
    """What is to be run; guarantees of which that cannot be said are added to `without`."""
    for name in chosen:
        count = FIGURES.get(name, (100, "", ""))[0] if options.count is None else options.count
        try:
            texts, at_once = _described(name, count, options.seed)
        except ValueError as error:
            print(f"{name}: its cases cannot be made: {error}", flush=True)
            without.append(name)
            continue
        if not texts:
            print(f"{name}: there is no case", flush=True)
            without.append(name)
        todo = [index for index, case in enumerate(texts) if not results.has(name, options.seed, index, case)]
        print(f"{name}: {len(texts)} cases, {len(todo)} to run", flush=True)
        for start in range(0, len(todo), at_once):
            places = todo[start : start + at_once]
            yield Task(name, count, options.seed, places, [texts[place] for place in places])


def _described(name: str, count: int, seed: int) -> tuple[list[str], int]:
    """The cases of a module as text, and how many it takes at once; in a process of its own, for what it imports.

    Raises ValueError with the reason where it does not say.
    """
    words = [PYTHON, "-m", "benchmarks.survive", "--describe", name, str(count), str(seed)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    told = json.loads((done.stdout.splitlines() or [b"null"])[-1])
    if done.returncode != 0 or not isinstance(told, list):
        raise ValueError(told if isinstance(told, str) else f"the process that was asked ended with {done.returncode}")
    texts, at_once = told
    return texts, at_once


def _tell(worker: Worker, results: Results) -> list[Task]:
    """Writes down what became of a worker's cases, and gives those that are to be run again, one by one."""
    task = worker.task
    assert task is not None
    again: list[Task] = []
    for result in worker.end():
        results.add(result)
        how = "held" if result["held"] else f"VIOLATED: {result['why']}"
        if "at_once" in result:
            how += "; now one by one"
            for place, case in zip(task.places, task.cases, strict=True):
                again.append(Task(task.guarantee, task.count, task.seed, [place], [case]))
        if not result["held"] or result["seconds"] > 1.0 or result["index"] % 100 == 99:
            print(
                f"  {result['guarantee']} {result['index']} {result['case'][:100]}: {how} ({result['seconds']:.1f} s)",
                flush=True,
            )
    return again


# --- in a process of its own ------------------------------------------------------------------------------------------


def _module(name: str) -> Any:
    import importlib

    sys.path[:0] = [str(TESTS), str(ROOT)]
    return importlib.import_module(f"guarantees.cases_{name}")


def _text(case: Any) -> str:
    text = str(case)
    if len(text) > 120 and isinstance(getattr(case, "name", None), str):
        text = case.name
    # Addresses of objects differ from start to start.
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:200]


def serve() -> int:
    """Takes cases from stdin, runs them, and writes a list of what was violated by each, or null."""
    # In order: a case that is interrupted ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    words_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a case prints is not a result
    modules: dict[str, Any] = {}
    made: dict[tuple[str, int, int], list[Any]] = {}
    for line in sys.stdin.buffer:
        name, count, seed, places, folder = json.loads(line)
        whys: list[str | None] | str
        try:
            module = modules[name] = modules.get(name) or _module(name)
            key = (name, count, seed)
            made[key] = made.get(key) or list(module.cases(count, seed))
            chosen = [made[key][place] for place in places]
            whys = [module.run(chosen[0], Path(folder))] if len(places) == 1 else module.run_all(chosen, Path(folder))
            if len(whys) != len(places):
                whys = f"{len(whys)} results of {len(places)} cases"
        except Exception as error:
            import traceback

            traceback.print_exc()
            whys = f"{type(error).__name__}: {error}"
        words_out.write(json.dumps(whys).encode() + b"\n")
        words_out.flush()
    return 0


def describe(name: str, count: int, seed: int) -> int:
    """Prints the cases, or why there are none."""
    try:
        module = _module(name)
        told = [[_text(case) for case in module.cases(count, seed)], getattr(module, "AT_ONCE", 1)]
    except ModuleNotFoundError as error:
        print(json.dumps(str(error)))
        return 1
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(json.dumps(f"{type(error).__name__}: {error}"))
        return 1
    print(json.dumps(told))
    return 0


# --- the table -------------------------------------------------------------------------------------------------------


def table(rows: list[list[dict[str, Any]]]) -> Iterator[str]:
    """A line for each guarantee that has results."""
    yield "| | guarantee | figure to reach | held | date | machine | versions | code | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for results in rows:
        name = results[0]["guarantee"]
        held = sum(result["held"] for result in results)
        dates = sorted({result["date"] for result in results})
        _count, title, figure = FIGURES.get(name, (0, "", ""))
        cells = [
            f"G{int(name[1:])}",
            title,
            figure,
            f"{held:,}/{len(results):,}",
            dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
            *("; ".join(sorted({result[key] for result in results})) for key in ("machine", "torch", "code")),
            f"{sum(result['seconds'] for result in results):,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def write(lines: list[str]) -> None:
    """Renews the table in docs/guarantees.md; rows stay whose results are in another file."""
    before, _, rest = TABLE.read_text().partition(BEGIN)
    there, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{TABLE} has no {BEGIN} … {END}")
    head, rows = lines[:2], {_name(line): line for line in [*there.strip().splitlines()[2:], *lines[2:]]}
    TABLE.write_text("\n".join([f"{before}{BEGIN}", *head, *(rows[name] for name in sorted(rows)), f"{END}{after}"]))


def _name(row: str) -> int:
    """The number of a row's guarantee."""
    return int(row.split("|")[1].strip().removeprefix("G"))


def machine() -> str:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cpus} CPUs"


def versions() -> str:
    from importlib.metadata import version

    return f"torch {version('torch')}, Python {platform.python_version()}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve())
    if sys.argv[1:2] == ["--describe"]:
        sys.exit(describe(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survive", description=__doc__)
    arguments(parser)
    sys.exit(main(parser.parse_args()))
