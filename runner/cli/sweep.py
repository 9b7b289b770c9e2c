"""`runner -m …`: one run a combination, each in a process and a folder of its own, then a comparison."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cli.train import command_of, plan_of, raise_problems
from runner.errors import InputError, Problem
from runner.folder import RunFolder
from runner.launch.environment import Environment
from runner.recipe.compose import Composition, compose
from runner.recipe.overrides import Invocation, jobs

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_INTERRUPTED = (75, 130, -signal.SIGINT, -signal.SIGTERM)


@dataclass
class Job:
    """One combination: its overrides, those of them that vary over the sweep, its folder."""

    overrides: list[str]
    varied: list[str]
    composition: Composition
    folder: Path
    code: int | None = None


def sweep(invocation: Invocation, environment: Environment, started: float) -> int:
    """Checks all jobs, then runs them one after the other. Returns 0, or 1 where a job failed.

    Raises InputError, before any job runs, with the problems of all of them.
    """
    directory = Path.cwd()
    raise_problems([*invocation.problems, *environment.check()], Composition())
    lists = jobs(invocation)
    compositions = [compose(words, directory=directory, config_dirs=invocation.config_dirs) for words in lists]
    _raise_all(compositions)
    varying = [words for words in zip(*lists, strict=True) if len(set(words)) > 1]
    first = compositions[0].config
    if first["run_dir"] is not None:
        folder = RunFolder.named(Path(directory, first["run_dir"]))
    else:
        folder = RunFolder.new(directory / "runs", f"{first['name']}-sweep")
        folder.link_latest()
    found = []
    for number, (words, composition) in enumerate(zip(lists, compositions, strict=True)):
        varied = [column[number] for column in varying]
        name = "_".join([str(number), *(_file_name(word) for word in varied)])[:120]
        found.append(Job(words, varied, composition, folder.path / name))
    print(f"sweep of {len(found)} jobs: {_short(folder.path, directory)}", flush=True)
    stopped = _run_all(found, invocation, environment, directory, started)
    rows = [_row(job) for job in found]
    _write(folder, rows, invocation)
    print(_table(rows), flush=True)
    if stopped is not None:
        return stopped
    failed = [row for row in rows if row["exit_code"] != 0]
    if failed:
        print(f"{len(failed)} of {len(rows)} jobs failed: {', '.join(row['job'] for row in failed)}", file=sys.stderr)
    return 1 if failed else 0


def _raise_all(compositions: Sequence[Composition]) -> None:
    """Raises InputError with each problem once, however many jobs have it."""
    seen: dict[str, Problem] = {}
    for composition in compositions:
        try:
            raise_problems(composition.check(), composition)
        except InputError as error:
            for problem in error.problems:
                seen.setdefault(repr(problem), problem)
    if seen:
        raise InputError(*seen.values())


def _run_all(
    found: Sequence[Job], invocation: Invocation, environment: Environment, directory: Path, started: float
) -> int | None:
    """Runs the jobs; the exit code of a job that was interrupted ends the sweep and is returned."""
    for number, job in enumerate(found, 1):
        print(f"\njob {number}/{len(found)}  {' '.join(job.varied)}", flush=True)
        repeated = Invocation(overrides=job.overrides, config_dirs=invocation.config_dirs)
        plan = plan_of(job.composition, command_of(repeated), directory, environment, started)
        plan.run_dir = str(job.folder)
        path = job.folder.with_name(f".{job.folder.name}.plan.json")
        plan.save(path)
        try:
            # A session of its own: the terminal's Ctrl-C reaches the job once, by us.
            process = subprocess.Popen(
                [sys.executable, "-m", "runner.launch.worker", "runner.cli.train:work", str(path)], process_group=0
            )
            with _forwarded(process):
                job.code = process.wait()
        finally:
            path.unlink(missing_ok=True)
        if job.code in _INTERRUPTED:
            return job.code if job.code > 0 else 128 - job.code
    return None


@contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hands the signals that end a run on to the job."""

    def forward(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _row(job: Job) -> dict[str, Any]:
    """What the comparison says of a job."""
    summary = RunFolder(job.folder).read_json("summary.json") or {}
    metrics = {k: v for k, v in (summary.get("metrics") or {}).items() if k not in ("split", "step", "samples")}
    status = summary.get("status") or ("not run" if job.code is None else "failed")
    if job.code not in (0, None) and status == "completed":
        status = "failed"
    return {
        "job": job.folder.name,
        "overrides": job.varied,
        "status": status,
        "exit_code": job.code,
        "steps": summary.get("steps"),
        "metrics": metrics,
        "train_seconds": summary.get("train_seconds"),
        "samples_per_second": summary.get("samples_per_second"),
        "peak_memory_bytes": max(summary.get("peak_memory_bytes") or [0]) or None,
        "error": summary.get("error"),
    }


def _write(folder: RunFolder, rows: list[dict[str, Any]], invocation: Invocation) -> None:
    folder.write_json("sweep.json", {"command": command_of(invocation), "jobs": rows})
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = io.StringIO()
    plain = ["job", "status", "exit_code", "steps", "train_seconds", "samples_per_second", "peak_memory_bytes", "error"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["job", "overrides", *plain[1:], *names])
    for row in rows:
        values = [row["job"], " ".join(row["overrides"]), *(row[name] for name in plain[1:])]
        table.writerow([*values, *(row["metrics"].get(name) for name in names)])
    folder.write_text("sweep.csv", text.getvalue())


def _table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text that fits the terminal."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job", overflow="fold")
    table.add_column("status")
    for name in [*names, "samples/s", "seconds", "MiB"]:
        table.add_column(name, justify="right")
    for row in rows:
        memory = row["peak_memory_bytes"]
        table.add_row(
            " ".join(row["overrides"]) or row["job"],
            row["status"],
            *(_number(row["metrics"].get(name), ".4f") for name in names),
            _number(row["samples_per_second"], ".1f"),
            _number(row["train_seconds"], ".2f"),
            _number(memory and memory / 2**20, ".0f"),
        )
    text = io.StringIO()
    terminal = sys.stdout.isatty()
    width = None if terminal else max(100, *(40 + len(" ".join(row["overrides"])) + 12 * len(names) for row in rows))
    Console(file=text, force_terminal=terminal, width=width or os.get_terminal_size().columns).print(table)
    return "\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _file_name(word: str) -> str:
    return re.sub(r"[^\w.=,+-]+", "-", word.lstrip("+"))


def _short(path: Path, directory: Path) -> str:
    try:
        return str(path.relative_to(directory))
    except ValueError:
        return str(path)
