"""G15: a run that is finished ends with code 0, says nothing of an abort, and leaves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import WORDS, Program, held, require

BACKENDS = ("ddp", "fsdp", "deepspeed")


@dataclass(frozen=True)
class Case:
    backend: str
    number: int

    def __str__(self) -> str:
        return f"{self.backend}-{self.number}"


def cases(count: int, seed: int) -> list[Case]:
    """`count` runs of each backend."""
    return [Case(backend, seed + number) for number in range(count) for backend in BACKENDS]


def run(case: Case, folder: Path) -> str | None:
    return held(lambda: _run(case, folder))


def _run(case: Case, folder: Path) -> None:
    words = (*WORDS, f"backend={case.backend}", "launch.nproc_per_node=2", "train.steps=3", f"seed={case.number}")
    program = Program(folder, words)
    try:
        seen = program.end(90)
    finally:
        program.kill()
    require(seen.code == 0, f"exit code {seen.code}", seen)
    require(seen.err == "", "words on stderr", seen)
    require(seen.json("summary.json").get("status") == "completed", "summary.json", seen)
    require(not (seen.run / ".lock").exists(), "the lock", seen)
