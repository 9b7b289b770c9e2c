"""`runner -m …`: one run a combination, each in a process and a folder of its own, then a comparison."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cli.train import WORK, command_of, plan_of, problems_of, raise_problems
from runner.console import say
from runner.errors import InputError, Problem
from runner.folder import RunFolder, finite
from runner.launch import processes
from runner.launch.environment import Environment
from runner.launch.local import supervise
from runner.recipe.compose import Composition, compose
from runner.recipe.overrides import COMMAND_LINE, Invocation, assignment, jobs
from runner.recipe.redact import redact_command, secrets_of
from runner.signals import INTERRUPTED, PREEMPTED

#: Exit codes of a job that a signal ended: in order, or at once.
_INTERRUPTED = (PREEMPTED, INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGUSR1)


@dataclass
class Job:
    """One combination: its overrides, those of them that vary over the sweep (without secrets), its folder."""

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
    raise_problems([*invocation.problems, *environment.problems, *_launched(environment)], Composition())
    lists = jobs(invocation)
    compositions = [compose(words, directory=directory, config_dirs=invocation.config_dirs) for words in lists]
    _raise_all(compositions, environment)
    _one_folder(compositions)
    varying = [words for words in zip(*lists, strict=True) if len(set(words)) > 1]
    first = compositions[0].config
    if first["run_dir"] is not None:
        folder = RunFolder.named(Path(directory, first["run_dir"]))
    else:
        folder = RunFolder.new(directory / "runs", f"{first['name']}-sweep")
        folder.link_latest()
    found = []
    for number, (words, composition) in enumerate(zip(lists, compositions, strict=True)):
        varied = _redacted([column[number] for column in varying], [composition])
        name = "_".join([str(number), *(_file_name(word) for word in varied)])
        name = name.encode()[:120].decode(errors="ignore")
        found.append(Job(words, varied, composition, folder.path / name))
    where = _short(folder.path, directory)
    for note in dict.fromkeys(note for composition in compositions for note in composition.notes):
        say(f"{note}\n", sys.stdout)
    say(f"sweep of {len(found)} {'job' if len(found) == 1 else 'jobs'}: {where}\n", sys.stdout)
    command = _redacted(_words(invocation), compositions)
    stopped = _run_all(found, invocation, environment, directory, started)
    rows = [_row(job) for job in found]
    content = {"command": command, "jobs": rows}
    _write(folder, content)
    if stopped is not None:
        say(f"to go on: {shlex.join(['python', '-m', 'runner', *_with_folder(command, where)])}\n", sys.stdout)
    table = json.dumps(finite(content), indent=2, ensure_ascii=False) if invocation.json else _table(rows)
    say(f"{table}\n", sys.stdout)
    if stopped is not None:
        return stopped
    failed = [row for row in rows if row["exit_code"] != 0]
    if failed:
        say(f"{len(failed)} of {len(rows)} jobs failed: {', '.join(row['job'] for row in failed)}\n", sys.stderr)
    return 1 if failed else 0


def _launched(environment: Environment) -> list[Problem]:
    if environment.ranks is None or environment.ranks.world_size == 1:
        return []
    why = f"a sweep starts the processes of its jobs itself, and {environment.launcher} has started several"
    return [Problem(None, why, "start one process, and say launch.nproc_per_node")]


def _raise_all(compositions: Sequence[Composition], environment: Environment) -> None:
    """Raises InputError with each problem once, however many jobs have it."""
    seen: dict[str, Problem] = {}
    for composition in compositions:
        problems = problems_of(composition, environment)
        if processes.nodes(composition.config) > 1:
            why = "the jobs of a sweep run on one computer"
            problems.append(Problem("launch.nnodes", why, "leave it out", composition.config["launch"]["nnodes"]))
        try:
            raise_problems(problems, composition)
        except InputError as error:
            for problem in error.problems:
                seen.setdefault(repr(problem), problem)
    if seen:
        raise InputError(*seen.values())


def _one_folder(compositions: Sequence[Composition]) -> None:
    """Raises InputError where the jobs would have several values of run_dir."""
    written = {composition.unresolved["run_dir"]: None for composition in compositions}
    resolved = {composition.config["run_dir"]: None for composition in compositions}
    is_time = any("${now:" in text for text in written if text)  # it goes on while the jobs are composed
    if len(written) > 1 or (len(resolved) > 1 and not is_time):
        why = "a sweep has one folder, in which each job gets a folder of its own"
        values = ", ".join("null" if value is None else value for value in resolved)
        raise InputError(Problem("run_dir", why, "give one value, or leave run_dir out", values, COMMAND_LINE))


def _words(invocation: Invocation) -> list[str]:
    """The command line that repeats the sweep."""
    flags = ["-m", *(["--json"] if invocation.json else [])]
    return [*flags, *(f"+{word}" if word.startswith("recipe=") else word for word in command_of(invocation))]


def _redacted(words: Sequence[str], compositions: Sequence[Composition]) -> list[str]:
    secrets = {secret for each in compositions for secret in secrets_of(each.config, each.unresolved)}
    return redact_command(words, secrets)


def _with_folder(words: Sequence[str], folder: str) -> list[str]:
    """A command line whose run_dir is the folder."""
    others = [word for word in words if word.lstrip("+~").partition("=")[0] != "run_dir"]
    return [*others, assignment("run_dir", folder)]


def _run_all(
    found: Sequence[Job], invocation: Invocation, environment: Environment, directory: Path, started: float
) -> int | None:
    """Runs the jobs; the exit code of a job that was interrupted ends the sweep and is returned."""
    for number, job in enumerate(found, 1):
        say(f"\njob {number}/{len(found)}  {' '.join(job.varied)}\n", sys.stdout)
        where = _short(job.folder, directory)
        repeated = Invocation(overrides=_with_folder(job.overrides, where), config_dirs=invocation.config_dirs)
        plan = plan_of(job.composition, command_of(repeated), directory, environment, started)
        plan.run_dir = where
        plan.config = {**plan.config, "run_dir": where}
        job.code = supervise(WORK, plan, processes.processes(plan.config, environment))
        if job.code in _INTERRUPTED:
            return job.code
    return None


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


def _write(folder: RunFolder, content: dict[str, Any]) -> None:
    folder.write_json("sweep.json", content)
    rows = content["jobs"]
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
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = None if terminal else max(100, *(40 + len(" ".join(row["overrides"])) + 12 * len(names) for row in rows))
    Console(file=text, force_terminal=terminal, width=width or os.get_terminal_size().columns).print(table)
    return "\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _file_name(word: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", word.lstrip("+"))


def _short(path: Path, directory: Path) -> str:
    try:
        return str(path.relative_to(directory))
    except ValueError:
        return str(path)
