"""G11: a signal to the parent or any process, at any moment: a checkpoint, the right exit code, in time, no rest."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from guarantees.cases_g11 import Case, cases, run


@pytest.mark.parametrize("case", [*cases(5, seed=0), Case(signal.SIGTERM, "dealt", "parent", 2, 0.0)], ids=str)
def test_a_signal_saves_and_ends_in_time(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
