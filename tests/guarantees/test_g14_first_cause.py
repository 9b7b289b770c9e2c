"""G14: the first cause of a failure comes last on the screen: process, step, error; the others end soon."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g14 import WRITE, Case, run

SHORT = [Case("model", 1, 2), Case("data", 1, 4), Case("kill", 0, 2), Case("system_exit", 0, 2), WRITE]


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_the_first_cause_is_told_last(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
