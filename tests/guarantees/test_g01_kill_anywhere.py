"""G1 and G23: killed anywhere, the same command gives the bits of the run that nobody killed, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g01 import Case, cases, run
from guarantees.kills import Kill, Start, reference, survive


@pytest.mark.parametrize("case", cases(27, seed=0), ids=str)
def test_a_killed_run_comes_to_the_same_bits(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


@pytest.mark.parametrize("words", [(), ("backend.comm_hook=bf16",)])
def test_three_processes(words: tuple[str, ...], tmp_path: Path) -> None:
    start = Start.of("ddp3-fp32", *words)
    expected, known = reference(start, tmp_path / "uninterrupted")
    assert survive(start, [Kill("step", 0.5, 0.0, "all")], tmp_path / "killed", expected, known)
