"""G11: a signal to the parent or any process, at any moment: a checkpoint, the right exit code, in time, no rest."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from guarantees.cases_g11 import Case, cases, run

#: Given again are those of one process, which have one command in common.
SHORT = [
    *(replace(case, again=case.nproc == 1) for case in cases(5, seed=0)),
    Case(signal.SIGTERM, "dealt", "parent", 2, 0.0, again=False),
    Case(signal.SIGTERM, "second", "parent", 1, 0.0),
]


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_signal_saves_and_ends_in_time(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
